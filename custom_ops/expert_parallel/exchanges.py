"""How `ep_fused_moe` brings tokens to their experts: by dispatch and combine, or all tokens to all ranks.

Dispatching sends a token to the ranks of its experts. Where that is nearly every rank (two ranks, 8 of 64 experts:
0.998 of them), gathering moves the same bytes, in one collective that has nothing to count, and one that adds up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from custom_ops.expert_parallel import groups
from custom_ops.expert_parallel.reference import as_bytes


class Tokens(NamedTuple):
    """[T, H], scales [T, G] or None, and ids and weights [T, K]; of this rank, or as they were received."""

    x: Tensor
    scale: Tensor | None
    ids: Tensor
    weights: Tensor

    def halves(self) -> tuple[Tokens, Tokens]:
        """The first half, the larger one of an odd number, and the rest."""
        first = (len(self.x) + 1) // 2
        a, b = (
            Tokens(*(None if t is None else t[part] for t in self))  # type: ignore[arg-type]
            for part in (slice(None, first), slice(first, None))
        )
        return a, b


class Received(NamedTuple):
    """Tokens of all ranks with the ids of the experts here, and what brings the results back."""

    tokens: Tokens
    handle: Any


@dataclass(frozen=True)
class Dispatch:
    """By `ep_dispatch` and `ep_combine`. most: the most tokens of a rank, or 0, and the host waits for their number."""

    num_experts: int
    group: str
    most: int

    @property
    def waits(self) -> bool:
        return not self.most

    def half(self) -> Dispatch:
        return Dispatch(self.num_experts, self.group, -(-self.most // 2))

    def send(self, tokens: Tokens) -> Received:
        x, scale, ids, weights, _, *handle = torch.ops.custom_ops.ep_dispatch(
            *tokens, self.num_experts, self.group, max_tokens=self.most
        )
        return Received(
            Tokens(x, None if tokens.scale is None else scale, ids, weights), tuple(handle)
        )

    def back(self, y: Tensor, handle: Any) -> Tensor:
        return torch.ops.custom_ops.ep_combine(y, *handle, self.group, max_tokens=self.most)


@dataclass(frozen=True)
class Gather:
    """Every token to every rank. most: the most tokens of a rank; those with fewer send rows of no expert."""

    num_experts: int
    group: str
    most: int
    waits = False

    def half(self) -> Gather:
        return Gather(self.num_experts, self.group, -(-self.most // 2))

    def send(self, tokens: Tokens) -> Received:
        count = len(tokens.x)
        pg = groups.resolve("ep_fused_moe", self.group)
        sent = [self._padded(t) for t in tokens if t is not None]
        received = [t.new_empty((pg.size() * self.most, *t.shape[1:])) for t in sent]
        groups.gather_all("ep_fused_moe", self.group, sent, received)
        if tokens.scale is None:
            received.insert(1, None)  # type: ignore[arg-type]
        x, scale, ids, weights = received
        local = self.num_experts // pg.size()
        # Ids of experts elsewhere are below 0 or too large then, which `fused_moe` passes over.
        return Received(Tokens(x, scale, ids - pg.rank() * local, weights), count)

    def _padded(self, t: Tensor) -> Tensor:
        """With rows up to `most`: of ids -1, which is no expert, and of zeros."""
        missing = self.most - len(t)
        if not missing:
            return t.contiguous()
        fill = t.new_empty((missing, *t.shape[1:]))
        fill = as_bytes(fill).zero_() if t.is_floating_point() else fill.fill_(-1)
        if t.is_floating_point():
            return torch.cat([as_bytes(t), fill]).view(t.dtype)
        return torch.cat([t, fill])

    def back(self, y: Tensor, handle: Any) -> Tensor:
        """The sums in float32 from rank 0 on, rounded once, as `ep_combine` has them."""
        pg = groups.resolve("ep_fused_moe", self.group)
        ranks = pg.size()
        if ranks == 1:
            return y[:handle]
        if ranks == 2 and y.is_cuda:  # one addition, which rounds once, whoever does it
            out = y.new_empty((self.most, y.shape[1]))
            groups.reduce_scatter("ep_fused_moe", self.group, y, out)
            return out[:handle]
        rows = as_bytes(y)
        theirs = torch.empty_like(rows)
        each = [self.most] * ranks
        groups.exchange("ep_fused_moe", self.group, rows, each, theirs, each, wait=False)
        total = torch.zeros((self.most, y.shape[1]), dtype=torch.float32, device=y.device)
        for part in theirs.view(y.dtype).view(ranks, self.most, y.shape[1]):
            total += part
        return total[:handle].to(y.dtype)
