"""Mixtures one step away from those that are found: none fires, and the reason is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor as T

from fusion_passes import registry
from fusion_passes.testing import fuse
from tests.fusion_passes.experts_code import Spelling, draw
from tests.fusion_passes.helpers import assert_same, misses
from tests.fusion_passes.moe_code import (
    EXPERTS,
    MARKS,
    OFFSETS,
    accumulated,
    added,
    gated,
    left_as_it_is,
    run,
    weighted,
)

pytestmark = pytest.mark.usefixtures("references")


WRONG: dict[str, Callable[[T], T]] = {
    "bins of more experts": lambda ids: torch.histc(ids.float(), EXPERTS, 0, EXPERTS + 1).cumsum(0),
    "bins from one": lambda ids: torch.histc(ids.float(), EXPERTS, 1, EXPERTS).cumsum(0),
    "from the left": lambda ids: torch.searchsorted(ids.sort().values, torch.arange(EXPERTS)),
    "one expert further": lambda ids: torch.searchsorted(
        ids.sort().values, torch.arange(1, EXPERTS + 1), right=True
    ),
    "counted twice": lambda ids: (2 * added(ids)).cumsum(0).clamp(max=ids.shape[0]),
    "twos": lambda ids: (
        torch.zeros(EXPERTS, dtype=torch.int64)
        .scatter_add(0, ids, torch.full_like(ids, 2))
        .cumsum(0)
        .clamp(max=ids.shape[0])
    ),
    "one more": lambda ids: (
        torch.ones(EXPERTS, dtype=torch.int64)
        .scatter_add(0, ids, torch.ones_like(ids))
        .cumsum(0)
        .clamp(max=ids.shape[0])
    ),
    "other experts": lambda ids: (ids[:, None] == torch.arange(1, EXPERTS + 1)).sum(0).cumsum(0),
    "of each token": lambda ids: (ids.view(-1, 2, 1) == torch.arange(EXPERTS)).sum(1).cumsum(0)[-1],
}


@pytest.mark.parametrize("offsets", WRONG)
def test_other_offsets_stay(offsets, monkeypatch):
    """Rows beyond the last offset hold anything, so that their values are not compared."""
    monkeypatch.setitem(OFFSETS, offsets, WRONG[offsets])
    result = run(offsets=offsets)
    assert result.report.matches == {}, result.report
    (reason,) = misses(result, "fused_moe")  # of both products
    assert "is not the number of pairs of each expert" in reason


def test_counts_from_before_a_graph_break_are_named():
    def counted(hidden, gate_up, down, weights, ids, counts):
        ends = counts.cumsum(0, dtype=torch.int32)
        order = ids.reshape(-1).argsort(stable=True)
        between = gated(torch._grouped_mm(hidden[order // 2], gate_up.transpose(1, 2), offs=ends))
        out = torch._grouped_mm(between, down.transpose(1, 2), offs=ends)
        return weighted(out[order.argsort()].view(*ids.shape, -1), weights, "sum")

    given = draw(Spelling(rounded_weights=True), experts=EXPERTS)
    inputs = (given.hidden, given.gate_up, given.down, given.weights, given.ids)
    counts = torch.bincount(given.ids.reshape(-1), minlength=EXPERTS)
    result = fuse(counted, *inputs, counts, only=[registry()["fused_moe"]])
    left_as_it_is(result, "computed outside of this graph", "torch.bincount")


def by_matrix(rows: T, weight: T, ids: T) -> T:
    return torch.bmm(weight[ids], rows.unsqueeze(-1)).squeeze(-1)


def test_a_router_by_the_largest_score_is_named():
    """As in Switch: the experts are fused, and the report says why the router is not."""

    def switch(hidden, gate_up, down):
        weights, ids = hidden[:, :EXPERTS].float().softmax(-1).max(-1)
        out = by_matrix(gated(by_matrix(hidden, gate_up, ids)), down, ids)
        return out * weights.unsqueeze(-1).to(hidden.dtype)

    given = draw(Spelling(), experts=EXPERTS)
    fusions = [registry()[name] for name in ("topk_softmax", "fused_moe")]
    result = fuse(switch, given.hidden, given.gate_up, given.down, only=fusions)
    assert result.report.matches == {"fused_moe": 1}, result.report
    assert "the top-k ids are made by max" in misses(result, "topk_softmax")[0]
    assert_same(result)


def test_an_activation_that_is_rounded_once_is_named():
    def wide(hidden, gate_up, down, weights, ids):
        gate, up = by_matrix(hidden, gate_up, ids[:, 0]).chunk(2, -1)
        between = (F.silu(gate.float()) * up.float()).to(hidden.dtype)
        return by_matrix(between, down, ids[:, 0]) * weights

    left_as_it_is(run(wide, top_k=1), "in torch.float32 and rounded to torch.bfloat16 once")


def test_activations_that_are_cut_to_odd_sizes_are_named():
    def cut(hidden, gate_up, down, weights, ids):
        between = F.pad(gated(by_matrix(hidden, gate_up, ids[:, 0])), (0, 96)).float() * 0.1
        return by_matrix(between.to(hidden.dtype)[:, :32], down, ids[:, 0]) * weights

    left_as_it_is(run(cut, top_k=1), "leaves 32 of 128 channels", "no multiples of 128")


def test_one_product_alone_is_named():
    """The second adds up the experts of a token, too, so that no pair has a row of its own."""

    def folded(hidden, gate_up, down, weights, ids):
        between = gated(torch.einsum("ti,tkoi->tko", hidden, gate_up[ids]))
        return torch.einsum("tko,tkio->ti", between * weights.unsqueeze(-1), down[ids])

    left_as_it_is(run(folded), "not in pairs", "a row of its own")


def of_rows(hidden: T, gate_up: T, down: T, ids: T, counts: T | None = None) -> tuple[T, T]:
    """The results of pairs sorted by expert, and the order that they are in. counts: where each expert ends."""
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    ends = (OFFSETS["compared"](flat) if counts is None else counts).to(torch.int32)
    between = gated(torch._grouped_mm(hidden[order // 2], gate_up.transpose(1, 2), offs=ends))
    return torch._grouped_mm(between, down.transpose(1, 2), offs=ends), order


def test_a_total_that_is_not_empty_before():
    def onto(hidden, gate_up, down, weights, ids):
        out, order = of_rows(hidden, gate_up, down, ids)
        return hidden.index_add(0, order // 2, out * weights.reshape(-1)[order].unsqueeze(-1))

    left_as_it_is(run(onto), "adds the experts' results to the input", "which is not 0")


def test_rows_added_to_other_tokens():
    def wrong(hidden, gate_up, down, weights, ids):
        out, order = of_rows(hidden, gate_up, down, ids)
        out = out * weights.reshape(-1)[order].unsqueeze(-1)
        return accumulated(out, torch.arange(10) // 2, 5, "index_add")

    left_as_it_is(run(wrong), "does not add each row to that of its token")


@pytest.mark.parametrize("how", ["amax", "mean"])
def test_another_reduction_than_a_sum(how):
    def reduced(hidden, gate_up, down, weights, ids):
        out, order = of_rows(hidden, gate_up, down, ids)
        out = (out * weights.reshape(-1)[order].unsqueeze(-1)).float()
        spread = (order // 2)[:, None].expand_as(out)
        return out.new_zeros(hidden.shape).scatter_reduce(0, spread, out, how).to(hidden.dtype)

    result = run(reduced)
    assert result.report.matches == {}, result.report
    assert "reads the experts' results" in misses(result, "fused_moe")[0]


def test_marks_of_ids_that_may_be_alike_are_no_counts():
    """Two of one token would leave one mark."""

    def block(hidden, gate_up, down, weights, ids):
        counts = MARKS["numbers"](ids).sum(0).cumsum(0)
        out, order = of_rows(hidden, gate_up, down, ids, counts)
        return weighted(out[order.argsort()].view(*ids.shape, -1), weights, "sum")

    left_as_it_is(run(block), "is not the number of pairs of each expert")


def test_experts_that_all_tokens_go_through_are_named():
    """Weights of 0 for those that were not chosen: nothing is routed."""

    def everywhere(hidden, gate_up, down, _weights, _ids):
        weights, ids = hidden[:, :EXPERTS].float().softmax(-1).topk(2)
        dense = torch.zeros(hidden.shape[0], EXPERTS).scatter(1, ids, weights).to(hidden.dtype)
        between = gated(torch.einsum("th,eoh->teo", hidden, gate_up))
        return torch.einsum("teo,eho,te->th", between, down, dense)

    left_as_it_is(run(everywhere), "no product goes by the experts that topk", "read by scatter")
