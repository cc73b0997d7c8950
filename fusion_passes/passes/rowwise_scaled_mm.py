"""A float8 product with a scale per token and output channel is made by the kernel that was measured to be fastest.

    torch._scaled_mm(q, w8.T, scale, w_scale.T, bias, out_dtype=bfloat16)   ->   scaled_mm(q, scale, w8, w_scale, bias)

As torchao's Float8DynamicActivationFloat8WeightConfig(PerRow()) writes it, or by torch.nn.functional.scaled_mm with
ScalingType.RowWise (aten._scaled_mm_v2, before which torch.compile of 2.11 breaks the graph). cuBLASLt takes 12 us or
more for it, however few tokens there are; a Triton kernel of small tiles reads the weight in the time that it takes to
read it. With many tokens cuBLASLt is ahead, and the rows of the table leave those to stock. `use_fast_accum` allows
sums of fewer bits than float32, which the kernels here do not make use of.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor as T

from fusion_passes.fusion import Constraint, Fusion, Pattern, Tensor
from fusion_passes.matching import Match
from fusion_passes.rewriting import Rewrite

FP8 = torch.float8_e4m3fn


_KEPT_TRANSPOSED = (
    "the weight is kept transposed; accepted: one kept as [out_features, hidden_size]"
)


def _product(out_dtype: torch.dtype, fast: bool, kept_transposed: bool) -> Any:
    def product(q: T, scale: T, weight: T, weight_scale: T, bias: T | None = None) -> T:
        return torch._scaled_mm(
            q,
            weight if kept_transposed else weight.t(),
            scale,
            weight_scale.t(),
            bias,
            out_dtype=out_dtype,
            use_fast_accum=fast,
        )

    return product


def _pattern(
    fast: bool,
    biased: bool,
    out_dtype: torch.dtype = torch.bfloat16,
    kept_transposed: bool = False,
) -> Pattern:
    """Those that are not made here are found in order to be refused."""
    weight = ("out_features", "hidden_size")
    inputs = {
        "q": Tensor("num_tokens", "hidden_size", dtype=FP8),
        "scale": Tensor("num_tokens", "1", dtype=torch.float32),
        "weight": Tensor(*(weight[::-1] if kept_transposed else weight), dtype=FP8),
        "weight_scale": Tensor("out_features", "1", dtype=torch.float32),
        **({"bias": Tensor("out_features", dtype=out_dtype)} if biased else {}),
    }
    words = ["fast sums" if fast else "float32 sums", *(["bias"] if biased else [])]
    refused = []
    if out_dtype is not torch.bfloat16:
        refused.append(f"out_dtype is {out_dtype}; accepted: torch.bfloat16")
    if kept_transposed:
        refused.append(_KEPT_TRANSPOSED)
    return Pattern(
        _product(out_dtype, fast, kept_transposed),
        inputs,
        {"refused": "; ".join(refused)} if refused else {},
        name=", ".join([*words, *refused]),
    )


def _rewrite(m: Rewrite) -> tuple[Any, ...]:
    names = ("q", "scale", "weight", "weight_scale", "bias")
    operands = [m.tensor(name) for name in names if name in m.match.captured]
    return (m.call("scaled_mm", *operands, out_dtype=torch.bfloat16),)


def _measured_as(match: Match) -> dict[str, Any] | None:
    sizes = {"n": match.sizes["out_features"], "k": match.sizes["hidden_size"]}
    return sizes if all(isinstance(size, int) for size in sizes.values()) else None


FUSION = Fusion(
    name="rowwise_scaled_mm",
    summary="torch._scaled_mm with a scale per token and channel by the fastest kernel for so many tokens",
    stage=2,
    patterns=tuple(
        _pattern(fast, biased, *spelling)
        for spelling in ((), (torch.float16,), (torch.bfloat16, True))
        for fast, biased in itertools.product((True, False), (False, True))
    ),
    rewrite=_rewrite,
    constraints=(
        Constraint(
            lambda match: "refused" not in match.constants,
            lambda match: match.constants["refused"],
        ),
    ),
    needs="aten._scaled_mm.default",
    measured_as=_measured_as,
    bytes_before="num_tokens*hidden_size + out_features*hidden_size + 2*num_tokens*out_features",
    bytes_after="num_tokens*hidden_size + out_features*hidden_size + 2*num_tokens*out_features",
)
