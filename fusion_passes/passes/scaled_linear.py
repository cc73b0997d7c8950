"""A linear over dequantized operands becomes a GEMM over the codes, with a scale per tensor, token or output channel.

    x = (q.float() * scale).to(dtype)          # one scale, or one per token
    w = (w8.float() * w_scale).to(dtype)       # one scale, or one per row
    x @ w.T [+ bias]                           ->   scaled_mm(q, scale, w8, w_scale, bias)

Also spelt with 16-bit scales, `q.to(dtype) * scale`, which rounds to the same operands. float8 and int8. The operands
are not rounded to 16 bits on the way, which brings the result closer to float64 than eager is.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor as T

from custom_ops.gemm.ops import MAX_INT8_K
from fusion_passes.fusion import Constraint, Fusion, Pattern, Tensor
from fusion_passes.matching import Match
from fusion_passes.rewriting import Rewrite

FP8, INT8 = torch.float8_e4m3fn, torch.int8
_ROWS, _WEIGHT = ("num_tokens", "hidden_size"), ("out_features", "hidden_size")
_SCALES = {"tensor": ("1",), "token": ("num_tokens", "1")}
_WEIGHT_SCALES = {"tensor": ("1",), "channel": ("out_features", "1")}


def _dequantized(q: T, scale: T, dtype: torch.dtype) -> T:
    if scale.dtype is torch.float32:
        return (q.float() * scale).to(dtype)
    return q.to(scale.dtype) * scale


def _linear(q: T, scale: T, weight: T, weight_scale: T, bias: T | None = None) -> T:
    dtype = torch.bfloat16 if bias is None else bias.dtype
    return F.linear(_dequantized(q, scale, dtype), _dequantized(weight, weight_scale, dtype), bias)


def _patterns() -> tuple[Pattern, ...]:
    patterns = []
    for dtype, wide, scope, weight_scope, biased in itertools.product(
        (FP8, INT8), (torch.float32, None), _SCALES, _WEIGHT_SCALES, (False, True)
    ):
        inputs = {
            "q": Tensor(*_ROWS, dtype=dtype),
            "scale": Tensor(*_SCALES[scope], dtype=wide),
            "weight": Tensor(*_WEIGHT, dtype=dtype),
            "weight_scale": Tensor(*_WEIGHT_SCALES[weight_scope], dtype=wide),
            **({"bias": Tensor("out_features")} if biased else {}),
        }
        words = [
            str(dtype).removeprefix("torch."),
            f"per {scope} x per {weight_scope}",
            *(["16-bit scales"] if wide is None else []),
            *(["bias"] if biased else []),
        ]
        patterns.append(Pattern(_linear, inputs, name=", ".join(words)))
    return tuple(patterns)


def _rewrite(m: Rewrite) -> tuple[Any, ...]:
    names = ("q", "scale", "weight", "weight_scale", "bias")
    operands = [m.tensor(name) for name in names if name in m.match.captured]
    return (m.call("scaled_mm", *operands, out_dtype=m.dtype),)


def _sums_fit(match: Match) -> bool:
    return match.base("q").meta["val"].dtype is FP8 or bool(
        match.sizes["hidden_size"] <= MAX_INT8_K
    )


FITS_INT32 = Constraint(
    _sums_fit,
    lambda match: (
        f"{match.sizes['hidden_size']} int8 products may not fit an int32; supported: {MAX_INT8_K}"
    ),
)

FUSION = Fusion(
    name="scaled_linear",
    summary="dequantize and matmul -> FP8 or int8 GEMM with scales per tensor, token or channel",
    stage=2,
    patterns=_patterns(),
    rewrite=_rewrite,
    constraints=(FITS_INT32,),
    signature="aten.mm.default aten.addmm.default",
    allow_shared=True,  # the dequantized activation is shared by the linears that read it, and each is rewritten
    # stock: both operands are dequantized to 16 bits, written, and read again by the GEMM
    bytes_before="5*num_tokens*hidden_size + 5*out_features*hidden_size + 2*num_tokens*out_features",
    bytes_after="num_tokens*hidden_size + out_features*hidden_size + 2*num_tokens*out_features",
)
