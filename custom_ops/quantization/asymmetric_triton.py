"""`token_quant_asymmetric` in Triton: a program quantizes a token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.platform import on_device
from custom_ops.quantization.triton_codes import divide_by, nearest_integer, quotient_of
from custom_ops.quantization.triton_kernels import MAX_TILE
from custom_ops.scales import as_rows, quant_spec
from custom_ops.triton_math import round_to, to_float32


@triton.jit
def _larger(a, b):
    """The larger of two, or NaN if one is NaN."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def _extent(v, lane, size):
    """The largest value of a tile, at least 0, and of its negatives; NaN if there is one."""
    inside = tl.where(lane < size, v, 0.0)
    high = tl.reduce(inside, 1, _larger)
    low = tl.reduce(inside * -1.0, 1, _larger)
    zero = tl.zeros_like(high)
    return _larger(high, zero), _larger(low, zero)


@triton.jit
def _token(
    x_ptr, q_ptr, scale_ptr, zero_ptr, size, x_row, min_scale,
    TILE: tl.constexpr, ONE_TILE: tl.constexpr, SCALE_MODE: tl.constexpr, CODE_MODE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_row
    q_ptr += row * size
    T: tl.constexpr = x_ptr.dtype.element_ty
    lane = tl.arange(0, TILE)[None, :]
    x = tl.load(x_ptr + lane, mask=lane < size, other=0.0)  # all of the token with ONE_TILE
    high, minus_low = _extent(to_float32(x), lane, size)
    if not ONE_TILE:
        for start in range(TILE, size, TILE):
            at = start + lane
            v = to_float32(tl.load(x_ptr + at, mask=at < size, other=0.0))
            tile_high, tile_minus_low = _extent(v, at, size)
            high = _larger(high, tile_high)
            minus_low = _larger(minus_low, tile_minus_low)
    extent = high + minus_low
    if SCALE_MODE == "divide_input" or SCALE_MODE == "reciprocal_input":
        extent = to_float32(round_to(extent, T))
    scale = divide_by(extent, 255.0, min_scale, T, SCALE_MODE)
    below = tl.div_rn(minus_low * -1.0, scale)
    if SCALE_MODE == "divide_input" or SCALE_MODE == "reciprocal_input":
        below = to_float32(round_to(below, T))
    zero = -128 - nearest_integer(below)
    zero = tl.minimum(tl.maximum(zero, -128), 127)
    end = TILE if ONE_TILE else size
    for start in range(0, end, TILE):
        at = start + lane
        if not ONE_TILE:
            x = tl.load(x_ptr + at, mask=at < size, other=0.0)
        codes = nearest_integer(quotient_of(x, scale, CODE_MODE, True)) + zero[:, None]
        codes = tl.minimum(tl.maximum(codes, -128), 127).to(tl.int8)
        tl.store(q_ptr + at, codes, mask=at < size)
    tl.store(scale_ptr + row + tl.arange(0, 1), scale)
    tl.store(zero_ptr + row + tl.arange(0, 1), zero.to(tl.int8))


def token_quant_asymmetric(
    x: Tensor, *, min_scale: float, scale_mode: str, code_mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As `custom_ops.token_quant_asymmetric`. Takes any row pitch; an input strided along K is copied."""
    q, scale = quant_spec(torch.int8, (1, None)).empty(x.shape, x.device)
    zero_point = torch.empty(scale.shape, dtype=torch.int8, device=x.device)
    rows = as_rows(x)
    size = x.shape[-1]
    tile = min(triton.next_power_of_2(size), MAX_TILE)
    with on_device(x):
        _token[(scale.numel(),)](
            rows,
            q,
            scale,
            zero_point,
            size,
            rows.stride(0),
            min_scale,
            TILE=tile,
            ONE_TILE=size <= tile,
            SCALE_MODE=scale_mode,
            CODE_MODE=code_mode,
            num_warps=min(max(tile // 1024, 1), 16),
        )
    return q, scale, zero_point
