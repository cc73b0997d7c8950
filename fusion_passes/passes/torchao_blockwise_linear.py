"""torchao's block-scaled FP8 product (a Triton kernel of its own) becomes the block-scaled GEMM of this machine.

    ao.blockwise_fp8_gemm(q, scale, weight, weight_scale)   ->   block_scaled_mm(q, scale, weight, weight_scale)

Both multiply codes, scale each product of 128 channels and add in float32: what differs is the order of a sum. It
comes before the quantizations, so that these write their scales in the layout that the GEMM reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor as T

import custom_ops
from fusion_passes import operations
from fusion_passes.fusion import Fusion, Pattern, Tensor
from fusion_passes.rewriting import Rewrite

BLOCK = 128
FP8 = torch.float8_e4m3fn

# The pattern needs an operator to be traced with, and torchao's exists only once torchao has been imported.
_stand_in = torch.library.Library("fusion_passes", "FRAGMENT")
_stand_in.define("blockwise_fp8_gemm(Tensor a, Tensor a_s, Tensor b, Tensor b_s) -> Tensor")


@torch.library.register_fake("fusion_passes::blockwise_fp8_gemm", lib=_stand_in)
def _fake(a: T, a_s: T, b: T, b_s: T) -> T:
    return torch.empty((*a.shape[:-1], b.shape[0]), dtype=torch.bfloat16, device=a.device)


@torch.library.impl("fusion_passes::blockwise_fp8_gemm", "CompositeExplicitAutograd", lib=_stand_in)
def _reference(a: T, a_s: T, b: T, b_s: T) -> T:
    scale = a_s.reshape(*a.shape[:-1], -1)
    reference = custom_ops.ops()["block_scaled_mm"].reference
    return reference(a, scale, b, b_s, out_dtype=torch.bfloat16)


operations.alias("ao.blockwise_fp8_gemm.default", "fusion_passes.blockwise_fp8_gemm.default")


def _meaning(q: T, scale: T, weight: T, weight_scale: T) -> T:
    flat = scale.reshape(-1, 1)  # as torchao hands it over
    return torch.ops.fusion_passes.blockwise_fp8_gemm(q, flat, weight, weight_scale)


def _rewrite(m: Rewrite) -> tuple[Any, ...]:
    operands = [m.tensor(name) for name in ("q", "scale", "weight", "weight_scale")]
    return (m.call("block_scaled_mm", *operands, out_dtype=torch.bfloat16),)


FUSION = Fusion(
    name="torchao_blockwise_linear",
    summary="torchao's block-scaled FP8 GEMM -> block_scaled_mm",
    stage=2,
    patterns=(
        Pattern(
            _meaning,
            {
                "q": Tensor("num_tokens", f"num_groups * {BLOCK}", dtype=FP8),
                "scale": Tensor("num_tokens", "num_groups", dtype=torch.float32),
                "weight": Tensor("out_features", f"num_groups * {BLOCK}", dtype=FP8),
                "weight_scale": Tensor("num_blocks", "num_groups", dtype=torch.float32),
            },
            name="torchao blockwise",
        ),
    ),
    rewrite=_rewrite,
    needs="fusion_passes.blockwise_fp8_gemm.default",
    bytes_before=f"num_groups*{BLOCK}*(num_tokens + out_features) + 2*num_tokens*out_features",
    bytes_after=f"num_groups*{BLOCK}*(num_tokens + out_features) + 2*num_tokens*out_features",
)
