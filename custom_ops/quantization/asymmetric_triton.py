"""`token_quant_asymmetric` in Triton, of a tensor or of what a gated activation makes of two: a program a token."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.platform import on_device
from custom_ops.quantization.triton_codes import divide_by, nearest_integer, quotient_of
from custom_ops.quantization.triton_kernels import MAX_TILE, Inputs, load_values
from custom_ops.scales import quant_spec
from custom_ops.triton_math import round_to, to_float32


@triton.jit
def larger(a, b):
    """The larger of two, or NaN if one is NaN."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def affine_of(high, minus_low, min_scale, T: tl.constexpr, SCALE_MODE: tl.constexpr):
    """Scales, float32, and zero points, int32, of tokens by their largest value and that of their negatives."""
    nothing = tl.zeros_like(high)
    high = larger(high, nothing)
    minus_low = larger(minus_low, nothing)
    extent = high + minus_low
    if SCALE_MODE == "divide_input" or SCALE_MODE == "reciprocal_input":
        extent = to_float32(round_to(extent, T))
    scale = divide_by(extent, 255.0, min_scale, T, SCALE_MODE)
    below = tl.div_rn(minus_low * -1.0, scale)
    if SCALE_MODE == "divide_input" or SCALE_MODE == "reciprocal_input":
        below = to_float32(round_to(below, T))
    zero = -128 - nearest_integer(below)
    return scale, tl.minimum(tl.maximum(zero, -128), 127)


@triton.jit
def affine_codes_of(x, scale, zero, CODE_MODE: tl.constexpr):
    """int8 codes of a tile."""
    codes = nearest_integer(quotient_of(x, scale, CODE_MODE, True)) + zero[:, None]
    return tl.minimum(tl.maximum(codes, -128), 127).to(tl.int8)


@triton.jit
def _token(
    gate_ptr, up_ptr, q_ptr, scale_ptr, zero_ptr,
    size, gate_row, up_row, gate_col, up_col, alpha, limit, min_scale,
    GATE: tl.constexpr, TILE: tl.constexpr, ONE_TILE: tl.constexpr,
    SCALE_MODE: tl.constexpr, CODE_MODE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    gate_ptr += row * gate_row
    up_ptr += row * up_row
    q_ptr += row * size
    T: tl.constexpr = gate_ptr.dtype.element_ty
    lane = tl.arange(0, TILE)[None, :]
    # All of the token with ONE_TILE. What lies past the end was made of zeros, and is zero.
    x = load_values(
        gate_ptr, up_ptr, lane * gate_col, lane * up_col, lane < size, alpha, limit, GATE
    )
    high = tl.reduce(to_float32(x), 1, larger)
    minus_low = tl.reduce(to_float32(x) * -1.0, 1, larger)
    if not ONE_TILE:
        for start in range(TILE, size, TILE):
            at = start + lane
            v = to_float32(
                load_values(
                    gate_ptr, up_ptr, at * gate_col, at * up_col, at < size, alpha, limit, GATE
                )
            )
            high = larger(high, tl.reduce(v, 1, larger))
            minus_low = larger(minus_low, tl.reduce(v * -1.0, 1, larger))
    scale, zero = affine_of(high, minus_low, min_scale, T, SCALE_MODE)
    end = TILE if ONE_TILE else size
    for start in range(0, end, TILE):
        at = start + lane
        if not ONE_TILE:
            x = load_values(
                gate_ptr, up_ptr, at * gate_col, at * up_col, at < size, alpha, limit, GATE
            )
        tl.store(q_ptr + at, affine_codes_of(x, scale, zero, CODE_MODE), mask=at < size)
    tl.store(scale_ptr + row + tl.arange(0, 1), scale)
    tl.store(zero_ptr + row + tl.arange(0, 1), zero.to(tl.int8))


def empty_affine(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point of x."""
    q, scale = quant_spec(torch.int8, (1, None)).empty(x.shape, x.device)
    return q, scale, torch.empty(scale.shape, dtype=torch.int8, device=x.device)


def per_token_asymmetric(
    gate: str, *args: Any, min_scale: float, scale_mode: str, code_mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`token_quant_asymmetric` of the gated activation; which inputs are copied, `Inputs` says."""
    inputs = Inputs(gate, args)
    q, scale, zero_point = empty_affine(inputs.x)
    size = inputs.x.shape[-1]
    tile = min(triton.next_power_of_2(size), MAX_TILE)
    with on_device(inputs.x):
        _token[(scale.numel(),)](
            *inputs.tensors,
            q,
            scale,
            zero_point,
            size,
            *inputs.strides,
            *inputs.scalars,
            min_scale,
            GATE=gate,
            TILE=tile,
            ONE_TILE=size <= tile,
            SCALE_MODE=scale_mode,
            CODE_MODE=code_mode,
            num_warps=min(max(tile // 1024, 1), 16),
        )
    return q, scale, zero_point


token_quant_asymmetric = partial(per_token_asymmetric, "none")
