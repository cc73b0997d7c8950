"""Mixtures of experts as public code writes them are found, and the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor as T

from fusion_passes import registry, torch_internals
from fusion_passes.experts.activations import part_of
from fusion_passes.operations import is_tensor
from fusion_passes.testing import fuse
from fusion_passes.testing.equivalence import Result
from tests.fusion_passes.experts_code import Spelling, draw
from tests.fusion_passes.helpers import assert_same, everything, misses
from tests.fusion_passes.moe_code import (
    ACCUMULATIONS,
    EXPERTS,
    MARKS,
    OFFSETS,
    assert_fused,
    gated,
    left_as_it_is,
    put_back,
    run,
    weighted,
)

pytestmark = pytest.mark.usefixtures("references")


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


@pytest.mark.parametrize("total", ACCUMULATIONS)
@pytest.mark.parametrize(("top_k", "wide"), [(1, False), (2, False), (2, True), (4, True)])
def test_rows_are_added_to_their_tokens(total, top_k, wide):
    assert_fused(run(total=total, top_k=top_k, wide=wide))


@pytest.mark.parametrize("tokens", [1, 5])
def test_rows_are_taken_along_their_tokens(tokens):
    assert_fused(run(along=True, tokens=tokens))


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_pairs_are_counted_by_marks_of_what_a_router_chose(marks, scoring):
    """As DeepSeek's own code and Megatron's maps: the ids of a token differ, so each is a mark of its own."""

    def block(hidden, gate_up, down, _weights, _ids):
        scores = hidden[:, :EXPERTS].float()
        scores = scores.softmax(-1) if scoring == "softmax" else scores.sigmoid()
        weights, ids = scores.topk(2)
        ends = MARKS[marks](ids).sum(0).cumsum(0).to(torch.int32)
        order = ids.reshape(-1).argsort(stable=True)
        between = gated(torch._grouped_mm(hidden[order // 2], gate_up.transpose(1, 2), offs=ends))
        out = torch._grouped_mm(between, down.transpose(1, 2), offs=ends)
        back = out[order.argsort()].view(*ids.shape, -1)
        return weighted(back, weights.to(out.dtype), "sum")

    given = draw(Spelling(rounded_weights=True), experts=EXPERTS)
    inputs = (given.hidden, given.gate_up, given.down, given.weights, given.ids)
    result = fuse(block, *inputs, only=everything())  # routers first: what counts the ids is theirs
    assert result.report.matches == {f"topk_{scoring}": 1, "fused_moe": 1}, result.report
    assert_same(result)


CUTS: dict[str, Callable[[T], tuple[T, ...]]] = {
    "chunk": lambda rows: rows.chunk(2, -1),
    "rows of a view": lambda rows: rows.unflatten(-1, (2, -1)).unbind(-2),
    "one row of it each": lambda rows: tuple(rows.view(len(rows), 2, -1)[:, i] for i in (0, -1)),
    "columns of a view": lambda rows: rows.unflatten(-1, (-1, 2)).unbind(-1),
    "one column of it each": lambda rows: tuple(
        rows.view(len(rows), -1, 2)[..., i] for i in (0, 1)
    ),
}


def of_a_cut(cut: Callable[[T], tuple[T, ...]]) -> Result:
    def block(hidden, gate_up, down, weights, ids):
        order = ids.reshape(-1).argsort(stable=True)
        ends = OFFSETS["compared"](ids.reshape(-1)).to(torch.int32)
        gate, up = cut(torch._grouped_mm(hidden[order // 2], gate_up.transpose(1, 2), offs=ends))
        out = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        return weighted(out[order.argsort()].view(*ids.shape, -1), weights, "sum")

    given = draw(Spelling(rounded_weights=True), experts=EXPERTS)
    inputs = (given.hidden, given.gate_up, given.down, given.weights, given.ids)
    return fuse(block, *inputs, only=[registry()["fused_moe"]])


@pytest.mark.parametrize("cut", CUTS)
def test_gate_and_up_are_cut(cut):
    result = of_a_cut(CUTS[cut])
    assert_fused(result)
    (fused,) = [n for n in result.after.graph.nodes if "fused_moe" in str(n.target)]
    assert fused.kwargs.get("interleaved", False) == ("column" in cut)


@pytest.mark.parametrize("cut", CUTS)
def test_the_other_way_around_is_named(cut):
    left_as_it_is(of_a_cut(lambda rows: CUTS[cut](rows)[::-1]), "is not the first half")


@pytest.mark.parametrize("cut", ["chunk", "tensor_split"])
def test_a_part_of_a_width_that_is_known_only_at_run_time(cut):
    """As where weights are inputs: the sizes that a split is given, and a slice, are nodes then."""
    x = torch.randn(5, 64)
    (graph,) = torch_internals.capture(lambda x: getattr(x, cut)(2, -1)[1] + 1, x, dynamic=True)
    found = [node for node in graph.graph.nodes if is_tensor(node) and part_of(node) is not None]
    node = found[-1]
    part = part_of(node)
    assert part is not None
    (width,) = part.start.free_symbols
    assert part.start.subs(width, 64) == 32


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


@pytest.mark.parametrize("total", ACCUMULATIONS)
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
