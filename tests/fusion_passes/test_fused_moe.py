"""The experts of a mixture of experts, in every spelling, and one step outside of it."""

from __future__ import annotations

import re

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fusion_passes import registry
from fusion_passes.testing import fuse
from tests.fusion_passes.experts_code import Spelling, draw, mixture
from tests.fusion_passes.helpers import assert_same, misses

pytestmark = pytest.mark.usefixtures("references")

ONLY = ("fused_moe",)


def few(examples):
    """Fewer examples than the profile, as each compiles; as many as it says in nightly runs."""
    profile = hypothesis.settings().max_examples
    return hypothesis.settings(max_examples=examples if profile < 100 else profile)


GATED = ("silu_mul", "gelu_tanh_mul", "clamped_swiglu", "clamped_silu_mul")


@st.composite
def spellings(draw: st.DrawFn) -> Spelling:
    activation = draw(st.sampled_from((*GATED, "relu2")))
    return Spelling(
        form=draw(st.sampled_from(("grouped", "batched"))),
        activation=activation,
        interleaved=draw(st.booleans()) and activation != "relu2",
        transposed=draw(st.booleans()),
        bias=draw(st.booleans()),
        order=draw(st.sampled_from(("index_put", "scatter", "argsort"))),
        tokens=draw(st.sampled_from(("divided", "counted"))),
        mask=draw(st.booleans()),
        weigh_last=draw(st.booleans()),
        rounded_weights=draw(st.booleans()),
    )


def run(spelling: Spelling, fn=None, dynamic=None, **sizes):
    return fuse(
        fn or mixture(spelling),
        *draw(spelling, **sizes).tensors,
        only=[registry()[name] for name in ONLY],
        dynamic=dynamic,
    )


@few(15)
@given(
    spelling=spellings(),
    tokens=st.sampled_from((1, 2, 7)),
    top_k=st.integers(1, 4),
    experts=st.sampled_from((4, 5, 9)),
    hidden=st.sampled_from((32, 48)),
    width=st.sampled_from((16, 40)),
    seed=st.integers(0, 99),
)
def test_every_spelling_is_one_op(spelling, tokens, top_k, experts, hidden, width, seed):
    sizes = {"tokens": tokens, "top_k": top_k, "experts": experts, "hidden": hidden, "width": width}
    result = run(spelling, seed=seed, **sizes)
    assert result.report.matches == {"fused_moe": 1}, result.report
    assert_same(result)
    (site,) = result.report.sites
    found = {key: int(value) for key, value in site.sizes.items()}
    assert (found["num_tokens"], found["top_k"], found["num_experts"]) == (tokens, top_k, experts)
    assert (found["hidden_size"], found["intermediate_size"]) == (hidden, width)
    assert site.bytes_saved_here > 0


@few(5)
@given(spelling=spellings(), tokens=st.sampled_from((3, 7)))
def test_symbolic_tokens(spelling, tokens):
    hidden, *rest, _, _ = draw(spelling, tokens=tokens, experts=5).tensors
    torch._dynamo.mark_dynamic(hidden, 0)

    def block(hidden, *rest):
        weights, ids = hidden[:, :5].float().softmax(-1).topk(2)
        weights = weights.to(hidden.dtype) if spelling.rounded_weights else weights
        return mixture(spelling)(hidden, *rest, weights, ids)

    result = fuse(block, hidden, *rest, only=[registry()["fused_moe"]])
    assert result.report.matches == {"fused_moe": 1}, result.report
    assert "s" in result.report.sites[0].sizes["num_tokens"]
    assert_same(result)


def test_float16():
    result = run(Spelling(form="batched"), dtype=torch.float16)
    assert result.report.matches == {"fused_moe": 1}, result.report
    assert_same(result)


def test_counts_by_bincount():
    """Its result has a size that depends on data, except to a graph that asked for it at least."""
    spelling = Spelling(counts="bincount")
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        result = run(spelling)
    assert result.report.matches in ({"fused_moe": 1}, {})
    if not result.report.matches:
        assert "is not the number of pairs of each expert" in misses(result, "fused_moe")[0]
    assert_same(result)


