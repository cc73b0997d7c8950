"""A mixture of experts over ranks, by each way of moving its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import custom_ops
from bench.expert_parallel_world import World
from custom_ops.expert_parallel import (
    ep_combine_low_latency,
    ep_dispatch_low_latency,
)

BATCH_TILE = 256  # a multiple of what rows of each expert DeepGEMM takes


@dataclass
class Layer:
    """The experts of this rank, in bfloat16."""

    world: World
    gate_up: Tensor
    down: Tensor

    @classmethod
    def of(cls, world: World, hidden: int = 0, intermediate: int = 0) -> Layer:
        """Of the widths of the world's sizes, or of these."""
        hidden = hidden or world.sizes.hidden
        intermediate = intermediate or world.sizes.intermediate
        shapes = (2 * intermediate, hidden), (hidden, intermediate)
        gate_up, down = (
            torch.empty(world.local, *shape, dtype=torch.bfloat16, device=world.device).normal_(
                std=shape[1] ** -0.5
            )
            for shape in shapes
        )
        return cls(world, gate_up, down)

    def experts(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return custom_ops.fused_moe(x, self.gate_up, self.down, weights, ids)

    def dispatched(self, x: Tensor, ids: Tensor, weights: Tensor, max_tokens: int = 0) -> Tensor:
        """By the ops; with max_tokens without waiting for the host, if DeepEP is there."""
        rest = self.world.sizes.experts, self.world.group
        out = custom_ops.ep_dispatch(x, None, ids, weights, *rest, max_tokens=max_tokens)
        y = self.experts(out[0], out[3], out[2])
        return custom_ops.ep_combine(y, *out[5:], self.world.group, max_tokens=max_tokens)

    def whole(
        self, x: Tensor, ids: Tensor, weights: Tensor, scale: Tensor | None = None, **how: Any
    ) -> Tensor:
        """By the op of all three. how: max_tokens, exchange, split_from, and the scales of block-scaled weights."""
        rest = self.world.sizes.experts, self.world.group
        return custom_ops.ep_fused_moe(
            x, scale, ids, weights, self.gate_up, self.down, *rest, **how
        )

    def alone(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The experts here, of as many tokens as all ranks have: no rank hears of another."""
        ranks = self.world.ranks
        x, ids, weights = (torch.cat([t] * ranks) for t in (x, ids, weights))
        return self.experts(x, weights, torch.where(ids < self.world.local, ids, -1))

    def gathered(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Every token to every rank, and the sums of what the ranks make of it back."""
        world, dist = self.world, torch.distributed
        x, ids, weights = (self._gather(t) for t in (x, ids, weights))
        ids = ids - world.rank * world.local
        ids = torch.where((ids >= 0) & (ids < world.local), ids, -1)
        y = self.experts(x, weights, ids)
        if not world.cuda:  # gloo has no reduce-scatter of bfloat16
            total = y.float()
            dist.all_reduce(total)
            return total.chunk(world.ranks)[world.rank].to(y.dtype)
        out = torch.empty_like(y.chunk(world.ranks)[0])
        dist.reduce_scatter_tensor(out, y)
        return out

    def _gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty((self.world.ranks * len(x), *x.shape[1:]))
        torch.distributed.all_gather_into_tensor(out, x)
        return out

    @property
    def has_low_latency(self) -> bool:
        return "fused_moe_batched" in custom_ops.ops()

    def low_latency(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """By the ops of fixed shapes."""
        sizes, ranks = self.world.sizes, self.world.ranks
        tile = BATCH_TILE // ranks
        most = -(-len(x) // tile) * tile
        out = ep_dispatch_low_latency(x, ids, sizes.experts, most, self.world.group)
        expected = ranks * len(x) * sizes.top_k // sizes.experts
        y = torch.ops.custom_ops.fused_moe_batched(
            out[0], out[2], self.gate_up, self.down, expected=expected
        )
        return ep_combine_low_latency(y, ids, weights, *out[3:], self.world.group)

    def close(self, found: Tensor, wanted: Tensor) -> bool:
        """Within the roundings to bfloat16 of the sums of each rank and of their sum, on every rank."""
        limit = 2**-6 * wanted.abs().amax()
        far = ((found.float() - wanted.float()).abs() > limit).any().int()
        torch.distributed.all_reduce(far)
        return not int(far)
