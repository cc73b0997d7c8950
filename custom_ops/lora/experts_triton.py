"""Experts with adapters in Triton: the grouped products of `fused_moe`, and shrink and expand over pairs.

A pair of a token and an expert is to the adapters what a token is in a linear layer, and a slot and an expert together
are one slot: so that `moe_align_block_size` makes the runs that shrink and expand walk along, on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from custom_ops.lora import launch
from custom_ops.lora.linear import expand_tile, shrink_tile
from custom_ops.moe import triton_experts
from custom_ops.moe.activation import Activation
from custom_ops.moe.tiles import Aligned
from custom_ops.platform import on_device
from custom_ops.scales import as_rows

RUN = 16  # pairs of one adapter that a program takes


@dataclass(frozen=True)
class Pairs(launch.Tokens):
    """Pairs in place of tokens; `tiles` [runs, 4] has runs of `RUN` only."""

    def bound(self, tokens: int, m: int) -> int:
        return self.tiles.shape[0]

    def of_size(self, m: int) -> Tensor:
        assert m == RUN
        return self.tiles


def fused_moe_lora(
    hidden_states: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up_a: Tensor,
    gate_up_b: Tensor,
    down_a: Tensor,
    down_b: Tensor,
    scaling: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    *,
    activation: str = "silu_mul",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """As `custom_ops.fused_moe_lora`. Takes any strides of the hidden states, the experts' weights and the routing."""
    act = Activation(activation, interleaved, alpha, limit)
    tokens, top_k = topk_ids.shape
    experts, count = gate_up.shape[0], tokens * top_k
    x = as_rows(hidden_states)
    with on_device(x):
        size = triton_experts.block_size(tokens, top_k, gate_up, down)
        ids, of_block, used = torch.ops.custom_ops.moe_align_block_size(topk_ids, size, experts)
        aligned = Aligned(ids, of_block, used, size)
        pairs = runs_of(topk_ids, experts, ranks, token_slots)
        scales = scaling.repeat_interleave(experts)
        # a row for each place of the grouped product; those of padding are read and never stored
        place = aligned.sorted_ids.clamp(max=count - 1)

        first = triton_experts.down(x[place // top_k], gate_up, aligned, count, bias=gate_up_bias)
        _add(x, first, gate_up_a, gate_up_b, scales, pairs, top_k)
        between = act(first)
        second = triton_experts.down(between[place], down, aligned, count, bias=down_bias)
        _add(between, second, down_a, down_b, scales, pairs, 1)
        return torch.ops.custom_ops.moe_reduce(
            second, topk_weights, topk_ids=topk_ids, num_experts=experts
        )


def runs_of(topk_ids: Tensor, experts: int, ranks: Tensor, token_slots: Tensor) -> Pairs:
    """Runs of pairs of one slot and one expert; a pair without an adapter, or without an expert here, is in none."""
    slots = token_slots[: topk_ids.shape[0], None].long()
    here = (topk_ids >= 0) & (topk_ids < experts) & (slots >= 0)
    both = torch.where(here, slots * experts + topk_ids, -1)
    ids, of_run, _ = torch.ops.custom_ops.moe_align_block_size(both, RUN, ranks.shape[0] * experts)
    starts = torch.arange(of_run.shape[0], dtype=torch.int32, device=of_run.device) * RUN
    counts = torch.where(of_run >= 0, RUN, 0).to(torch.int32)
    tiles = torch.stack([of_run, starts, counts, torch.zeros_like(of_run)], 1)
    return Pairs(ranks.repeat_interleave(experts), ids, tiles)


def _add(
    x: Tensor, base: Tensor, a: Tensor, b: Tensor, scaling: Tensor, pairs: Pairs, share: int
) -> None:
    """base [S, N] += the adapters' products of x, in place. share: pairs, one after the other, that read a row of x."""
    count = base.shape[0]
    y = launch.shrink(x, (a.flatten(0, 1),), pairs, shrink_tile(count, True), share=share)
    tile = expand_tile(count, True, y.shape[-1])
    launch.expand(y, (b.flatten(0, 1),), base, scaling, pairs, base, tile)