def test_tokens_that_may_be_of_another_number_stay():
    """Two sizes that nothing in the graph says are one: no guard is made of it."""
    inputs = draw(Spelling(), tokens=7).tensors
    for index in (0, 5, 6):
        torch._dynamo.mark_dynamic(inputs[index], 0)
    result = fuse(mixture(Spelling()), *inputs, only=[registry()["fused_moe"]])
    assert result.report.matches == {}
    assert "is not the hidden states of each pair's token" in misses(result, "fused_moe")[0]


# ---- one step outside ---------------------------------------------------------------------------------------------


# of each row's expert, but not added as it is
BIASES = {
    "bias taken off": torch.sub,
    "bias added twice": lambda rows, bias: torch.add(rows, bias, alpha=2),
    "bias times": torch.mul,
}


def grouped(tensors, change: str = ""):
    """The usual spelling, with one thing that is not as it should be."""
    hidden, gate_up, down, bias, _, weights, ids = tensors
    (num_tokens, top_k), experts = ids.shape, gate_up.shape[0]
    if change == "clamped ids":  # another expert, for some
        ids = ids.clamp(max=experts - 2)
    flat, order = ids.reshape(-1).sort(descending=change == "descending")
    bins = experts + 1 if change == "bins" else experts
    counted = torch.histc(flat.float(), bins=bins, min=0, max=bins - 1)
    offsets = counted.cumsum(0, dtype=torch.int32)[:experts]
    rows = hidden[order % num_tokens if change == "tokens" else order // top_k]
    if change == "scaled rows":
        rows = rows * 2
    up = torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=offsets)
    if change == "bias by pair":
        up = up + bias[ids.reshape(-1)]
    if change in BIASES:
        up = BIASES[change](up, bias[ids.reshape(-1).sort().values])
    gate, value = up.chunk(2, -1)
    if change == "quarters":
        quarter = up.shape[-1] // 4
        gate, value = up[:, :quarter].repeat(1, 2), up[:, quarter : 2 * quarter].repeat(1, 2)
    if change == "halves":
        gate, value = value, gate
    between = F.gelu(gate) * value if change == "activation" else F.silu(gate) * value
    if change == "norm between":
        between = F.rms_norm(between, (between.shape[-1],))
    if change == "other ids":
        offsets = torch.histc(
            (ids.reshape(-1).sort().values - 1).clamp(min=0).float(),  # every row has a matrix
            bins=experts,
            min=0,
            max=experts - 1,
        ).cumsum(0, dtype=torch.int32)
    out = torch._grouped_mm(between, down.transpose(1, 2), offs=offsets)
    if change == "norm after":
        out = F.rms_norm(out, (out.shape[-1],))
    applied = weights.reshape(-1)
    if change == "wide product":
        applied, out = applied.bfloat16(), out.float()
    if change != "weights by pair":
        applied = applied[order]
    if change != "no weights":
        out = out * applied.unsqueeze(-1)
    if change == "rounded before the sum":
        out = out.to(hidden.dtype)
    if change == "index_add":
        total = hidden.new_zeros(num_tokens, hidden.shape[1])
        return total.index_add(0, order // top_k, out.to(hidden.dtype))
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    if change != "not put back":
        out = out[order if change == "put back by order" else inverse]
    pairs = out.view(num_tokens, top_k, -1)
    result = pairs.amax(1) if change == "largest" else pairs.sum(1)
    if change == "over tokens":
        result = pairs.sum(0)
    if change == "float32":
        return result
    result = result.to(hidden.dtype)
    return (result, up) if change == "two outputs" else result


CHANGES = {
    "descending": "is not the number of pairs of each expert, added up",
    "bins": "is not the number of pairs of each expert, added up",
    "tokens": "is not the hidden states of each pair's token",
    "bias by pair": "the activation reads add",
    "bias taken off": "the activation reads sub",
    "bias added twice": "the activation reads add",
    "bias times": "the activation reads mul",
    "halves": "the gate, is not the first half of the product's channels",
    "activation": "is none of the activations that are fused: silu_mul",
    "norm between": "is none of the activations that are fused",
    "other ids": "go by the top-k ids sub, not in pairs",
    "norm after": r"rms_norm \(rms_norm\w*\) reads the experts' results",
    "weights by pair": "is not the top-k weights sorted by expert",
    "no weights": "sums rows that no top-k weight was applied to",
    "rounded before the sum": "rounds each weighted row to torch.bfloat16",
    "index_add": "rounds each weighted row to torch.bfloat16",
    "not put back": "sums rows that are still sorted by expert",
    "put back by order": "does not put the rows back in order",
    "largest": "reads the experts' results, where the product",
    "quarters": "gate or up, is not a half of the product's channels",
    "wide product": "multiplies in torch.float32 by torch.bfloat16 weights",
    "over tokens": "does not sum over the experts of a token",
    "float32": "is torch.float32 and read by|is read by nothing but the graph's output",
    "two outputs": r"_grouped_mm\w* inside of it is also used by output",
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_step_outside(change):
    spelling = Spelling(rounded_weights=False)
    tensors = draw(spelling, tokens=4, top_k=4).tensors
    result = fuse(lambda *given: grouped(given, change), *tensors, only=[registry()["fused_moe"]])
    assert result.report.matches == {}, result.report
    reasons = misses(result, "fused_moe")
    assert any(re.search(CHANGES[change], reason) for reason in reasons), reasons
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("change", ["", "scaled rows"])
def test_what_is_done_before_the_experts_stays_outside(change):
    """The rows are what they multiply, whatever made them of the hidden states; then it is no token's row."""
    tensors = draw(Spelling()).tensors
    result = fuse(lambda *given: grouped(given, change), *tensors, only=[registry()["fused_moe"]])
    assert result.report.matches == ({"fused_moe": 1} if not change else {})
    assert_same(result)


def test_ids_that_were_changed_are_the_ids():
    """A clamp that can change an expert is a part of what chose it."""
    tensors = draw(Spelling()).tensors
    result = fuse(
        lambda *given: grouped(given, "clamped ids"), *tensors, only=[registry()["fused_moe"]]
    )
    assert result.report.matches == {"fused_moe": 1}
    (fused,) = [n for n in result.after.graph.nodes if "fused_moe" in str(n.target)]
    assert "clamp" in fused.args[4].name
    assert_same(result)


def test_three_products_by_one_routing():
    """Gate and up as products of their own, of the two halves of one weight."""

    def separate(hidden, gate_up, down, _bias, _other, weights, ids):
        gate, up = gate_up.chunk(2, 1)
        flat = ids.reshape(-1)
        rows = hidden.repeat_interleave(ids.shape[1], 0).unsqueeze(-1)
        between = F.silu(torch.bmm(gate[flat], rows)) * torch.bmm(up[flat], rows)
        out = torch.bmm(down[flat], between).squeeze(-1) * weights.reshape(-1, 1)
        return out.view(*ids.shape, -1).sum(1).to(hidden.dtype)

    result = fuse(separate, *draw(Spelling()).tensors, only=[registry()["fused_moe"]])
    assert result.report.matches == {"fused_moe": 1}
    assert_same(result)


def test_float32_stays():
    result = run(Spelling(form="batched"), dtype=torch.float32)
    assert result.report.matches == {}
    assert "is torch.float32; supported: bfloat16, float16" in misses(result, "fused_moe")[0]


def test_attention_is_no_expert():
    def attention(q, k, v):
        return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)).float(), -1).to(v.dtype), v)

    q, k, v = (torch.randn(2, 5, 8, dtype=torch.bfloat16) for _ in range(3))
    result = fuse(attention, q, k, v, only=[registry()["fused_moe"]])
    assert result.report.matches == {}
    assert misses(result, "fused_moe") == []


def test_a_walk_that_raises_is_reported(monkeypatch):
    from fusion_passes.experts import block

    def broken(*_):
        raise RuntimeError("nobody expects this")

    monkeypatch.setattr(block, "find", broken)
    with pytest.warns(UserWarning, match="the find raised RuntimeError"):
        result = run(Spelling())
    assert result.report.matches == {}
    assert "nobody expects this" in misses(result, "fused_moe")[0]


def test_two_blocks_of_one_routing_are_not_mixed_up():
    """Two layers may go by the same ids, as where a token's id chooses its experts."""
    spelling = Spelling(form="batched")
    tensors = draw(spelling).tensors

    def twice(*given):
        first = mixture(spelling)(*given)
        return mixture(spelling)(first, *given[1:])

    result = fuse(twice, *tensors, only=[registry()["fused_moe"]])
    assert result.report.matches == {"fused_moe": 2}
    assert_same(result)
