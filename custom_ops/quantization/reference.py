"""The semantics of quantization in plain PyTorch: `custom_ops.scales`, step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.scales import (
    BLOCK,
    DEFAULT_MIN_AMAX,
    GROUPS_PER_WORD,
    code_max,
    divisor_of,
    to_contiguous,
    to_layout,
    uses_all_codes,
)


def group_quant(
    x: Tensor,
    group_size: int,
    *,
    scale_layout: str = "row_major",
    min_amax: float = DEFAULT_MIN_AMAX,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: str = "float32",
    min_scale: float = 0.0,
    scale_mode: str = "divide",
    code_mode: str = "divide",
) -> tuple[Tensor, Tensor]:
    """`custom_ops.group_quant`."""
    groups = x.unflatten(-1, (x.shape[-1] // group_size, group_size))
    amax = groups.abs().amax(-1)
    scale = scale_of(amax, min_amax, dtype, scale_format, min_scale, scale_mode)
    codes = encode(groups, scale.unsqueeze(-1), dtype, code_mode, scale_mode).flatten(-2)
    if scale_format == "ue8m0_packed":
        scale = pack_exponents(scale)
    return to_contiguous(codes), to_layout(scale, scale_layout)


def token_quant(
    x: Tensor,
    *,
    min_amax: float = DEFAULT_MIN_AMAX,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: str = "float32",
    min_scale: float = 0.0,
    scale_mode: str = "divide",
    code_mode: str = "divide",
) -> tuple[Tensor, Tensor]:
    """`custom_ops.token_quant`."""
    amax = x.abs().amax(-1, keepdim=True)
    scale = scale_of(amax, min_amax, dtype, scale_format, min_scale, scale_mode)
    return to_contiguous(encode(x, scale, dtype, code_mode, scale_mode)), to_contiguous(scale)


def tensor_quant(
    x: Tensor,
    *,
    min_amax: float = DEFAULT_MIN_AMAX,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: str = "float32",
    min_scale: float = 0.0,
    scale_mode: str = "divide",
    code_mode: str = "divide",
) -> tuple[Tensor, Tensor]:
    """`custom_ops.tensor_quant`."""
    amax = (x.abs().amax() if x.numel() else x.new_zeros(())).reshape(1)
    scale = scale_of(amax, min_amax, dtype, scale_format, min_scale, scale_mode)
    return to_contiguous(encode(x, scale, dtype, code_mode, scale_mode)), scale


def tensor_quant_static(
    x: Tensor,
    scale: Tensor,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    code_mode: str = "divide",
) -> Tensor:
    """`custom_ops.tensor_quant_static`."""
    return to_contiguous(encode(x, scale.reshape(()), dtype, code_mode))


def block_quant(
    x: Tensor,
    *,
    min_amax: float = DEFAULT_MIN_AMAX,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: str = "float32",
    min_scale: float = 0.0,
    scale_mode: str = "divide",
    code_mode: str = "divide",
) -> tuple[Tensor, Tensor]:
    """`custom_ops.block_quant`."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    amax = blocks.abs().amax((1, 3))
    scale = scale_of(amax, min_amax, dtype, scale_format, min_scale, scale_mode)
    each = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return to_contiguous(encode(x, each, dtype, code_mode, scale_mode)), to_contiguous(scale)


