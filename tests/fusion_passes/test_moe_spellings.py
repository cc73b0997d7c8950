"""Mixtures of experts as public code writes them: how pairs are counted, rows put in order, and results added up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor as T

from fusion_passes import registry
from fusion_passes.testing import fuse
from fusion_passes.testing.equivalence import Result
from tests.fusion_passes.experts_code import Spelling, draw
from tests.fusion_passes.helpers import assert_same, misses

pytestmark = pytest.mark.usefixtures("references")

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
    return total.scatter_add(0, tokens[:, None].expand_as(rows), rows)


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
    between = gated(torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=ends))
    out = torch._grouped_mm(between, down.transpose(1, 2), offs=ends)
    if total in ("index_add", "index_put", "scatter_add"):
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


@pytest.mark.parametrize("offsets", OFFSETS)
def test_pairs_are_counted(offsets):
    assert_fused(run(offsets=offsets))


@pytest.mark.parametrize("total", ["sum", "bmm", "matmul", "einsum"])
@pytest.mark.parametrize("back", ["index", "index_put", "scatter"])
def test_rows_are_put_back_and_weighted(back, total):
    assert_fused(run(back=back, total=total, tokens=7, top_k=3))


@pytest.mark.parametrize("total", ["bmm", "matmul", "einsum"])
def test_a_product_with_the_weights_rounds_once(total):
    """Its products are not rounded one by one, as those of a multiplication are: the op gets float32 weights."""
    result = run(total=total, top_k=4)
    (fused,) = [n for n in result.after.graph.nodes if "fused_moe" in str(n.target)]
    assert fused.args[3].meta["val"].dtype is torch.float32
    (expected,), (actual,), (judge,) = result.expected, result.actual, result.judge
    ours, eagers = (float((side.double() - judge).norm()) for side in (actual, expected))
    assert ours <= 1.02 * eagers + 1e-6 * float(judge.norm())


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("top_k", [1, 2])
def test_tokens_and_experts(tokens, top_k, repeat):
    assert_fused(run(tokens=tokens, top_k=top_k, repeat=repeat))


@pytest.mark.parametrize("total", ["index_add", "index_put", "scatter_add"])
@pytest.mark.parametrize(("top_k", "wide"), [(1, False), (2, False), (2, True), (4, True)])
def test_rows_are_added_to_their_tokens(total, top_k, wide):
    assert_fused(run(total=total, top_k=top_k, wide=wide))


@pytest.mark.parametrize("total", ["sum", "index_add"])
def test_pairs_divided_towards_zero_are_tokens(total):
    assert_fused(run(total=total, rounding="trunc"))


@pytest.mark.parametrize("tokens", [2, 6])
@pytest.mark.parametrize("top_k", [1, 2])
def test_tokens_keep_their_two_dimensions(tokens, top_k):
    """Matrices are gathered for [batch, sequence, top_k], and the sum is over the last but one of four."""

    def batches(hidden, gate_up, down, weights, ids):
        hidden, weights, ids = (t.view(2, -1, t.shape[-1]) for t in (hidden, weights, ids))
        rows = hidden[:, :, None, None, :] @ gate_up.transpose(1, 2)[ids]
        out = (gated(rows) @ down.transpose(1, 2)[ids]).squeeze(-2)
        return (out * weights.unsqueeze(-1)).sum(-2)

    assert_fused(run(batches, tokens=tokens, top_k=top_k))


@pytest.mark.parametrize("total", ["index_add", "index_put", "scatter_add"])
def test_more_rows_than_two_are_rounded_one_after_the_other(total):
    """What a sum over the experts is not."""
    result = run(total=total, top_k=3)
    assert result.report.matches == {}
    assert "adds up 3 rows a token in torch.bfloat16" in misses(result, "fused_moe")[0]


def all_of_a_token(hidden, gate_up, down, weights, ids, turned=False):
    """Every product of a token at once: einsum makes one batched product of it."""
    between = gated(torch.einsum("ti,tkoi->tko", hidden, gate_up[ids]))
    if turned:
        out = (down[ids] @ between.unsqueeze(-1)).squeeze(-1)
    else:
        out = torch.einsum("tko,tkio->tki", between, down[ids])
    return torch.einsum("tki,tk->ti", out, weights)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("top_k", [1, 3])
def test_einsum(tokens, top_k, turned):
    assert_fused(run(all_of_a_token, tokens=tokens, top_k=top_k, turned=turned))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("form", ["grouped", "batched"])
def test_one_expert_a_token_takes_no_sum(form, wide):
    """As in Switch: the weighted row is the result."""

    def switch(hidden, gate_up, down, weights, ids):
        flat, weights = ids.reshape(-1), weights.reshape(-1, 1)
        weights = weights.float() if wide else weights
        if form == "batched":
            between = gated(torch.bmm(gate_up[flat], hidden.unsqueeze(-1)).squeeze(-1))
            return (torch.bmm(down[flat], between.unsqueeze(-1)).squeeze(-1) * weights).to(
                hidden.dtype
            )
        order = flat.argsort(stable=True)
        ends = OFFSETS["compared"](flat).to(torch.int32)
        between = gated(torch._grouped_mm(hidden[order], gate_up.transpose(1, 2), offs=ends))
        out = torch._grouped_mm(between, down.transpose(1, 2), offs=ends) * weights[order]
        return put_back(out, order, "index").to(hidden.dtype)

    assert_fused(run(switch, top_k=1))


def test_float16():
    assert_fused(run(all_of_a_token, dtype=torch.float16))


# ---- one step outside ---------------------------------------------------------------------------------------------


def left_as_it_is(result: Result, *words: str) -> None:
    assert result.report.matches == {}, result.report
    reasons = misses(result, "fused_moe")
    assert any(all(word in reason for word in words) for reason in reasons), reasons
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert torch.equal(expected, actual)


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
    assert "is not the number of pairs of each expert" in misses(result, "fused_moe")[0]


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


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_weights_before_the_experts(top_k):
    """One weight has gate and up; where these are two, see `test_experts_apart`."""

    def before(hidden, gate_up, down, weights, ids):
        order = ids.reshape(-1).argsort(stable=True)
        ends = OFFSETS["compared"](ids.reshape(-1)).to(torch.int32)
        rows = hidden[order // top_k] * weights.reshape(-1)[order].unsqueeze(-1)
        out = torch._grouped_mm(
            gated(torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=ends)),
            down.transpose(1, 2),
            offs=ends,
        )
        return out[order.argsort()].view(*ids.shape, -1).sum(1)

    assert_fused(run(before, top_k=top_k))


def test_a_total_that_is_not_empty_before():
    def onto(hidden, gate_up, down, weights, ids):
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        ends = OFFSETS["compared"](flat).to(torch.int32)
        between = gated(torch._grouped_mm(hidden[order // 2], gate_up.transpose(1, 2), offs=ends))
        out = torch._grouped_mm(between, down.transpose(1, 2), offs=ends)
        return hidden.index_add(0, order // 2, out * weights.reshape(-1)[order].unsqueeze(-1))

    left_as_it_is(run(onto), "adds the experts' results to the input", "which is not 0")


def test_rows_added_to_other_tokens():
    def wrong(hidden, gate_up, down, weights, ids):
        flat = ids.reshape(-1)
        order = flat.argsort(stable=True)
        ends = OFFSETS["compared"](flat).to(torch.int32)
        between = gated(torch._grouped_mm(hidden[order // 2], gate_up.transpose(1, 2), offs=ends))
        out = torch._grouped_mm(between, down.transpose(1, 2), offs=ends)
        out = out * weights.reshape(-1)[order].unsqueeze(-1)
        return accumulated(out, torch.arange(10) // 2, 5, "index_add")

    left_as_it_is(run(wrong), "does not add each row to that of its token")


def test_experts_that_all_tokens_go_through_are_named():
    """Weights of 0 for those that were not chosen: nothing is routed."""

    def everywhere(hidden, gate_up, down, _weights, _ids):
        weights, ids = hidden[:, :EXPERTS].float().softmax(-1).topk(2)
        dense = torch.zeros(hidden.shape[0], EXPERTS).scatter(1, ids, weights).to(hidden.dtype)
        between = gated(torch.einsum("th,eoh->teo", hidden, gate_up))
        return torch.einsum("teo,eho,te->th", between, down, dense)

    left_as_it_is(run(everywhere), "no product goes by the experts that topk", "read by scatter")
