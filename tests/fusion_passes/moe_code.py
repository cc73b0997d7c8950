"""Mixtures of experts as public code writes them: how pairs are counted, rows put in order, and results added up."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor as T

from fusion_passes import registry
from fusion_passes.testing import fuse
from fusion_passes.testing.equivalence import Result
from tests.fusion_passes.experts_code import Spelling, draw
from tests.fusion_passes.helpers import assert_same, misses

EXPERTS = 6


def added(ids: T) -> T:
    return torch.zeros(EXPERTS, dtype=torch.int64).scatter_add(0, ids, torch.ones_like(ids))


def put(ids: T) -> T:
    return torch.zeros(EXPERTS, dtype=torch.int32).index_add(
        0, ids, torch.ones_like(ids, dtype=torch.int32)
    )


def searched(ids: T) -> T:
    return torch.searchsorted(ids.sort().values, torch.arange(EXPERTS), right=True)


def searched_from_one(ids: T) -> T:
    return torch.searchsorted(ids.sort().values, torch.arange(1, EXPERTS + 1))


OFFSETS: dict[str, Callable[[T], T]] = {
    "histc to the last expert": lambda ids: torch.histc(
        ids.float(), EXPERTS, 0, EXPERTS - 1
    ).cumsum(0),
    "histc to the number of experts": lambda ids: torch.histc(
        ids.float(), EXPERTS, 0, EXPERTS
    ).cumsum(0),
    "one_hot": lambda ids: F.one_hot(ids, EXPERTS).sum(0).cumsum(0),
    "one_hot of tokens": lambda ids: F.one_hot(ids.view(-1, 2), EXPERTS).sum((0, 1)).cumsum(0),
    "compared": lambda ids: (ids[:, None] == torch.arange(EXPERTS)).sum(0).cumsum(-1),
    "scatter_add": lambda ids: added(ids).cumsum(0),
    "index_add": lambda ids: put(ids).cumsum(0),
    "searchsorted": searched,
    "searchsorted from one": searched_from_one,
}

MARKS = {
    "numbers": lambda ids: torch.zeros(len(ids), EXPERTS).scatter(1, ids, 1.0),
    "in place": lambda ids: ids.new_zeros(len(ids), EXPERTS).scatter_(1, ids, 1),
    "a map": lambda ids: torch.zeros(len(ids), EXPERTS, dtype=torch.bool).scatter(1, ids, True),
}


def put_back(rows: T, order: T, how: str) -> T:
    if how == "index":
        return rows[order.argsort()]
    if how == "index_put":
        return torch.empty_like(rows).index_put((order,), rows)
    return torch.zeros_like(rows).scatter(0, order[:, None].expand_as(rows), rows)


def weighted(rows: T, weights: T, how: str) -> T:
    """[T, K, H] and [T, K] -> [T, H]"""
    if how == "bmm":
        return torch.bmm(weights.unsqueeze(1), rows).squeeze(1)
    if how == "matmul":
        return (rows.transpose(1, 2) @ weights.unsqueeze(-1)).squeeze(-1)
    if how == "einsum":
        return torch.einsum("tkh,tk->th", rows, weights)
    return (rows * weights.unsqueeze(-1)).sum(1)


def accumulated(
    rows: T, tokens: T, num_tokens: int, how: str, dtype: torch.dtype | None = None
) -> T:
    total = rows.new_zeros(num_tokens, rows.shape[1], dtype=dtype)
    rows = rows.to(total.dtype)
    if how == "index_add":
        return total.index_add(0, tokens, rows)
    if how == "index_put":
        return total.index_put((tokens,), rows, accumulate=True)
    spread = tokens[:, None].expand_as(rows)
    if how == "scatter_add":
        return total.scatter_add(0, spread, rows)
    return total.scatter_reduce(0, spread, rows, "sum", include_self=how == "scatter_reduce")


ACCUMULATIONS = ("index_add", "index_put", "scatter_add", "scatter_reduce", "scatter_reduce alone")


def gated(rows: T) -> T:
    gate, up = rows.chunk(2, -1)
    return F.silu(gate) * up


def grouped(
    hidden,
    gate_up,
    down,
    weights,
    ids,
    offsets="compared",
    repeat=False,
    along=False,
    back="index",
    total="sum",
    wide=False,
    rounding="floor",
):
    """One spelling. ``total``: of `weighted`, or of `accumulated`; wide: rows are added up in float32."""
    num_tokens, top_k = ids.shape
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    ends = OFFSETS[offsets](flat).to(torch.int32)
    tokens = order.div(top_k, rounding_mode=rounding)
    rows = hidden.repeat_interleave(top_k, 0)[order] if repeat else hidden[tokens]
    rows = torch.take_along_dim(hidden, tokens[:, None], 0) if along else rows
    between = gated(torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=ends))
    out = torch._grouped_mm(between, down.transpose(1, 2), offs=ends)
    if total in ACCUMULATIONS:
        out = out * weights.reshape(-1)[order].unsqueeze(-1)
        found = accumulated(out, tokens, num_tokens, total, torch.float32 if wide else None)
        return found.to(hidden.dtype)
    return weighted(put_back(out, order, back).view(num_tokens, top_k, -1), weights, total)


def run(fn=grouped, tokens: int = 5, top_k: int = 2, dtype=torch.bfloat16, **how) -> Result:
    given = draw(
        Spelling(rounded_weights=True), tokens=tokens, top_k=top_k, experts=EXPERTS, dtype=dtype
    )
    inputs = (given.hidden, given.gate_up, given.down, given.weights, given.ids)
    return fuse(lambda *tensors: fn(*tensors, **how), *inputs, only=[registry()["fused_moe"]])


def assert_fused(result: Result) -> None:
    assert result.report.matches == {"fused_moe": 1}, result.report
    left = {str(node.target) for node in result.after.graph.nodes}
    assert not left & {"aten._grouped_mm.default", "aten.bmm.default", "aten.cumsum.default"}, left
    assert_same(result)


def left_as_it_is(result: Result, *words: str) -> None:
    assert result.report.matches == {}, result.report
    reasons = misses(result, "fused_moe")
    assert any(all(word in reason for word in words) for reason in reasons), reasons
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert torch.equal(expected, actual)