def token_quant_asymmetric(
    x: Tensor, *, min_scale: float = 0.0, scale_mode: str = "divide", code_mode: str = "divide"
) -> tuple[Tensor, Tensor, Tensor]:
    """`custom_ops.token_quant_asymmetric`."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    q, scale, zero = _asymmetric(x, low, high, min_scale, scale_mode, code_mode)
    return to_contiguous(q), to_contiguous(scale), to_contiguous(zero)


def tensor_quant_asymmetric(
    x: Tensor, *, min_scale: float = 0.0, scale_mode: str = "divide", code_mode: str = "divide"
) -> tuple[Tensor, Tensor, Tensor]:
    """`custom_ops.tensor_quant_asymmetric`."""
    values = x if x.numel() else x.new_zeros(1)
    low, high = values.amin().reshape(1), values.amax().reshape(1)
    q, scale, zero = _asymmetric(x, low, high, min_scale, scale_mode, code_mode)
    return to_contiguous(q), scale, zero


def tensor_quant_static_asymmetric(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, *, code_mode: str = "divide"
) -> Tensor:
    """`custom_ops.tensor_quant_static_asymmetric`."""
    zero = 0.0 if zero_point is None else zero_point.reshape(()).float()
    return to_contiguous(_codes_around(x, scale.reshape(()), zero, code_mode))


def _asymmetric(
    x: Tensor, low: Tensor, high: Tensor, min_scale: float, scale_mode: str, code_mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point of x, whose values lie from low to high."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    extent = high - low if scale_mode.endswith("_input") else high.float() - low.float()
    scale = divide_by(extent, 255.0, x.dtype, min_scale, scale_mode)
    below = low.float() / scale
    below = below.to(x.dtype).float() if scale_mode.endswith("_input") else below
    zero_point = (-128 - integers(below)).clamp(-128, 127)
    return _codes_around(x, scale, zero_point, code_mode), scale, zero_point.to(torch.int8)


def _codes_around(x: Tensor, scale: Tensor, zero_point: Tensor | float, code_mode: str) -> Tensor:
    codes = integers(quotients(x, scale, code_mode)) + zero_point
    return codes.clamp(-128, 127).to(torch.int8)


def scale_of(
    amax: Tensor,
    min_amax: float,
    dtype: torch.dtype,
    scale_format: str,
    min_scale: float,
    scale_mode: str,
) -> Tensor:
    """float32 scales from the largest magnitudes of groups, in the dtype of what is quantized."""
    bounded = amax.float().clamp(min=min_amax)
    scale = divide_by(bounded, divisor_of(dtype, scale_mode), amax.dtype, min_scale, scale_mode)
    return scale if scale_format == "float32" else power_of_two(scale)


def divide_by(
    extent: Tensor, number: float, x_dtype: torch.dtype, min_scale: float, scale_mode: str
) -> Tensor:
    """extent / number in float32, by scale_mode and with its lower bound."""
    # On CUDA, PyTorch divides by a Python number by multiplying with its reciprocal, which is one step
    # off for some values; a division by a tensor is IEEE division everywhere.
    divisor = torch.full((), number, dtype=torch.float32, device=extent.device)
    wide = extent.float()
    if scale_mode.endswith("_or_one"):
        wide = torch.where(wide > 0, wide, 1.0)
    scale = wide / divisor if scale_mode.startswith("divide") else wide * divisor.reciprocal()
    in_input = scale_mode.endswith("_input")
    if in_input:
        scale = scale.to(x_dtype).float()
    scale = scale.clamp(min=min_scale)
    return scale.to(x_dtype).float() if in_input else scale


def power_of_two(scale: Tensor) -> Tensor:
    """The least power of two, from 2^-127 up, that is not below a float32 scale; Inf and NaN stay."""
    bits = scale.view(torch.int32)
    up = (bits.clamp(max=0x7F800000) + 0x7FFFFF) & 0x7F800000  # carries into the exponent
    up = torch.where(bits <= 0x400000, 0x400000, up)  # 2^-127, which float32 has as a subnormal
    return torch.where(scale.isnan(), scale, up.view(torch.float32))


def pack_exponents(scale: Tensor) -> Tensor:
    """Powers of two [..., G] as int32 [..., ceil(G / 4)]: four exponents in an element."""
    exponents = (scale.view(torch.int32) >> 23).clamp(0, 255)
    exponents = torch.where(scale.isnan(), 255, exponents).to(torch.uint8)
    missing = -scale.shape[-1] % GROUPS_PER_WORD
    return torch.nn.functional.pad(exponents, (0, missing)).contiguous().view(torch.int32)


def encode(
    x: Tensor, scale: Tensor, dtype: torch.dtype, code_mode: str, scale_mode: str = "divide"
) -> Tensor:
    """Codes of x, given float32 scales that broadcast with it and how those were made."""
    least = -128.0 if uses_all_codes(scale_mode) else -code_max(dtype)
    v = quotients(x, scale, code_mode).clamp(least, code_max(dtype))
    return (integers(v) if dtype == torch.int8 else v).to(dtype)


def quotients(x: Tensor, scale: Tensor, code_mode: str) -> Tensor:
    """x / scale in float32, by code_mode."""
    if code_mode == "divide":
        return x.float() / scale
    if code_mode == "reciprocal":
        return x.float() * scale.reciprocal()
    return (x * scale.reciprocal().to(x.dtype)).float()


def integers(v: Tensor) -> Tensor:
    """The nearest integers, ties to even, and 0 for NaN, of which an int8 is whatever the machine makes."""
    return torch.where(v.isnan(), 0.0, v.round())
