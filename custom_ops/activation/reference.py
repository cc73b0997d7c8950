"""The semantics of the gated activations in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.quantization.reference import group_quant
from custom_ops.scales import to_contiguous


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`custom_ops.silu_mul`: eager silu and eager product."""
    # silu rounds to the dtype of gate, and so does the product: the two roundings of eager.
    return to_contiguous(torch.nn.functional.silu(gate) * up)


def silu_mul_group_quant(
    gate: Tensor, up: Tensor, group_size: int, *, scale_layout: str, min_amax: float
) -> tuple[Tensor, Tensor]:
    """`custom_ops.silu_mul_group_quant`: the composition."""
    product = silu_mul(gate, up)
    return group_quant(product, group_size, scale_layout=scale_layout, min_amax=min_amax)
