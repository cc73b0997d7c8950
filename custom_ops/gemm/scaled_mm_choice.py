"""What the tables of measurements say of a scaled product."""

from __future__ import annotations

from torch import Tensor

from custom_ops import platform, tables


def kind(a: Tensor, a_scale: Tensor, b_scale: Tensor) -> str:
    """How the tables call a product: its dtype and whether every scale is one number."""
    scales = "tensor" if a_scale.numel() == b_scale.numel() == 1 else "token"
    return f"{str(a.dtype).removeprefix('torch.')} {scales}"


def preferred(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> tables.Best | None:
    """What the tables say of a product of known sizes, or None."""
    capability = platform.cuda_capability(a.device) if a.device.type == "cuda" else None
    if capability is None or a.numel() == 0:
        return None
    n, k = b.shape
    return tables.best("scaled_mm", kind(a, a_scale, b_scale), capability, a.numel() // k, n, k)
