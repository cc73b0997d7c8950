"""A float8 product, its scales and the residual that is added to it, as one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import library, platform
from custom_ops.gemm.ops import one_element, require_one_of
from custom_ops.implementation import CUDA_MAX_DIMS, Implementation, _no_cuda, cuda_op
from custom_ops.quantization.checks import check_choice, check_device
from custom_ops.scales import known, to_contiguous

FP8 = torch.float8_e4m3fn
MULTIPLE = 16
"""Of N and K: cuBLASLt reads rows of codes in vectors of 16 bytes."""


def scaled_mm_add(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    residual: Tensor,
    *,
    fast_sums: bool = False,
) -> Tensor:
    """(a * a_scale) @ (b * b_scale).T + residual, rounded once.

    a: float8_e4m3fn, [..., K]. b: float8_e4m3fn, [N, K], as `torch.nn.Linear` keeps weights. Scales are float32: both
    of one element (per tensor), or a_scale [..., 1] (per token) and b_scale [N] or [N, 1] (per channel). residual:
    bfloat16, [..., N]. Any strides. Returns bfloat16, [..., N], contiguous. With fl() one rounding to float32:

        out = bfloat16(fl(fl(fl(fl(sum_k a * b) * a_scale) * b_scale) + residual))

    Eager PyTorch rounds the product to bfloat16 before it adds the residual; this is closer to float64. fast_sums: what
    `use_fast_accum` of `torch._scaled_mm` is, partial sums that Hopper's tensor cores do not promote to float32. Order
    and precision of the sum, and the order in which the scales are multiplied, are the implementation's, which picks
    its kernel by the number of tokens: a row may differ in the last bits from one batch to another.

    Implementations: CUDA C++ that calls cuBLASLt (Hopper; N and K multiples of 16), reference. Raises ValueError for
    another dtype, shape or device. Source: cublasLtMatmul (cuBLAS 13), whose beta adds a matrix to the product.
    """
    return torch.ops.custom_ops.scaled_mm_add(a, a_scale, b, b_scale, residual, fast_sums=fast_sums)


def _check(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    residual: Tensor,
    *,
    fast_sums: bool,
) -> None:
    op = "scaled_mm_add"
    for name, tensor, dtype in (
        ("a", a, FP8),
        ("a_scale", a_scale, torch.float32),
        ("b", b, FP8),
        ("b_scale", b_scale, torch.float32),
        ("residual", residual, torch.bfloat16),
    ):
        check_choice(op, f"{name}.dtype", tensor.dtype, (dtype,))
        check_device(op, name, tensor, "a", a)
    if a.dim() < 1:
        raise ValueError(f"{op}: a has no dimension; accepted: [..., K]")
    if b.dim() != 2:
        raise ValueError(f"{op}: b has {b.dim()} dimensions; accepted: 2, [N, K]")
    n = b.shape[0]
    require_one_of(op, "b", b, [(n, a.shape[-1])])
    require_one_of(op, "residual", residual, [(*a.shape[:-1], n)])
    if not (one_element(a_scale) and one_element(b_scale)):
        require_one_of(
            op, "a_scale", a_scale, [(*a.shape[:-1], 1)], "or both scales of one element"
        )
        require_one_of(op, "b_scale", b_scale, [(n,), (n, 1)], "or both scales of one element")


def _empty(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    residual: Tensor,
    *,
    fast_sums: bool,
) -> Tensor:
    return torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)


def _reference(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    residual: Tensor,
    *,
    fast_sums: bool,
) -> Tensor:
    rows = a_scale if a_scale.numel() != 1 else a_scale.reshape(())
    value = (a.float() @ b.float().t()) * rows * b_scale.flatten()
    return to_contiguous((value + residual.float()).to(residual.dtype))


def _unavailable(device: torch.device) -> str | None:
    """Why cuBLASLt cannot run these products on a device, or None."""
    if device.type != "cuda":
        return f"needs a CUDA tensor, this one is on {device.type}"
    capability = platform.cuda_capability(device)
    if capability is None or capability[0] != 9:
        return f"needs a Hopper GPU (compute capability 9.0), here is {capability}"
    version = tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
    if version < (12, 9):
        return f"needs CUDA 12.9, torch was built with {torch.version.cuda}"
    return _no_cuda(device)


def _unsupported(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    residual: Tensor,
    *,
    fast_sums: bool,
) -> str | None:
    n, k = b.shape
    if not (known(n % MULTIPLE == 0) and known(k % MULTIPLE == 0) and known(k > 0)):
        return f"needs N and K multiples of {MULTIPLE}, they are {n} and {k}"
    if a.dim() > CUDA_MAX_DIMS:
        return f"takes at most {CUDA_MAX_DIMS} dimensions, here are {a.dim()}"
    return None


library.define(
    scaled_mm_add,
    "(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor residual, *, bool fast_sums=False) -> Tensor",
    check=_check,
    empty=_empty,
    reference=_reference,
    implementations=(
        Implementation(
            "cuda", lambda: cuda_op("scaled_mm_add"), _unavailable, _unsupported, direct=True
        ),
    ),
)
