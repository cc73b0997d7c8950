"""Quantization in float64 NumPy, where every float32 operation is exact before it is rounded once.

A quotient or product of two float32 numbers that is rounded to float64 and then to float32 is the one that
is rounded to float32 at once: 53 bits are more than twice 24 and two.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]
# Every finite code of float8_e4m3fn from 0 up.
CODES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()


def to_float32(a: Array) -> Array:
    return a.astype(np.float32).astype(np.float64)


def to_dtype(a: Array, dtype: torch.dtype) -> Array:
    """float32 values rounded to bfloat16 or float16."""
    if dtype == torch.float16:
        return a.astype(np.float32).astype(np.float16).astype(np.float64)
    mantissa, exponent = np.frexp(a)
    digits = np.where(exponent >= -125, 8, 8 + exponent + 125)  # fewer where it is subnormal
    rounded = np.ldexp(np.rint(np.ldexp(mantissa, digits)), exponent - digits)
    rounded = np.where(np.abs(rounded) >= 2.0**128, np.copysign(np.inf, a), rounded)
    return np.where(np.isfinite(a), rounded, a)


def power_of_two(scale: Array) -> Array:
    mantissa, exponent = np.frexp(scale)
    up = np.ldexp(1.0, np.maximum(np.where(mantissa == 0.5, exponent - 1, exponent), -127))
    up = np.where(scale == 0, 2.0**-127, up)
    return np.where(np.isfinite(scale), up, scale)


def scales(
    amax: Array, x_dtype: torch.dtype, *, min_amax, dtype, scale_format, min_scale, scale_mode
):
    largest = 448.0 if dtype == torch.float8_e4m3fn else 127.5 if "full" in scale_mode else 127.0
    amax = np.maximum(amax, np.float64(np.float32(min_amax)))  # keeps NaN
    factor = to_float32(np.float64(1 / largest))
    if scale_mode.endswith("_or_one"):
        amax = np.where(amax > 0, amax, 1.0)
    scale = to_float32(amax / largest if scale_mode.startswith("divide") else amax * factor)
    in_input = scale_mode.endswith("_input")
    scale = to_dtype(scale, x_dtype) if in_input else scale
    scale = np.maximum(scale, np.float64(np.float32(min_scale)))
    scale = to_dtype(scale, x_dtype) if in_input else scale
    return scale if scale_format == "float32" else power_of_two(scale)


def quotients(x: Array, scale: Array, x_dtype: torch.dtype, code_mode: str) -> Array:
    if code_mode == "divide":
        return to_float32(x / scale)
    reciprocal = to_float32(1 / scale)
    if code_mode == "reciprocal":
        return to_float32(x * reciprocal)
    return to_dtype(to_float32(x * to_dtype(reciprocal, x_dtype)), x_dtype)


def codes(quotient: Array, dtype: torch.dtype, scale_mode: str = "divide") -> Array:
    """The values of the nearest codes, ties to even, saturating; NaN is NaN, or 0 in int8."""
    if dtype == torch.int8:
        least = -128 if "full" in scale_mode else -127
        return np.nan_to_num(np.rint(np.clip(quotient, least, 127)), nan=0.0)
    magnitude = np.minimum(np.abs(quotient), 448.0)
    above = np.clip(np.searchsorted(CODES, magnitude), 0, 126)
    below = np.maximum(above - 1, 0)
    up, down = CODES[above] - magnitude, magnitude - CODES[below]
    take_up = (up < down) | ((up == down) & (above % 2 == 0))
    value = np.copysign(CODES[np.where(take_up, above, below)], quotient)
    return np.where(np.isnan(quotient), np.nan, value)
