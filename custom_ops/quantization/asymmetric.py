"""Asymmetric quantization to int8 per token: a scale and a zero point from the least and the largest value."""

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


def _check(
    op: str, name: str, x: Tensor, *, min_scale: float, scale_mode: str, code_mode: str
) -> None:
    check_activation(op, name, x)
    check_scales(op, "float32", ("float32",), 0.0, min_scale, scale_mode, full=False)
    check_codes(op, torch.int8, code_mode)
    check_channels(op, name, x)


def _empty(
    x: Tensor, *, min_scale: float, scale_mode: str, code_mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    q, scale = quant_spec(torch.int8, (1, None)).empty(x.shape, x.device)
    return q, scale, torch.empty(scale.shape, dtype=torch.int8, device=x.device)


TOKEN_QUANT_ASYMMETRIC = Scheme(
    library.define(
        token_quant_asymmetric,
        "(Tensor x, *, float min_scale=0.0, str scale_mode='divide', str code_mode='divide')"
        " -> (Tensor q, Tensor scale, Tensor zero_point)",
        check=partial(_check, "token_quant_asymmetric", "x"),
        empty=_empty,
        reference=reference.token_quant_asymmetric,
        implementations=(
            cuda("token_quant_asymmetric"),
            triton("custom_ops.quantization.asymmetric_triton:token_quant_asymmetric"),
        ),
    ),
    _check,
)
