"""Device functions of quantization: scales and codes as `custom_ops.scales` says, for any kernel.

A tile is [groups, channels] of T, the dtype of what is quantized; a scale is float32 [groups]. Magnitudes
travel as the integers that their bits are, which compare as the floats do, with NaN above all: a maximum
keeps it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.scales import divisor_of
from custom_ops.triton_math import INTERPRET, encode_e4m3, native_fp8, round_to, to_float32

# Between these scales, dividing by the reciprocal and correcting by the residual is exact: the scale and its
# reciprocal are normal, and so is the residual of every quotient that does not round to code 0.
_LEAST_EXACT = tl.constexpr(2.0**-70)
_LARGEST_EXACT = tl.constexpr(2.0**120)
_INFINITY_BITS = tl.constexpr(0x7F800000)
# Added to |v| < 2^22, it leaves the nearest integer, ties to even, in the low bits of the sum.
_ROUNDING = tl.constexpr(12582912.0)
_ROUNDING_BITS = tl.constexpr(0x4B400000)


def code_constants(
    x: Tensor, dtype: torch.dtype, code_mode: str, scale_mode: str = "divide"
) -> dict[str, Any]:
    """What a kernel has to know at compile time to make codes of x."""
    return {
        "CODE_MAX": divisor_of(dtype, scale_mode),
        "INT8": dtype == torch.int8,
        "CODE_MODE": code_mode,
        "NATIVE_FP8": native_fp8(x),
    }


def codes_pointer(q: Tensor) -> Tensor:
    """Codes as kernels write them: FP8 as its bytes."""
    return q if q.dtype == torch.int8 else q.view(torch.uint8)


@triton.jit
def magnitude_bits(x):
    """|x| of a tile as the bits of its float32 value."""
    return to_float32(x).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def power_of_two(scale):
    """The least power of two, from 2^-127 up, that is not below a scale; Inf and NaN stay."""
    bits = scale.to(tl.int32, bitcast=True)
    up = (tl.minimum(bits, _INFINITY_BITS) + 0x7FFFFF) & _INFINITY_BITS
    up = tl.where(bits <= 0x400000, 0x400000, up)
    return tl.where(bits > _INFINITY_BITS, scale, up.to(tl.float32, bitcast=True))


@triton.jit
def divide_by(extent, NUMBER: tl.constexpr, min_scale, T: tl.constexpr, SCALE_MODE: tl.constexpr):
    """float32 extents [groups] / NUMBER by SCALE_MODE, and their lower bound."""
    number = tl.full(extent.shape, NUMBER, tl.float32)
    if SCALE_MODE == "divide_or_one" or SCALE_MODE == "reciprocal_or_one":
        extent = tl.where(extent > 0.0, extent, 1.0)
    DIVIDES: tl.constexpr = SCALE_MODE == "divide" or SCALE_MODE == "divide_or_one"
    DIVIDES_INPUT: tl.constexpr = SCALE_MODE == "divide_input" or SCALE_MODE == "divide_full_input"
    TIMES_INPUT: tl.constexpr = (
        SCALE_MODE == "reciprocal_input" or SCALE_MODE == "reciprocal_full_input"
    )
    if DIVIDES or DIVIDES_INPUT:
        scale = tl.div_rn(extent, number)
    else:
        scale = extent * tl.div_rn(tl.full(extent.shape, 1.0, tl.float32), number)
    if DIVIDES_INPUT or TIMES_INPUT:
        scale = to_float32(round_to(scale, T))
    bound = tl.full(extent.shape, min_scale, tl.float32)
    scale = tl.where(scale < bound, bound, scale)  # NaN is not below, and stays
    if DIVIDES_INPUT or TIMES_INPUT:
        scale = to_float32(round_to(scale, T))
    return scale


@triton.jit
def scale_of(
    largest,
    min_amax,
    min_scale,
    T: tl.constexpr,
    CODE_MAX: tl.constexpr,
    SCALE_MODE: tl.constexpr,
    SCALE_FORMAT: tl.constexpr,
):
    """float32 scales [groups] from the largest magnitudes of the groups."""
    lowest = tl.full(largest.shape, min_amax, tl.float32).to(tl.int32, bitcast=True)
    amax = tl.maximum(largest, lowest).to(tl.float32, bitcast=True)
    scale = divide_by(amax, CODE_MAX, min_scale, T, SCALE_MODE)
    if SCALE_FORMAT != "float32":
        scale = power_of_two(scale)
    return scale


@triton.jit
def _divide(v, scale, STATIC: tl.constexpr):
    """v / scale, correctly rounded wherever a code depends on it."""
    divisor = tl.broadcast_to(scale[:, None], v.shape)
    # By a scale that has nothing to do with v a quotient may overflow, and the correction of that is NaN.
    if INTERPRET or STATIC:
        quotient = tl.div_rn(v, divisor)
    else:
        exact = (scale >= _LEAST_EXACT) & (scale <= _LARGEST_EXACT)
        if tl.min(exact.to(tl.int32), axis=0) != 0:
            one = tl.full(scale.shape, 1.0, tl.float32)
            reciprocal = tl.broadcast_to(tl.div_rn(one, scale)[:, None], v.shape)
            guess = v * reciprocal
            # The residual with its sign turned twice, which keeps -0 as -0. By a product: tl's unary
            # minus is 0 - v, which is +0 for both zeros.
            residual = tl.fma(guess, divisor, v * -1.0)
            quotient = tl.fma(residual, reciprocal * -1.0, guess)
        else:
            quotient = tl.div_rn(v, divisor)
    return quotient


@triton.jit
def quotient_of(x, scale, CODE_MODE: tl.constexpr, STATIC: tl.constexpr):
    """x / scale in float32 by CODE_MODE."""
    v = to_float32(x)
    if CODE_MODE == "divide":
        v = _divide(v, scale, STATIC)
    else:
        reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        if CODE_MODE == "reciprocal":
            v = v * reciprocal[:, None]
        else:
            # A product of two 16-bit floats is exact in float32: one rounding to T, as in eager.
            v = v * to_float32(round_to(reciprocal, x.dtype))[:, None]
            v = to_float32(round_to(v, x.dtype))
    return v


@triton.jit
def nearest_integer(v):
    """float32 to the nearest int32 within +-1000, ties to even; 0 for NaN."""
    bounded = tl.minimum(tl.maximum(v, -1000.0), 1000.0)
    integer = (bounded + _ROUNDING).to(tl.int32, bitcast=True) - _ROUNDING_BITS
    return tl.where(v != v, 0, integer)


@triton.jit
def codes_of(
    x,
    scale,
    CODE_MAX: tl.constexpr,
    INT8: tl.constexpr,
    CODE_MODE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    STATIC: tl.constexpr = False,
):
    """Codes of a tile: int8, or the bytes of float8_e4m3fn. STATIC: the scale has nothing to do with x."""
    v = quotient_of(x, scale, CODE_MODE, STATIC)
    if INT8:
        integer = nearest_integer(v)
        LEAST: tl.constexpr = -128 if CODE_MAX > 127.0 else -127
        codes = tl.minimum(tl.maximum(integer, LEAST), 127).to(tl.int8)
    else:
        codes = encode_e4m3(v, NATIVE_FP8)
    return codes


@triton.jit
def store_scale(
    scale_ptr, row, group, groups, scale_row, scale_group, scale, mask, SCALE_FORMAT: tl.constexpr
):
    """Store the scales of some groups; packed, each is a byte of its int32, and the last one adds zeros."""
    if SCALE_FORMAT == "ue8m0_packed":
        bytes_ptr = scale_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
        bytes_ptr += (row * scale_row + (group // 4) * scale_group) * 4
        exponent = tl.minimum(scale.to(tl.int32, bitcast=True) >> 23, 255).to(tl.uint8)
        tl.store(bytes_ptr + group % 4, exponent, mask=mask)
        for after in tl.static_range(1, 4):
            padding = mask & (group == groups - 1) & (group % 4 + after < 4)
            tl.store(bytes_ptr + group % 4 + after, tl.zeros_like(exponent), mask=padding)
    else:
        tl.store(scale_ptr + row * scale_row + group * scale_group, scale, mask=mask)
