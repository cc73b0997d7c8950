"""Shared experts on a second stream: a block with it, and the same graph with one after the other.

The router and the routed experts are our ops in both; "inductor" is stock `torch.compile` around them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import Case, Inputs, activation, close
from bench.moe_shared import BLOCKS, Block, Weights, route, routed
from fusion_passes.passes.fused_moe_and_shared import MOST_TOKENS, NAME

TOKENS = (1, 4, 16, 64)


def one_after_the_other(weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = weights.shared_gate_up.chunk(2)
    between = F.silu(F.linear(x, gate)) * F.linear(x, up)
    return routed(weights, x), F.linear(between, weights.shared_down)


@lru_cache(maxsize=1)
def _weights(block: Block, device: torch.device) -> Weights:
    return Weights(block, device)


def _inputs(device: torch.device, block: Block, tokens: int) -> Inputs:
    """Tokens of which some have experts here."""
    weights = _weights(block, device)
    while True:
        x = activation(device, tokens, block.hidden)
        if bool((route(weights, x)[1] < block.experts).any()):
            return weights, x


def _op_args(weights: Weights, x: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    gate, up = weights.shared_gate_up.chunk(2)
    args = (x, weights.gate_up, weights.down, *route(weights, x), gate, up, weights.shared_down)
    return args, {"expert_map": weights.expert_map}


def _small(block: Block) -> Block:
    return replace(
        block,
        experts=4,
        top_k=2,
        hidden=128,
        intermediate=128,
        shared=128,
        routed=block.routed and 16,
    )


def cases(tiny: bool = False) -> Iterator[Case]:
    for full in BLOCKS[:1] if tiny else BLOCKS:
        block = _small(full) if tiny else full
        for tokens in (4,) if tiny else TOKENS:
            if tokens > MOST_TOKENS:
                continue
            pairs = tokens * block.top_k * block.experts / block.everywhere
            hit = block.experts * (1 - (1 - block.top_k / block.everywhere) ** tokens)
            weights = 3 * block.hidden * (hit * block.intermediate + block.shared)
            work = 3 * block.hidden * (pairs * block.intermediate + tokens * block.shared)
            yield Case(
                name=f"{NAME}_{full.name}",
                sizes={"tokens": tokens, "experts": block.experts, "shared": block.shared},
                inputs=partial(_inputs, block=block, tokens=tokens),
                plain=one_after_the_other,
                check=close(2e-2),
                op=NAME,
                op_args=_op_args,
                fusion=NAME,
                moved_bytes=round(2 * weights),
                flops=round(2 * work),
            )
