"""Finalize: results of experts back to tokens, with the top-k weights and in the order of k."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.moe.parts import ExpertTokensMetadata, Finalize
from custom_ops.moe.problem import Problem, Sizes


def _nothing_left(problem: Problem, results: Tensor, metadata: ExpertTokensMetadata) -> Tensor:
    return results


def _reduce(problem: Problem, results: Tensor, metadata: ExpertTokensMetadata) -> Tensor:
    return torch.ops.custom_ops.moe_reduce(
        results,
        problem.topk_weights,
        topk_ids=problem.topk_ids,
        num_experts=problem.sizes.num_experts,
        expert_map=problem.expert_map,
    )


def _unpermute(problem: Problem, results: Tensor, metadata: ExpertTokensMetadata) -> Tensor:
    assert metadata.row_of_pair is not None
    return torch.ops.custom_ops.moe_unpermute(
        results.reshape(-1, results.shape[-1]), metadata.row_of_pair, problem.topk_weights
    )


def _tokens_bytes(sizes: Sizes, itemsize: int) -> int:
    return sizes.num_tokens * sizes.hidden_size * itemsize


NOTHING_LEFT = Finalize("nothing_left", _nothing_left, "reduced", applies_topk_weights=False)
REDUCE = Finalize("reduce", _reduce, "pairs", workspace=_tokens_bytes)
UNPERMUTE = Finalize("unpermute", _unpermute, "contiguous", workspace=_tokens_bytes)
UNPERMUTE_BATCHED = Finalize("unpermute_batched", _unpermute, "batched", workspace=_tokens_bytes)
FINALIZES = (NOTHING_LEFT, REDUCE, UNPERMUTE, UNPERMUTE_BATCHED)
