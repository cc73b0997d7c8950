"""Device functions that the Triton kernels share: exact roundings, exact division, FP8 codes.

The Triton interpreter (3.6, 3.7) truncates float32 -> bfloat16, rounds float8 ties away from zero, does
not saturate, has no fused multiply-add and no libdevice. Under it (`INTERPRET`) the same results come
from integer arithmetic, so that its output can be compared bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from custom_ops import platform

INTERPRET = tl.constexpr(platform.triton_interpret())
_POW2_120 = tl.constexpr(2.0**120)


def native_fp8(x: Tensor) -> bool:
    """Whether the device converts to and from float8_e4m3fn itself (compute capability 8.9 and newer)."""
    return x.device.type == "cuda" and (platform.cuda_capability(x.device) or (0, 0)) >= (8, 9)


@triton.jit
def to_float32(x):
    """The float32 value of a bfloat16 or float16 tile."""
    if INTERPRET and x.dtype == tl.bfloat16:
        v = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        v = x.to(tl.float32)
    return v


@triton.jit
def round_to(v, dtype: tl.constexpr):
    """float32 to dtype, to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40  # rounding would carry some NaNs over into Inf or zero
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        x = tl.where(nan, quiet, rounded).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        x = v.to(dtype)
    return x


@triton.jit
def exp(v):
    """exp to about one float32 step; tl.exp's fast exponential is off by more for large arguments."""
    return tl.exp(v) if INTERPRET else libdevice.exp(v)


@triton.jit
def encode_e4m3(v, NATIVE_FP8: tl.constexpr):
    """float32 to float8_e4m3fn codes as uint8: to nearest even, saturating, NaN stays NaN."""
    if NATIVE_FP8:
        codes = v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = v.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Normal codes: keep three bits of the mantissa, and move the exponent bias from 127 to 7.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 codes are multiples of 2^-9, which is the float32 step at 2^14.
        shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
        subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
        codes = tl.minimum(tl.where(magnitude < 0x3C800000, subnormal, normal), 0x7E)
        codes = tl.where(magnitude > 0x7F800000, 0x7F, codes)
        codes = (codes | ((bits >> 24) & 0x80)).to(tl.uint8)
    return codes


@triton.jit
def decode_e4m3(codes):
    """float8_e4m3fn codes in uint8 to float32, exactly."""
    bits = codes.to(tl.int32)
    magnitude = bits & 0x7F
    value = ((magnitude << 20) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True) * _POW2_120
    return tl.where(magnitude == 0x7F, float("nan"), value)
