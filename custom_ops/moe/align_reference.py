"""Grouping of pairs by expert in plain PyTorch: sorts and scans, on any device and without host synchronization."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def padded_rows(pairs: int, num_experts: int, block_size: int) -> int:
    """Rows that hold `pairs` (token, expert) pairs, whatever their experts, each expert padded to whole blocks.

    At most min(pairs, num_experts) experts have a pair, and each is padded by block_size - 1 at most. A multiple of
    block_size, which the sum over experts is too. Takes symbolic sizes and adds no guard.
    """
    used: int = torch.sym_min(pairs, num_experts)
    return (pairs + used * (block_size - 1)) // block_size * block_size


class Groups(NamedTuple):
    """Where pairs go. S pairs, E experts, P rows.

    row_of_pair: int64 [S], -1 if the expert is elsewhere. expert_of_pair: int64 [S], then E. offsets: int64
    [E + 1], the first row of each expert, and the rows in use.
    """

    row_of_pair: Tensor
    expert_of_pair: Tensor
    offsets: Tensor
    rows: int

    def scatter(self, values: Tensor, fill: int) -> Tensor:
        """int32 [P]: the values [S] of pairs in their rows, `fill` in the others."""
        out = torch.full(
            (self.rows + 1,), fill, dtype=torch.int32, device=self.row_of_pair.device
        )  # with a place for the pairs that are elsewhere
        at = torch.where(self.row_of_pair < 0, self.rows, self.row_of_pair)
        return out.scatter_(0, at, values.to(torch.int32))[: self.rows].clone()


def group_pairs(
    topk_ids: Tensor, block_size: int, num_experts: int, expert_map: Tensor | None
) -> Groups:
    """Pairs in ascending order within their expert, experts in ascending order from whole blocks on."""
    experts = _local_experts(topk_ids, num_experts, expert_map)
    pairs, device = experts.shape[0], experts.device
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
    counts = counts.scatter_add(0, experts, torch.ones_like(experts))
    padded = (counts[:-1] + block_size - 1) // block_size * block_size
    offsets = torch.cat([counts.new_zeros(1), padded.cumsum(0)])

    ordered, order = experts.sort(stable=True)
    rank = torch.arange(pairs, device=device) - (counts.cumsum(0) - counts)[ordered]
    rows = torch.where(ordered < num_experts, offsets[ordered] + rank, -1)
    row_of_pair = torch.empty_like(rows).scatter_(0, order, rows)
    return Groups(row_of_pair, experts, offsets, padded_rows(pairs, num_experts, block_size))


def _local_experts(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None) -> Tensor:
    """int64 [S]: the expert of each pair, num_experts if it is elsewhere."""
    ids = topk_ids.reshape(-1).long()
    if expert_map is not None:
        known = (ids >= 0) & (ids < expert_map.shape[0])
        ids = torch.where(known, expert_map.long()[torch.where(known, ids, 0)], -1)
    return torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)


def moe_align_block_size(
    topk_ids: Tensor, block_size: int, num_experts: int, *, expert_map: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    groups = group_pairs(topk_ids, block_size, num_experts, expert_map)
    pairs, device = topk_ids.numel(), topk_ids.device
    sorted_ids = groups.scatter(torch.arange(pairs, device=device), pairs)
    starts = torch.arange(0, groups.rows, block_size, device=device)
    experts = torch.searchsorted(groups.offsets[1:].contiguous(), starts, right=True)
    block_experts = torch.where(experts < num_experts, experts, -1).to(torch.int32)
    return sorted_ids, block_experts, groups.offsets[-1:].to(torch.int32)
