"""The RMSNorm family in Triton: one kernel, one program per row.

The row is a tile [groups, GROUP], so that the norm and the quantization share it. The order of the sum
depends on the hidden size and the group size alone: a row gives the same bits in any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.platform import on_device
from custom_ops.quantization.ops import empty_quant
from custom_ops.quantization.triton_kernels import scale_steps
from custom_ops.scales import as_rows
from custom_ops.triton_math import (
    native_fp8,
    quantize_groups,
    round_to,
    to_float32,
)

# The longest row that stays in registers between the two passes; a longer one is read twice.
MAX_TILE = 16384
# Groups of the tile when nothing is quantized.
GROUP = 128


@triton.jit
def _load(x_ptr, residual_ptr, offsets, mask, ADD: tl.constexpr):
    """The values that are normalized, in their own dtype: x, or the rounded sum with the residual."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
        x = round_to(to_float32(x) + to_float32(residual), x_ptr.dtype.element_ty)
    return x


@triton.jit
def _finish(
    x,
    rstd,
    weight_ptr,
    out_ptr,
    residual_out_ptr,
    scale_ptr,
    offsets,
    mask,
    group,
    in_row,
    row,
    size,
    scale_row,
    scale_group,
    min_amax,
    WEIGHT_MODE: tl.constexpr,
    ADD: tl.constexpr,
    QUANT: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """Normalize one tile of a row and store it, quantized or not, with the residual or not."""
    dtype: tl.constexpr = x.dtype
    if ADD:
        tl.store(residual_out_ptr + row * size + offsets, x, mask=mask)
    weight = to_float32(tl.load(weight_ptr + offsets, mask=mask, other=0.0))
    y = to_float32(x) * rstd
    if WEIGHT_MODE == "rounded":
        y = to_float32(round_to(y, dtype)) * weight
    elif WEIGHT_MODE == "float32":
        y = y * weight
    else:
        y = y * (1.0 + weight)
    out = round_to(y, dtype)
    if QUANT:
        scale, codes = quantize_groups(to_float32(out), min_amax, NATIVE_FP8)
        tl.store(out_ptr + row * size + offsets, codes, mask=mask)
        tl.store(scale_ptr + row * scale_row + group * scale_group, scale, mask=in_row)
    else:
        tl.store(out_ptr + row * size + offsets, out, mask=mask)


@triton.jit(do_not_specialize=["scale_row", "scale_group"])
def _rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    residual_out_ptr,
    scale_ptr,
    size,
    x_row,
    residual_row,
    scale_row,
    scale_group,
    eps,
    min_amax,
    WEIGHT_MODE: tl.constexpr,
    ADD: tl.constexpr,
    QUANT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    ONE_TILE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_row
    residual_ptr += row * residual_row
    tile_group = tl.arange(0, GROUPS)
    tile = tile_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if ONE_TILE:
        mask = tile < size
        x = _load(x_ptr, residual_ptr, tile, mask, ADD)
        v = to_float32(x)
        total = tl.sum(tl.sum(v * v, axis=1), axis=0)
    else:
        squares = tl.zeros((GROUPS, GROUP), tl.float32)
        for start in range(0, size, GROUPS * GROUP):
            offsets = start + tile
            v = to_float32(_load(x_ptr, residual_ptr, offsets, offsets < size, ADD))
            squares += v * v
        total = tl.sum(tl.sum(squares, axis=1), axis=0)
    # Scalars as float32 whatever type they come in: an eps in float64 would make the sum float64.
    mean = tl.div_rn(total, tl.full((), size, tl.float32))
    rstd = tl.rsqrt(mean + tl.full((), eps, tl.float32))
    if ONE_TILE:
        _finish(
            x, rstd, weight_ptr, out_ptr, residual_out_ptr, scale_ptr, tile, mask, tile_group,
            tile_group * GROUP < size, row, size, scale_row, scale_group, min_amax, WEIGHT_MODE, ADD,
            QUANT, NATIVE_FP8,
        )  # fmt: skip
    else:
        for start in range(0, size, GROUPS * GROUP):
            offsets = start + tile
            mask = offsets < size
            group = start // GROUP + tile_group
            x = _load(x_ptr, residual_ptr, offsets, mask, ADD)
            _finish(
                x, rstd, weight_ptr, out_ptr, residual_out_ptr, scale_ptr, offsets, mask, group,
                group * GROUP < size, row, size, scale_row, scale_group, min_amax, WEIGHT_MODE, ADD,
                QUANT, NATIVE_FP8,
            )  # fmt: skip


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    weight_mode: str,
    out: Tensor,
    residual_out: Tensor | None,
    scale: Tensor | None = None,
    scale_layout: str = "row_major",
    min_amax: float = 0.0,
    group_size: int = GROUP,
) -> None:
    rows = as_rows(x)
    residuals = rows if residual is None else as_rows(residual)
    size = x.shape[-1]
    tile = max(group_size, min(triton.next_power_of_2(size), MAX_TILE))
    with on_device(x):
        _rms_norm[(rows.shape[0],)](
            rows,
            residuals,
            weight.contiguous(),
            out if scale is None else out.view(torch.uint8),
            out if residual_out is None else residual_out,
            out if scale is None else scale,
            size,
            rows.stride(0),
            residuals.stride(0),
            *((0, 0) if scale is None else scale_steps(scale, scale_layout)),
            eps,
            min_amax,
            WEIGHT_MODE=weight_mode,
            ADD=residual is not None,
            QUANT=scale is not None,
            GROUP=group_size,
            GROUPS=tile // group_size,
            ONE_TILE=size <= tile,
            NATIVE_FP8=native_fp8(x),
            num_warps=min(max(tile // 1024, 1), 16),
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, weight_mode: str) -> Tensor:
    """As `custom_ops.rms_norm`. Takes any row pitch; an input strided along hidden_size is copied."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, eps, weight_mode, out, None)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, weight_mode: str
) -> tuple[Tensor, Tensor]:
    """As `custom_ops.add_rms_norm`; strides as in `rms_norm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_out = torch.empty_like(out)
    _launch(x, residual, weight, eps, weight_mode, out, residual_out)
    return out, residual_out


def rms_norm_group_quant(
    x: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    *,
    weight_mode: str,
    scale_layout: str,
    min_amax: float,
) -> tuple[Tensor, Tensor]:
    """As `custom_ops.rms_norm_group_quant`; strides as in `rms_norm`."""
    q, scale = empty_quant(x, group_size, scale_layout)
    quant = (scale, scale_layout, min_amax, group_size)
    _launch(x, None, weight, eps, weight_mode, q, None, *quant)
    return q, scale


def add_rms_norm_group_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    *,
    weight_mode: str,
    scale_layout: str,
    min_amax: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `custom_ops.add_rms_norm_group_quant`; strides as in `rms_norm`."""
    q, scale = empty_quant(x, group_size, scale_layout)
    residual_out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    quant = (scale, scale_layout, min_amax, group_size)
    _launch(x, residual, weight, eps, weight_mode, q, residual_out, *quant)
    return q, scale, residual_out
