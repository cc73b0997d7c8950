"""A linear over dequantized operands becomes a block-scaled GEMM.

    x = (q.float() * scale).to(dtype)          # 1 x 128 groups
    w = (w8.float() * w_scale).to(dtype)       # 128 x 128 blocks      ->   block_scaled_mm(q, scale, w8, w_scale)
    x @ w.T [+ bias]

The operands are not rounded to 16 bits on the way, which brings the result closer to float64 than eager is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor as T

from fusion_passes import index_map
from fusion_passes.fusion import Constraint, Fusion, Pattern, Tensor
from fusion_passes.matching import Match
from fusion_passes.operations import shape_of
from fusion_passes.rewriting import Rewrite

BLOCK = 128
FP8 = torch.float8_e4m3fn


def _operands(q: T, scale: T, weight: T, weight_scale: T, dtype: torch.dtype) -> tuple[T, T]:
    x = (q.unflatten(-1, (-1, BLOCK)).float() * scale.unsqueeze(-1)).flatten(-2).to(dtype)
    blocks = weight_scale.repeat_interleave(BLOCK, 0)[: weight.shape[0]].repeat_interleave(BLOCK, 1)
    return x, (weight.float() * blocks).to(dtype)


def _linear(q: T, scale: T, weight: T, weight_scale: T) -> T:
    x, w = _operands(q, scale, weight, weight_scale, torch.bfloat16)
    return torch.nn.functional.linear(x, w)


def _linear_bias(q: T, scale: T, weight: T, weight_scale: T, bias: T) -> T:
    x, w = _operands(q, scale, weight, weight_scale, bias.dtype)
    return torch.nn.functional.linear(x, w, bias)


def _rewrite(m: Rewrite) -> tuple[Any, ...]:
    operands = [m.tensor(name) for name in ("q", "scale", "weight", "weight_scale")]
    if "bias" not in m.match.captured:
        return (m.call("block_scaled_mm", *operands, out_dtype=m.dtype),)
    # eager adds the bias before it rounds; the sum in float32 keeps it that way
    product = m.call("block_scaled_mm", *operands, out_dtype=torch.float32)
    return (m.cast(m.emit(torch.ops.aten.add.Tensor, product, m.tensor("bias")), m.dtype),)


def _has_all_scales(match: Match) -> bool:
    weight, scale = match.base("weight"), match.base("weight_scale")
    blocks = [-(-size // BLOCK) for size in shape_of(weight)]
    found = shape_of(scale)
    return len(found) == 2 and all(
        index_map.same_size(a, b) for a, b in zip(found, blocks, strict=True)
    )


_INPUTS = {
    "q": Tensor("num_tokens", f"num_groups * {BLOCK}", dtype=FP8),
    "scale": Tensor("num_tokens", "num_groups", dtype=torch.float32),
    "weight": Tensor("out_features", f"num_groups * {BLOCK}", dtype=FP8),
    "weight_scale": Tensor("num_blocks", "num_groups", dtype=torch.float32),
}

FUSION = Fusion(
    name="block_scaled_linear",
    summary="dequantize and matmul -> block-scaled FP8 GEMM",
    stage=2,
    patterns=(
        Pattern(_linear, _INPUTS, name="linear"),
        Pattern(_linear_bias, {**_INPUTS, "bias": Tensor("out_features")}, name="linear with bias"),
    ),
    rewrite=_rewrite,
    constraints=(
        Constraint(
            _has_all_scales,
            lambda match: (
                f"weight_scale is {shape_of(match.base('weight_scale'))} "
                f"for a weight of {shape_of(match.base('weight'))}"
            ),
        ),
    ),
    signature="aten.mm.default aten.addmm.default",
    allow_shared=True,  # the dequantized activation is shared by the linears that read it, and each is rewritten
    # stock: both operands are dequantized to 16 bits, written, and read again by the GEMM
    bytes_before=f"5*num_tokens*num_groups*{BLOCK} + 5*out_features*num_groups*{BLOCK} + 2*num_tokens*out_features",
    bytes_after=f"num_tokens*num_groups*{BLOCK} + out_features*num_groups*{BLOCK} + 2*num_tokens*out_features",
)
