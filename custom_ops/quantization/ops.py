"""Group quantization: the op and the argument checks that every op ending in it shares."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.implementation import cuda, triton
from custom_ops.library import require
from custom_ops.quantization import reference
from custom_ops.scales import (
    DEFAULT_MIN_AMAX,
    GROUP_SIZES,
    SCALE_LAYOUTS,
    activation_spec,
)

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16)


def check_activation(op: str, name: str, x: Tensor) -> None:
    """x must be a bfloat16 or float16 tensor of at least one dimension."""
    if x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(
            f"{op}: {name}.dtype is {x.dtype}; accepted: torch.bfloat16, torch.float16"
        )
    if x.dim() < 1:
        raise ValueError(f"{op}: {name} has no dimension; accepted: [..., K]")


def check_like(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Two tensors must agree in dtype, device and shape."""
    check_device(op, name, tensor, other_name, other)
    if tensor.dtype != other.dtype:
        raise ValueError(
            f"{op}: {name}.dtype is {tensor.dtype}; accepted: {other.dtype}, as {other_name}"
        )
    same = tensor.dim() == other.dim()
    require(same, lambda: _shapes(op, name, tensor, other_name, other))
    for size, other_size in zip(tensor.shape, other.shape, strict=True):
        require(size == other_size, lambda: _shapes(op, name, tensor, other_name, other))


def _shapes(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> str:
    return f"{op}: {name}.shape is {tuple(tensor.shape)}; accepted: {tuple(other.shape)}, as {other_name}"


def check_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Two tensors must be on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}; accepted: {other.device}, as {other_name}"
        )


def check_quant(
    op: str, name: str, x: Tensor, group_size: int, scale_layout: str, min_amax: float
) -> None:
    """The arguments of a group quantization of x along its last dimension."""
    if group_size not in GROUP_SIZES:
        raise ValueError(f"{op}: group_size is {group_size}; accepted: 64, 128")
    if scale_layout not in SCALE_LAYOUTS:
        raise ValueError(
            f"{op}: scale_layout is {scale_layout!r}; accepted: {', '.join(SCALE_LAYOUTS)}"
        )
    if not 0.0 <= min_amax < math.inf:
        raise ValueError(f"{op}: min_amax is {min_amax}; accepted: a finite number >= 0")
    require(
        x.shape[-1] % group_size == 0,
        lambda: (
            f"{op}: the last dimension of {name} is {x.shape[-1]}; accepted: a multiple of "
            f"group_size = {group_size}"
        ),
    )


def empty_quant(x: Tensor, group_size: int, scale_layout: str) -> tuple[Tensor, Tensor]:
    """Uninitialised (codes, scale) of a group quantization of x."""
    return activation_spec(group_size, scale_layout).empty(x.shape, x.device)


def group_quant(
    x: Tensor,
    group_size: int,
    *,
    scale_layout: str = "row_major",
    min_amax: float = DEFAULT_MIN_AMAX,
) -> tuple[Tensor, Tensor]:
    """Quantize to float8_e4m3fn with one float32 scale per token and group of channels.

    x: bfloat16 or float16, [..., K], any strides; K is a multiple of group_size.
    group_size: 64 or 128. scale_layout: "row_major", "column_major" or "column_major_tma"
    (`custom_ops.scales` gives the strides). min_amax: lower bound of a group's largest magnitude.

    Returns q, float8_e4m3fn, [..., K], contiguous, and scale, float32, [..., K // group_size], such that
    x is about q * scale:

        scale = max(amax |x|, min_amax) / 448
        q     = e4m3(clamp(x / scale, -448, 448))

    in float32 with IEEE division and ties to even. Every implementation equals the reference bit for bit;
    zero, subnormal, Inf and NaN groups are specified in `custom_ops.scales`. Eager PyTorch on a GPU computes
    `amax / 448.0` as a product with the rounded reciprocal; it divides by a 0-d tensor on the GPU.

    Raises ValueError for another dtype, group size, layout, a negative min_amax, or a K that is not a
    multiple of group_size. Source: the activation quantization of DeepSeek-V3 (arXiv:2412.19437, 3.3).
    """
    return torch.ops.custom_ops.group_quant(
        x, group_size, scale_layout=scale_layout, min_amax=min_amax
    )


def _check(x: Tensor, group_size: int, *, scale_layout: str, min_amax: float) -> None:
    check_activation("group_quant", "x", x)
    check_quant("group_quant", "x", x, group_size, scale_layout, min_amax)


def _empty(
    x: Tensor, group_size: int, *, scale_layout: str, min_amax: float
) -> tuple[Tensor, Tensor]:
    return empty_quant(x, group_size, scale_layout)


library.define(
    group_quant,
    "(Tensor x, int group_size, *, str scale_layout='row_major', float min_amax=1e-10)"
    " -> (Tensor q, Tensor scale)",
    check=_check,
    empty=_empty,
    reference=reference.group_quant,
    implementations=(
        cuda("group_quant"),
        triton("custom_ops.quantization.triton_kernels:group_quant"),
    ),
)
