"""two_batch_overlap and gather_tokens: where they fire, what they leave, and what the graph returns."""

from __future__ import annotations

import copy
from math import comb
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

import custom_ops
import fusion_passes
from custom_ops.expert_parallel import groups
from fusion_passes import settings
from fusion_passes.passes import gather_tokens
from tests.custom_ops.helpers import assert_same_bits
from tests.fusion_passes.expert_parallel import graphs
from tests.fusion_passes.expert_parallel.graphs import fp8_experts, layer, tokens

ONE_GROUP = examples(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
BOTH = ("gather_tokens", "two_batch_overlap")
QUANTIZE = "quantize_before_dispatch"


def rewrite(fn: Any, *args: Tensor, only: tuple[str, ...], **how: Any) -> graphs.Rewritten:
    """With these fusions, as somebody named them, on a CPU."""
    with settings.patch(allow_reference=True, **dict.fromkeys(only, True)):
        return graphs.rewrite(fn, *args, only=only, **how)


def whole_op(result: Any) -> Any:
    (node,) = (n for n in result.after.graph.nodes if "ep_fused_moe" in str(n.target))
    return node


def experts16(inner: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Weights of small whole numbers for tokens of 16 channels, so that sums are exact in batches of any size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"gate_up": (4, inner, 16), "down": (4, 16, inner)}
    return {
        name: torch.randint(-1, 2, shape, generator=generator).bfloat16()
        for name, shape in sizes.items()
    }


def block(group: str, given: dict[str, Tensor], max_tokens: int = 0, **how: Any):
    """dispatch -> 16-bit experts -> combine."""

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = custom_ops.ep_dispatch(x, None, ids, weights, 4, group, max_tokens=max_tokens)
        words = {"activation": "relu2", **how}
        y = custom_ops.fused_moe(out[0], given["gate_up"], given["down"], out[3], out[2], **words)
        return custom_ops.ep_combine(y, *out[5:], group, max_tokens=max_tokens)

    return run


def test_experts_with_two_weights_stay_three_ops(alone):
    given = experts16(16)
    gate, up = given["gate_up"].chunk(2, 1)
    narrow = {"gate_up": gate, "down": given["down"][..., :8].contiguous()}
    run = block(alone, narrow, up=up, activation="silu_mul")
    result = rewrite(run, *drawn(7), only=BOTH)
    targets = {str(node.target) for node in result.after.graph.nodes}
    assert "custom_ops.ep_dispatch.default" in targets
    assert any("two weights" in miss.reason for miss in result.report.near_misses), result.report


def drawn(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed * 1000 + count)
    x = torch.randint(-2, 3, (count, 16), generator=generator).bfloat16()
    ids = torch.rand(count, 4, generator=generator).argsort(1)[:, :2].contiguous()
    return x, ids, torch.randint(0, 3, (count, 2), generator=generator).float()


@ONE_GROUP
@given(
    count=st.sampled_from([1, 2, 7, 12]),
    max_tokens=st.sampled_from([0, 12]),
    only=st.sampled_from([BOTH[:1], BOTH[1:], BOTH]),
    least=st.sampled_from([1, 7]),
    dynamic=st.booleans(),
)
def test_one_op_with_the_same_bits(alone, count, max_tokens, only, least, dynamic):
    with settings.patch(overlap_from=least):
        result = rewrite(
            block(alone, experts16(), max_tokens), *drawn(count), only=only, dynamic=dynamic
        )
    assert result.report.matches == dict.fromkeys(only, 1)
    assert result.calls() == ["ep_fused_moe"]
    how = whole_op(result).kwargs
    assert how.get("split_from", 0) == (least if "two_batch_overlap" in only else 0)
    assert how.get("exchange", "dispatch") == ("gather" if "gather_tokens" in only else "dispatch")
    assert how["max_tokens"] == max_tokens
    ran = "gather" if "gather_tokens" in only else "two_batches"
    for site in result.report.sites:
        assert site.implementations == (f"ep_fused_moe:{ran}", "fused_moe:reference")
    in_graphs = torch.Tag.cudagraph_unsafe not in whole_op(result).target.tags
    assert in_graphs == ("gather_tokens" in only and max_tokens > 0)
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("max_tokens", [0, 16])
def test_after_quantizing_first(alone, max_tokens):
    """Codes and their scales travel in either half."""
    fn = layer(alone, 4, fp8_experts(), max_tokens)
    result = rewrite(fn, *tokens(8), only=(QUANTIZE, *BOTH))
    assert result.report.matches == dict.fromkeys((QUANTIZE, *BOTH), 1)
    assert result.calls() == ["group_quant", "ep_fused_moe"]
    x, scale = whole_op(result).args[:2]
    assert x.meta["val"].dtype == torch.float8_e4m3fn
    assert scale.meta["val"].shape == (8, 2)
    assert_same_bits(result.actual[0], result.expected[0])


def test_words_of_the_experts_are_kept(alone):
    fn = layer(alone, 4, fp8_experts(), activation="gelu_tanh_mul", min_amax=1e-4)
    result = rewrite(fn, *tokens(4), only=BOTH)
    kept = whole_op(result).kwargs
    assert kept["activation"] == "gelu_tanh_mul"
    assert kept["min_amax"] == 1e-4
    assert {"gate_up_scale", "down_scale"} <= kept.keys()


@pytest.mark.parametrize("only", [(), BOTH])
def test_a_warm_up_hears_of_the_experts(alone, only):
    """With the op of all three as with the three: what is compiled for fused_moe, for as many rows."""
    named = {"gather_tokens": False, **dict.fromkeys(only, True)}
    heard = []

    def hear(op, implementation, args, kwargs, graph):
        if op.name == "fused_moe":
            values = torch.fx.node.map_arg(tuple(args), lambda node: node.meta["val"])
            heard.append([tuple(map(str, value.shape)) for value in values])

    with settings.patch(allow_reference=True, **named), pytest.MonkeyPatch.context() as patched:
        patched.setattr("fusion_passes.warming.problem_of", hear)
        report = fusion_passes.explain(block(alone, experts16(), 16), *drawn(5))
    assert report.matches == dict.fromkeys(only, 1)
    assert heard == [[("16", "16"), ("4", "8", "16"), ("4", "16", "8"), ("16", "2"), ("16", "2")]]


def test_two_layers(alone):
    first, second = block(alone, experts16()), block(alone, experts16(seed=1))

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return second((x + first(x, ids, weights)).clamp(-2, 2), ids, weights)

    result = rewrite(run, *drawn(9), only=BOTH)
    assert result.report.matches == dict.fromkeys(BOTH, 2)
    assert_same_bits(result.actual[0], result.expected[0])


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("max_tokens", [0, 16])
def test_compiled(alone, name, max_tokens):
    """One graph for several numbers of tokens, some of them in halves."""
    fn = block(alone, experts16(), max_tokens)
    torch._dynamo.reset()
    fusion_passes.reset_reports()
    options = {"fusions": name, "allow_reference": True, "overlap_from": 6}
    run = torch.compile(fn, backend="fusion_passes", options=options, fullgraph=True)
    with torch.no_grad():
        for count in (5, 6, 13):
            args = drawn(count)
            for tensor in args:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            assert_same_bits(run(*args), fn(*args))
    assert fusion_passes.report().matches == {name: 1}
    assert len(fusion_passes.reports()) == 1


def test_off_by_default_and_on_by_its_variable(alone, monkeypatch):
    fn, args = block(alone, experts16(), 16), drawn(4)
    report = fusion_passes.explain(fn, *args)
    assert not report.states["two_batch_overlap"][0]
    assert report.matches == {}  # on a CPU, where nothing is gained
    monkeypatch.setenv("FUSION_PASSES_ALLOW_REFERENCE", "1")
    monkeypatch.setenv("FUSION_PASSES_TWO_BATCH_OVERLAP", "1")
    monkeypatch.setenv("FUSION_PASSES_OVERLAP_FROM", "3")
    monkeypatch.setenv("FUSION_PASSES_GATHER_TOKENS", "0")
    assert fusion_passes.explain(fn, *args).matches == {"two_batch_overlap": 1}


def test_the_threshold_is_a_number_from_one_on():
    with (
        pytest.raises(settings.SettingsError, match="overlap_from"),
        settings.patch(overlap_from=0),
    ):
        pass


def test_the_threshold_is_in_the_cache_key():
    with settings.patch(overlap_from=7):
        seven = settings.current().cache_key()
    assert seven != settings.current().cache_key()


@ONE_GROUP
@given(most=st.sampled_from([0, 16, 256, 257]))
def test_gathered_by_default(alone, most):
    """Where gathering the rows of the worst case takes no longer than dispatching a few."""
    fn, args = block(alone, experts16(), most), drawn(5)
    result = graphs.rewrite(fn, *args, only=BOTH[:1])
    assert result.report.matches == (dict.fromkeys(BOTH[:1], 1) if 0 < most <= 256 else {})
    said = [miss.reason for miss in result.report.near_misses]
    least = f"max_tokens is {most}; by default, gathered are 1 to 256 tokens of a rank"
    assert said == ([] if 0 < most <= 256 else [least])


def test_not_by_default_between_hosts(alone, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")  # as if this one rank were on another host
    result = graphs.rewrite(block(alone, experts16(), 16), *drawn(5), only=BOTH[:1])
    (miss,) = result.report.near_misses
    assert "between hosts it was not measured" in miss.reason


def near_misses(group: str) -> dict[str, tuple[Any, str | None]]:
    given = experts16()
    weights_of = given["gate_up"], given["down"]

    def send(x, ids, weights):
        return custom_ops.ep_dispatch(x, None, ids, weights, 4, group)

    def experts(rows, out, **how):
        return custom_ops.fused_moe(
            rows, *weights_of, out[3], out[2], **{"activation": "relu2", **how}
        )

    def back(y, out):
        return custom_ops.ep_combine(y, *out[5:], group)

    def scaled_rows(x, ids, weights):
        out = send(x, ids, weights)
        return back(experts(out[0] * 2, out), out)

    def scaled_sums(x, ids, weights):
        out = send(x, ids, weights)
        return back(experts(out[0], out) * 2, out)

    def other_weights(x, ids, weights):
        out = send(x, ids, weights)
        y = custom_ops.fused_moe(out[0], *weights_of, out[3] * 2, out[2], activation="relu2")
        return back(y, out)

    def other_handle(x, ids, weights):
        out, other = send(x, ids, weights), send(x + 1, ids, weights)
        y = experts(out[0], out)
        torch._check(y.shape[0] == other[6].shape[0])
        return back(y, other)

    def counted(x, ids, weights):
        out = send(x, ids, weights)
        return back(experts(out[0], out), out), out[4]

    def seen(x, ids, weights):
        out = send(x, ids, weights)
        y = experts(out[0], out)
        return back(y, out), y.float().sum()

    def mapped(x, ids, weights):
        out = send(x, ids, weights)
        order = torch.arange(4, dtype=torch.int32)
        return back(experts(out[0], out, expert_map=order), out)

    def experts_alone(x, ids, weights):
        return custom_ops.fused_moe(x, *weights_of, weights, ids, activation="relu2")

    return {
        "rows are scaled": (scaled_rows, None),
        "sums are scaled": (scaled_sums, None),
        "weights are scaled": (other_weights, "do not take the ids and weights that came"),
        "another handle": (other_handle, "has the handle of another dispatch"),
        "counts are read": (counted, "reads getitem_4, which stays inside of the op"),
        "results are read": (seen, "reads fused_moe, which stays inside of the op"),
        "an expert map": (mapped, "the experts have an expert map"),
        "no dispatch": (experts_alone, None),
    }


@pytest.mark.parametrize("case", near_misses(""))
def test_one_step_away(alone, case):
    """Neither fires, says why where it almost did, and leaves the graph as it was."""
    fn, reason = near_misses(alone)[case]
    result = rewrite(fn, *drawn(5), only=BOTH)
    assert result.report.matches == {}
    said = [miss.reason for miss in result.report.near_misses]
    assert [reason in each for each in said] == ([True, True] if reason else [])
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert_same_bits(actual, expected)


@given(ranks=st.sampled_from([1, 2, 4, 8]), local=st.integers(1, 12), top_k=st.integers(1, 8))
def test_the_share_of_tokens(ranks, local, top_k):
    """In [0, 1], 1 where a rank must have one of the experts; against what is drawn."""
    experts = ranks * local
    if top_k > experts:
        return
    found = gather_tokens.share(experts, ranks, top_k)
    assert 0 < found <= 1
    assert (found == 1) == (top_k > experts - local)
    assert found == pytest.approx(1 - comb(experts - local, top_k) / comb(experts, top_k))


def test_where_tokens_go_to_few_ranks(alone, monkeypatch):
    """With eight ranks a token of two experts goes to two of them at most."""
    result = rewrite(block(alone, experts16()), *drawn(5), only=())
    graph = copy.copy(result.before.graph)
    monkeypatch.setattr(groups, "size", lambda op, group: 4 if op == gather_tokens.NAME else 1)
    with settings.patch(allow_reference=True):
        (miss,) = gather_tokens.FUSION.transform(graph)
    assert miss.reason == "a token has experts on 0.50 of the 4 ranks; gathered are those with 0.95"
