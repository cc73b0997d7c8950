"""Routing in plain PyTorch: the semantics of the routing ops, on any device and without host synchronization.

Where eager computes in float32, so does this; `rounded` keeps scores in the dtype of the logits, and PyTorch then
rounds every step to it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from custom_ops.scales import to_contiguous


def topk_softmax(
    logits: Tensor,
    top_k: int,
    *,
    correction_bias: Tensor | None,
    softmax_first: bool,
    renormalize: bool,
    renormalize_eps: float,
    renormalize_min: float,
    scale: float,
    rounded: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    values = _scores(logits, "softmax" if softmax_first else "none", rounded)
    ids = _largest(_biased(values, correction_bias), top_k)
    weights = values.gather(1, ids)
    if not softmax_first:
        weights = weights.float().softmax(-1).to(weights.dtype)
    return _finish(weights, renormalize, renormalize_eps, renormalize_min, scale, dtype), ids


def topk_sigmoid(
    logits: Tensor,
    top_k: int,
    *,
    correction_bias: Tensor | None,
    by_logits: bool,
    renormalize: bool,
    renormalize_eps: float,
    renormalize_min: float,
    scale: float,
    rounded: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    scores = _scores(logits, "sigmoid", rounded)
    values = _scores(logits, "none", rounded) if by_logits else scores
    ids = _largest(_biased(values, correction_bias), top_k)
    weights = scores.gather(1, ids)
    return _finish(weights, renormalize, renormalize_eps, renormalize_min, scale, dtype), ids


def grouped_topk(
    logits: Tensor,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    *,
    correction_bias: Tensor | None,
    scoring: str,
    group_score: str,
    masked: str,
    renormalize: bool,
    renormalize_eps: float,
    renormalize_min: float,
    scale: float,
    rounded: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    scores = _scores(logits, scoring, rounded)
    choice = _biased(scores, correction_bias)
    if topk_groups < num_groups:
        kept = _kept(choice, num_groups, topk_groups, group_score)
        choice = choice.masked_fill(~kept, -math.inf if masked == "-inf" else 0.0)
        if masked == "zero_weight":
            scores = scores.masked_fill(~kept, 0.0)
    ids = _largest(choice, top_k)
    weights = scores.gather(1, ids)
    return _finish(weights, renormalize, renormalize_eps, renormalize_min, scale, dtype), ids


def _scores(logits: Tensor, scoring: str, rounded: bool) -> Tensor:
    """[T, E] scores in float32, or rounded to the dtype of the logits; scoring "none": the logits."""
    scores = logits.float()
    if scoring == "softmax":
        scores = scores.softmax(-1)
    elif scoring == "sigmoid":
        scores = scores.sigmoid()
    elif scoring == "sqrt_softplus":
        scores = F.softplus(scores)
        scores = (scores.to(logits.dtype).float() if rounded else scores).sqrt()
    return scores.to(logits.dtype) if rounded else scores


def _biased(values: Tensor, correction_bias: Tensor | None) -> Tensor:
    return values if correction_bias is None else values + correction_bias


def _largest(values: Tensor, count: int) -> Tensor:
    """Where the largest are, descending: the lower index first among equals, NaN above all, -0 as 0."""
    order = (values.float() + 0.0).sort(dim=-1, descending=True, stable=True).indices
    return to_contiguous(order[:, :count].clone())


def _kept(choice: Tensor, num_groups: int, topk_groups: int, group_score: str) -> Tensor:
    """[T, E]: whether an expert is in one of the groups that stay."""
    tokens, experts = choice.shape
    best = choice.view(tokens, num_groups, experts // num_groups)
    best = best.float().sort(-1, descending=True).values.to(choice.dtype)
    groups = best[..., 0] if group_score == "max" else best[..., 0] + best[..., 1]
    kept = torch.zeros(tokens, num_groups, dtype=torch.bool, device=choice.device)
    kept = kept.scatter(1, _largest(groups, topk_groups), True)
    return kept[..., None].expand(-1, -1, experts // num_groups).reshape(tokens, experts)


def _finish(
    weights: Tensor,
    renormalize: bool,
    renormalize_eps: float,
    renormalize_min: float,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    if renormalize:
        total = _sum(weights.float())[:, None].to(weights.dtype)
        weights = weights / (total.clamp(min=renormalize_min) + renormalize_eps)
    return to_contiguous((weights * scale).to(dtype))


def _sum(weights: Tensor) -> Tensor:
    """[T, K] to [T], neighbours first: the order of PyTorch's own sum on a GPU, for K up to 32.

    There a row has as many threads as the largest power of two in K; each takes what is its own and what
    lies so many further, and then pairs are added, and pairs of pairs.
    """
    count = weights.shape[1]
    threads = min(32, 1 << (count.bit_length() - 1))
    parts = weights[:, :threads].clone()
    for first in range(threads, count, threads):
        rest = weights[:, first : first + threads]
        parts[:, : rest.shape[1]] += rest
    while parts.shape[1] > 1:
        parts = parts[:, ::2] + parts[:, 1::2]
    return parts[:, 0]
