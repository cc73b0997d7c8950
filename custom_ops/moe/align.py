"""Pairs of tokens and experts, grouped by expert in blocks: what a grouped GEMM walks along.

A pair p = token * K + k is an entry of topk_ids [T, K]; there are S = T * K. Experts are counted among those that are
here, from 0 to num_experts. Without an expert_map, topk_ids are such numbers; with one, they are indices of it. A pair
whose expert is elsewhere (an id out of range, an entry of the map that is -1 or out of range) is in no group.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.implementation import Implementation, cuda
from custom_ops.library import require
from custom_ops.moe import align_reference as reference
from custom_ops.moe.align_reference import padded_rows
from custom_ops.moe.checks import check_at_least, check_ids
from custom_ops.scales import known

__all__ = ["check_rows", "indexing_kernel", "moe_align_block_size", "padded_rows"]

# What a block of the CUDA kernel counts in shared memory, and what it adds up in 31 bits.
CUDA_MAX_EXPERTS = 512
CUDA_MAX_PAIRS = 2**30
MAX_ROWS = 2**31 - 1  # their numbers are int32


def moe_align_block_size(
    topk_ids: Tensor, block_size: int, num_experts: int, *, expert_map: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Group pairs by expert, each expert padded to whole blocks.

    topk_ids: int32 or int64, [T, K], any strides. block_size: 1 or more. num_experts: E, how many are here.
    expert_map: int32, [experts in all], to a number in [0, E), or -1 for an expert elsewhere.

    Returns, all int32:
    - sorted_ids [P]: pairs by expert, ascending within one (the order is that of a stable sort), each expert padded
      to a multiple of block_size with S, as is what follows the last one; P = `padded_rows(S, E, block_size)`,
      which no routing exceeds.
    - block_experts [P / block_size]: the expert of each block, -1 for the blocks past the last expert.
    - num_padded [1]: entries in use, a multiple of block_size.

    Raises ValueError for another dtype, number of dimensions, device or number. No host synchronization.
    """
    return torch.ops.custom_ops.moe_align_block_size(
        topk_ids, block_size, num_experts, expert_map=expert_map
    )


def _check(
    topk_ids: Tensor, block_size: int, num_experts: int, *, expert_map: Tensor | None
) -> None:
    op = "moe_align_block_size"
    check_ids(op, topk_ids, num_experts, expert_map)
    check_at_least(op, "block_size", block_size, 1)
    check_rows(op, topk_ids, num_experts, block_size)


def check_rows(op: str, topk_ids: Tensor, num_experts: int, block_size: int) -> None:
    """The rows that pairs may need must be few enough to be numbered."""
    rows = padded_rows(topk_ids.shape[0] * topk_ids.shape[1], num_experts, block_size)
    require(
        rows <= MAX_ROWS,
        lambda: (
            f"{op}: topk_ids.shape is {tuple(topk_ids.shape)}, which with padding are {rows} rows; "
            f"accepted: {MAX_ROWS} or fewer"
        ),
    )


def _empty(
    topk_ids: Tensor, block_size: int, num_experts: int, *, expert_map: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    rows = padded_rows(topk_ids.shape[0] * topk_ids.shape[1], num_experts, block_size)
    ids = torch.empty(rows, dtype=torch.int32, device=topk_ids.device)
    return ids, ids.new_empty(rows // block_size), ids.new_empty(1)


def indexing_kernel(name: str, ids: int = 0) -> Implementation:
    """The CUDA kernel of an op that groups pairs. ids: which argument topk_ids is; num_experts comes after it."""

    def unsupported(*args: object, **kwargs: object) -> str | None:
        topk_ids, experts = args[ids], args[2]
        assert isinstance(topk_ids, Tensor)
        assert isinstance(experts, int)
        if not known(experts <= CUDA_MAX_EXPERTS):
            return f"takes at most {CUDA_MAX_EXPERTS} experts, here are {experts}"
        pairs = topk_ids.shape[0] * topk_ids.shape[1]
        if known(pairs > CUDA_MAX_PAIRS):
            return f"takes at most {CUDA_MAX_PAIRS} pairs, here are {pairs}"
        return None

    return replace(cuda(name), unsupported=unsupported)


library.define(
    moe_align_block_size,
    "(Tensor topk_ids, int block_size, int num_experts, *, Tensor? expert_map=None)"
    " -> (Tensor sorted_ids, Tensor block_experts, Tensor num_padded)",
    check=_check,
    empty=_empty,
    reference=reference.moe_align_block_size,
    implementations=(indexing_kernel("moe_align_block_size"),),
)
