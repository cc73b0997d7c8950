"""Asymmetric quantization to int8, per token and per tensor: a scale and a zero point.

They come of the least and the largest value, or are given.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.implementation import cuda, triton
from custom_ops.quantization import reference
from custom_ops.quantization.checks import (
    check_activation,
    check_channels,
    check_codes,
    check_given,
    check_scales,
)
from custom_ops.quantization.fused import Scheme
from custom_ops.scales import quant_spec


def token_quant_asymmetric(
    x: Tensor, *, min_scale: float = 0.0, scale_mode: str = "divide", code_mode: str = "divide"
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize to all 256 codes of int8, with one scale and one zero point per token.

    x: bfloat16 or float16, [..., K], any strides, K >= 1. The keywords: see the module
    `custom_ops.quantization.ops`. Returns q, int8, [..., K], scale, float32, [..., 1], and zero_point, int8,
    [..., 1], all contiguous, such that x is about (q - zero_point) * scale:

        low, high  = min(amin x, 0), max(amax x, 0)
        scale      = (high - low) / 255, by scale_mode
        zero_point = clamp(-128 - round(fl(low / scale)), -128, 127)
        q          = clamp(round(v) + zero_point, -128, 127)        v of x and scale by code_mode

    In the modes ending in _input, high - low and low / scale are rounded to the dtype of x too, which is what torchao's
    asymmetric int8 activations compute, with min_scale 2^-23 and code_mode "reciprocal_input".
    round() goes to nearest even, and is 0 for NaN: a token of zeros has scale min_scale, zero point and codes
    -128. Every implementation equals the reference bit for bit. Raises ValueError for another dtype, K of 0 or
    another value of a keyword.
    """
    return torch.ops.custom_ops.token_quant_asymmetric(
        x, min_scale=min_scale, scale_mode=scale_mode, code_mode=code_mode
    )


def tensor_quant_asymmetric(
    x: Tensor, *, min_scale: float = 0.0, scale_mode: str = "divide", code_mode: str = "divide"
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize to all 256 codes of int8, with one scale and one zero point for all of a tensor.

    x: bfloat16 or float16, [..., K], any strides. The keywords: see the module `custom_ops.quantization.ops`. Returns
    q, int8, [..., K], contiguous, scale, float32, [1], and zero_point, int8, [1], as `token_quant_asymmetric` of one
    long token; a tensor without elements counts as a zero.

    torchao's asymmetric int8 activations per tensor are min_scale 2^-23, scale_mode "divide_input" or
    "reciprocal_input" and code_mode "reciprocal". Two passes over memory: the scale is known after the last element.
    Every implementation equals the reference bit for bit. Raises ValueError for another dtype or value of a keyword.
    """
    return torch.ops.custom_ops.tensor_quant_asymmetric(
        x, min_scale=min_scale, scale_mode=scale_mode, code_mode=code_mode
    )


def tensor_quant_static_asymmetric(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, *, code_mode: str = "divide"
) -> Tensor:
    """Quantize to all 256 codes of int8, with one scale and one zero point for all of a tensor, given.

    x: bfloat16 or float16, [..., K], any strides. scale: float32, and zero_point: int8 or int32, or None for 0; of one
    element each, on the device of x. code_mode: see the module `custom_ops.quantization.ops`. Returns q, int8,
    [..., K], contiguous:

        q = clamp(fl(round(v) + zero_point), -128, 127)        v of x and scale by code_mode

    round() goes to nearest even before the zero point is added, and is 0 for NaN. torchao's static asymmetric int8
    activations, and the symmetric ones, without a zero point, are code_mode "reciprocal". Every implementation equals
    the reference bit for bit. Raises ValueError for another dtype, a scale or a zero point that is not one
    number, or another value of a keyword.
    """
    return torch.ops.custom_ops.tensor_quant_static_asymmetric(
        x, scale, zero_point, code_mode=code_mode
    )


def _check_tensor(
    op: str, name: str, x: Tensor, *, min_scale: float, scale_mode: str, code_mode: str
) -> None:
    check_activation(op, name, x)
    check_scales(op, "float32", ("float32",), 0.0, min_scale, scale_mode, full=False)
    check_codes(op, torch.int8, code_mode)


def _check(
    op: str, name: str, x: Tensor, *, min_scale: float, scale_mode: str, code_mode: str
) -> None:
    _check_tensor(op, name, x, min_scale=min_scale, scale_mode=scale_mode, code_mode=code_mode)
    check_channels(op, name, x)


def _check_static(
    op: str, name: str, x: Tensor, scale: Tensor, zero_point: Tensor | None, *, code_mode: str
) -> None:
    check_activation(op, name, x)
    check_codes(op, torch.int8, code_mode)
    check_given(op, "scale", scale, name, x, (torch.float32,))
    if zero_point is not None:
        check_given(op, "zero_point", zero_point, name, x, (torch.int8, torch.int32))


def _empty_of(x: Tensor, group_shape: tuple[int | None, int | None]) -> tuple[Tensor, ...]:
    q, scale = quant_spec(torch.int8, group_shape).empty(x.shape, x.device)
    return q, scale, torch.empty(scale.shape, dtype=torch.int8, device=x.device)


def _empty(x: Tensor, *, min_scale: float, scale_mode: str, code_mode: str) -> tuple[Tensor, ...]:
    return _empty_of(x, (1, None))


def _empty_tensor(
    x: Tensor, *, min_scale: float, scale_mode: str, code_mode: str
) -> tuple[Tensor, ...]:
    return _empty_of(x, (None, None))


def _empty_static(x: Tensor, scale: Tensor, zero_point: Tensor | None, *, code_mode: str) -> Tensor:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


_KERNELS = "custom_ops.quantization.asymmetric_triton:"
_DYNAMIC = (
    "(Tensor x, *, float min_scale=0.0, str scale_mode='divide', str code_mode='divide')"
    " -> (Tensor q, Tensor scale, Tensor zero_point)"
)


TOKEN_QUANT_ASYMMETRIC = Scheme(
    library.define(
        token_quant_asymmetric,
        _DYNAMIC,
        check=partial(_check, "token_quant_asymmetric", "x"),
        empty=_empty,
        reference=reference.token_quant_asymmetric,
        implementations=(
            cuda("token_quant_asymmetric"),
            triton(_KERNELS + "token_quant_asymmetric"),
        ),
    ),
    _check,
)
TENSOR_QUANT_ASYMMETRIC = Scheme(
    library.define(
        tensor_quant_asymmetric,
        _DYNAMIC,
        check=partial(_check_tensor, "tensor_quant_asymmetric", "x"),
        empty=_empty_tensor,
        reference=reference.tensor_quant_asymmetric,
        implementations=(
            cuda("tensor_quant_asymmetric"),
            triton(_KERNELS + "tensor_quant_asymmetric"),
        ),
    ),
    _check_tensor,
)
TENSOR_QUANT_STATIC_ASYMMETRIC = Scheme(
    library.define(
        tensor_quant_static_asymmetric,
        "(Tensor x, Tensor scale, Tensor? zero_point, *, str code_mode='divide') -> Tensor",
        check=partial(_check_static, "tensor_quant_static_asymmetric", "x"),
        empty=_empty_static,
        reference=reference.tensor_quant_static_asymmetric,
        implementations=(
            cuda("tensor_quant_static_asymmetric"),
            triton(_KERNELS + "tensor_quant_static_asymmetric"),
        ),
    ),
    _check_static,
)
