"""A float8 product whose only reader adds a residual to it makes the sum itself.

    torch._scaled_mm(q, w8.T, scale, w_scale.T, out_dtype=bfloat16) + residual
        ->   scaled_mm_add(q, scale, w8, w_scale, residual)

The output and the down projection of a layer that torchao has quantized per tensor. The norm behind it then reads one
tensor in place of two and writes no sum. The product is rounded once less than in eager, and the sum is closer to
float64. The sums keep the `use_fast_accum` that was asked for.

With a scale per token and channel cuBLASLt has another kernel, which takes 17 us longer with a residual than without
(4096 x 4096 x 4096 on an H100: 115 and 98 us, per tensor 119 and 104), and the norm saves no more: those stay as they
are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor as T

from fusion_passes.fusion import Constraint, Fusion, Pattern, Tensor
from fusion_passes.matching import Match
from fusion_passes.rewriting import Rewrite

FP8 = torch.float8_e4m3fn
_SHAPES: dict[str, tuple[int, ...]] = {
    "per tensor": (1, 1),
    "per tensor, 1-D": (1,),
    "per tensor, 0-D": (),
}
"""How both scales may stand in a graph; torchao's is the first."""


def _sum(shape: tuple[int, ...], fast: bool, dtype: torch.dtype) -> Any:
    def total(q: T, scale: T, weight: T, weight_scale: T, residual: T, bias: T | None = None) -> T:
        product = torch._scaled_mm(
            q,
            weight.t(),
            scale.reshape(shape),
            weight_scale.reshape(shape),
            bias,
            out_dtype=dtype,
            use_fast_accum=fast,
        )
        return product + residual

    return total


def _pattern(scales: str, fast: bool, biased: bool, dtype: torch.dtype) -> Pattern:
    """Those that are not made here are found in order to be refused."""
    inputs = {
        "q": Tensor("num_tokens", "hidden_size", dtype=FP8),
        "scale": Tensor("1", dtype=torch.float32),
        "weight": Tensor("out_features", "hidden_size", dtype=FP8),
        "weight_scale": Tensor("1", dtype=torch.float32),
        "residual": Tensor("num_tokens", "out_features", dtype=dtype),
        **({"bias": Tensor("out_features", dtype=dtype)} if biased else {}),
    }
    refused = ["a bias is added first"] if biased else []
    if dtype is not torch.bfloat16:
        refused.append(f"out_dtype is {dtype}; accepted: torch.bfloat16")
    words = [scales, "fast sums" if fast else "float32 sums", *refused]
    constants: dict[str, Any] = {"fast_sums": fast}
    if refused:
        constants["refused"] = "; ".join(refused)
    return Pattern(_sum(_SHAPES[scales], fast, dtype), inputs, constants, name=", ".join(words))


def _rewrite(m: Rewrite) -> tuple[Any, ...]:
    operands = [m.tensor(name) for name in ("q", "scale", "weight", "weight_scale", "residual")]
    return (m.call("scaled_mm_add", *operands, fast_sums=m.constants["fast_sums"]),)


def _measured_as(match: Match) -> dict[str, Any] | None:
    sizes = {"n": match.sizes["out_features"], "k": match.sizes["hidden_size"]}
    return sizes if all(isinstance(size, int) for size in sizes.values()) else None


FUSION = Fusion(
    name="scaled_mm_add",
    summary="torch._scaled_mm and the residual that is added to it as one product",
    stage=2,
    priority=1,
    patterns=tuple(
        _pattern(scales, fast, biased, dtype)
        for scales in _SHAPES
        for biased, dtype in (
            (False, torch.bfloat16),
            (True, torch.bfloat16),
            (False, torch.float16),
        )
        for fast in (True, False)
    ),
    rewrite=_rewrite,
    constraints=(
        Constraint(
            lambda match: "refused" not in match.constants,
            lambda match: match.constants["refused"],
        ),
        Constraint(
            lambda match: match.base("residual") not in match.nodes.values(),
            lambda match: "the product is added to itself",
        ),
    ),
    needs="aten._scaled_mm.default",
    measured_as=_measured_as,
    bytes_before="num_tokens*hidden_size + out_features*hidden_size + 8*num_tokens*out_features",
    bytes_after="num_tokens*hidden_size + out_features*hidden_size + 4*num_tokens*out_features",
)
