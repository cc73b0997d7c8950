"""Routers one step away from those that are found: none fires, or the result is still right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.fusion_passes.helpers import random
from tests.fusion_passes.one_step_away import run
from tests.fusion_passes.test_routers import inputs

pytestmark = pytest.mark.usefixtures("references")


ROUTERS = ("topk_softmax", "topk_sigmoid", "grouped_topk")
EXPERTS, TOP_K = 16, 4


def _route(logits: Tensor, bias: Tensor, change: str) -> tuple[Tensor, ...]:
    tokens, wide = logits.shape[0], logits.float()
    if change == "logits at the ids":
        ids = wide.softmax(-1).topk(TOP_K)[1]
        return wide.gather(1, ids), ids
    if change == "16-bit logits at the ids":
        ids = wide.sigmoid().topk(TOP_K)[1]
        return logits.gather(1, ids), ids
    if change == "sigmoid of the logits at the ids":
        ids = wide.sigmoid().topk(TOP_K)[1]
        return wide.gather(1, ids).sigmoid(), ids
    if change == "sigmoid of the logits at the ids, biased":
        ids = (wide.sigmoid() + bias).topk(TOP_K)[1]
        return wide.gather(1, ids).sigmoid(), ids
    if change == "softmax of the logits at the ids, biased":
        ids = (wide + bias).topk(TOP_K)[1]
        return wide.gather(1, ids).softmax(-1), ids
    if change == "softmax of each group":
        scores = wide.view(tokens, 4, 4).softmax(-1).view(tokens, EXPERTS)
        return scores.topk(TOP_K)
    if change == "softmax of all tokens":
        return wide.reshape(-1).softmax(0).view(tokens, EXPERTS).topk(TOP_K)
    if change == "softmax of all the chosen":
        values, ids = wide.topk(TOP_K)
        return values.reshape(-1).softmax(0).view(tokens, TOP_K), ids
    if change == "softmax of half the chosen":
        values, ids = wide.topk(TOP_K)
        return values.view(-1, 2).softmax(-1).view(tokens, TOP_K), ids
    if change == "bias of each token":
        ids = (wide.sigmoid() + bias[:tokens, None]).topk(TOP_K)[1]
        return wide.sigmoid().gather(1, ids), ids
    if change == "scores scaled and biased":
        ids = (torch.add(wide.sigmoid(), bias, alpha=2)).topk(TOP_K)[1]
        return wide.sigmoid().gather(1, ids), ids
    if change == "16-bit sum with the bias":
        scores = logits.sigmoid()
        ids = (scores + (bias.argsort() * 2).to(logits.dtype)).topk(TOP_K)[1]
        return scores.gather(1, ids), ids
    if change == "16-bit scores, wide bias":
        scores = logits.sigmoid()
        ids = (scores + bias.to(logits.dtype).float()).topk(TOP_K)[1]
        return scores.gather(1, ids), ids
    if change == "total of other tokens":
        weights, ids = wide.softmax(-1).topk(TOP_K)
        return weights / weights.sum(-1, keepdim=True).reshape(1, -1)[:, :TOP_K], ids
    if change == "values and the scores of others":
        values, ids = wide.softmax(-1).topk(TOP_K)
        return values, ids, wide.sigmoid().gather(1, ids)
    if change == "gathered at other ids":
        scores = wide.sigmoid()
        ids = (scores + bias).topk(TOP_K)[1]
        return scores.gather(1, ids.flip(-1)), ids
    if change == "temperature":
        return (wide / 3).softmax(-1).topk(TOP_K)
    weights, ids = wide.softmax(-1).topk(TOP_K)
    return _weigh(weights, change), ids


def _weigh(weights: Tensor, change: str) -> Tensor:
    """The weights of the chosen, renormalized in another way."""
    if change == "sum of all tokens":
        return weights / weights.reshape(1, -1).sum(-1, keepdim=True)
    if change == "sum over tokens":
        return weights / weights.sum(0, keepdim=True)
    if change == "sum of halves":
        halves = weights.view(-1, 2)
        return (halves / halves.sum(-1, keepdim=True)).view(weights.shape)
    if change == "sum of all but the last":
        return weights / weights[:, :-1].sum(-1, keepdim=True)
    if change == "largest":
        return weights / weights.amax(-1, keepdim=True)
    if change == "mean":
        return weights / weights.mean(-1, keepdim=True)
    if change == "sum of squares":
        return weights / weights.square().sum(-1, keepdim=True)
    if change == "sum over the weights":
        return weights.sum(-1, keepdim=True) / weights
    if change == "twice":
        weights = weights / weights.sum(-1, keepdim=True)
        return weights / (weights.sum(-1, keepdim=True) + 1)
    if change == "eps, then a bound":
        return weights / (weights.sum(-1, keepdim=True) + 1.0).clamp(min=1.75)
    if change == "a bound, then eps":
        return weights / (weights.sum(-1, keepdim=True).clamp(min=1.75) + 1.0)
    if change == "bound from above":
        return weights / weights.sum(-1, keepdim=True).clamp(max=0.25)
    if change == "eps with alpha":
        total = weights.sum(-1, keepdim=True)
        return weights / torch.add(total, torch.full((1,), 0.5), alpha=3)
    if change == "scaled before the sum":
        weights = weights * 2.5
        return weights / (weights.sum(-1, keepdim=True) + 1.0)
    if change == "cast before the sum":
        weights = weights.bfloat16()
        return weights / weights.sum(-1, keepdim=True)
    if change == "cast, then scaled":
        return (weights / weights.sum(-1, keepdim=True)).bfloat16() * 2.3
    if change == "scaled twice":
        return weights * 2.5 * 0.3
    if change == "rows of some":
        return weights[:2] * 2.5
    if change == "rows of more":
        return weights.unsqueeze(1).expand(-1, 3, -1) * 2.5
    if change == "scaled by a column":
        return weights * torch.full((3, 1, 1), 2.5)
    if change == "also unscaled":
        return torch.stack([weights, weights * 2.5])
    raise AssertionError(change)


ROUTED = (
    "logits at the ids", "16-bit logits at the ids", "sigmoid of the logits at the ids",
    "sigmoid of the logits at the ids, biased", "softmax of the logits at the ids, biased", "softmax of each group",
    "softmax of all tokens", "softmax of all the chosen", "softmax of half the chosen", "bias of each token",
    "scores scaled and biased", "16-bit sum with the bias", "values and the scores of others",
    "16-bit scores, wide bias", "total of other tokens",
    "gathered at other ids", "temperature", "sum of all tokens", "sum over tokens", "sum of halves",
    "sum of all but the last", "largest", "mean", "sum of squares", "sum over the weights", "twice",
    "eps, then a bound", "a bound, then eps", "bound from above", "eps with alpha", "scaled before the sum",
    "cast before the sum", "cast, then scaled", "scaled twice", "rows of some", "rows of more", "scaled by a column",
    "also unscaled",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, TOP_K, EXPERTS])
@pytest.mark.parametrize("change", ROUTED)
def test_a_router_one_step_away(change, tokens, dtype):
    bias = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(1)) / 4
    logits = inputs(tokens, torch.float32, seed=3)[0]
    result = run(lambda *given: _route(*given, change), logits.to(dtype), bias, names=ROUTERS)
    assert torch.equal(result.expected[1], result.actual[1]), result.report


def _groups(logits: Tensor, bias: Tensor, change: str) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(-1) if change == "softmax" else logits.sigmoid()
    choice, tokens = scores + bias, logits.shape[0]
    grouped = (choice if change != "scores of logits" else logits).view(tokens, 4, 4)
    if change == "groups in turns":
        grouped = choice.view(tokens, 4, 4).transpose(1, 2)
    worth = grouped.topk(3 if change == "three best" else 2, -1)[0]
    worth = worth.mean(-1) if change == "mean of two" else worth.sum(-1)
    if change == "least of two":
        worth = grouped.topk(2, -1)[0].amin(-1)
    if change == "sum of all":
        worth = grouped.sum(-1)
    best = worth.topk(2, -1, largest=change != "worst groups")[1]
    if change == "values of groups":
        best = (worth.topk(2, -1)[0] > 0).long()
    mask = torch.zeros_like(worth)
    mask = torch.ones_like(worth) if change == "scatter over ones" else mask
    mask = mask.scatter(1, best, 0 if change == "scatter of zeros" else 1)
    spread = mask.unsqueeze(1 if change == "spread in turns" else -1).expand(-1, 4, 4)
    fill = {"minus one": -1.0, "zero": 0.0}.get(change, float("-inf"))
    of = scores if change == "scores are masked" else choice
    elsewhere = spread.reshape(tokens, -1).bool()
    elsewhere = elsewhere if change == "other groups" else ~elsewhere
    ids = of.masked_fill(elsewhere, fill).topk(4, -1)[1]
    weights = (choice if change == "biased weights" else scores).gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


GROUPED = (
    "", "softmax", "scores of logits", "groups in turns", "three best", "mean of two", "least of two", "sum of all",
    "worst groups", "values of groups", "scatter over ones", "scatter of zeros", "other groups", "spread in turns",
    "minus one", "zero", "scores are masked", "biased weights",
)  # fmt: skip


@pytest.mark.parametrize("change", GROUPED)
def test_groups_one_step_away(change):
    logits, bias = random(6, EXPERTS, dtype=torch.float32), random(EXPERTS, dtype=torch.float32) / 4
    result = run(lambda *given: _groups(*given, change), logits, bias, names=ROUTERS)
    assert result.report.matches == (
        {"grouped_topk": 1} if change in ("", "softmax", "zero") else {}
    )
    assert torch.equal(result.expected[1], result.actual[1]), result.report
