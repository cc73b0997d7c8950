"""The routers of mixtures of experts: every combination of their steps, and one step outside of them."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusion_passes import registry
from fusion_passes.testing import fuse
from tests.fusion_passes.helpers import assert_same, misses

pytestmark = pytest.mark.usefixtures("references")

NAMES = ("topk_softmax", "topk_sigmoid", "grouped_topk")
EXPERTS = 16


@dataclass(frozen=True)
class Router:
    """How a router is written. groups: how many, or 0. fill: of the experts of other groups."""

    scoring: str = "softmax"
    first: bool = True
    bias: bool = False
    groups: int = 0
    best: str = "top2"
    fill: float = float("-inf")
    gathered: bool = False
    renormalize: bool = False
    eps: float = 0.0
    least: float = 0.0
    scale: float = 0.0
    cast: bool = False
    excluded: bool = False  # the mask says which groups go, as DeepSeek's own code has it

    @property
    def fusion(self) -> str:
        grouped = self.groups or self.scoring == "sqrt_softplus"
        return "grouped_topk" if grouped else f"topk_{self.scoring}"


def score(logits: Tensor, how: str) -> Tensor:
    if how == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if how == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()


def route(router: Router, top_k: int):
    def run(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        wide = logits.float()
        scores = score(wide, router.scoring) if router.first else wide
        choice = scores + bias if router.bias else scores
        if router.groups:
            shape = (-1, router.groups, EXPERTS // router.groups)
            grouped = choice.view(shape)
            worth = grouped.topk(2, -1)[0].sum(-1) if router.best == "top2" else grouped.max(-1)[0]
            chosen = worth.topk(router.groups // 2, -1, sorted=False)[1]
            if router.excluded:
                gone = torch.ones_like(worth, dtype=torch.bool).scatter_(1, chosen, False)
                choice = grouped.masked_fill(gone.unsqueeze(-1), router.fill).flatten(1)
            else:
                mask = torch.zeros_like(worth).scatter_(1, chosen, 1).unsqueeze(-1)
                mask = mask.expand(*choice.view(shape).shape).reshape(-1, EXPERTS)
                choice = choice.masked_fill(~mask.bool(), router.fill)
        weights, ids = torch.topk(choice, top_k, dim=-1)
        if router.gathered or router.bias or router.groups:
            weights = scores.gather(1, ids)
        if not router.first:
            weights = score(weights, router.scoring)
        if router.renormalize:
            total = weights.sum(-1, keepdim=True)
            total = total.clamp(min=router.least) if router.least else total
            weights = weights / (total + router.eps if router.eps else total)
        if router.scale:
            weights = weights * router.scale
        return weights.to(logits.dtype) if router.cast else weights, ids

    return run


def inputs(tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits without equals, as the order of those is anybody's."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(EXPERTS, generator=generator) for _ in range(tokens)]
    logits = (torch.stack(rows).float() - 7.3) / 4
    return logits.to(dtype), torch.randn(EXPERTS, generator=generator) / 64


@st.composite
def routers(draw: st.DrawFn) -> Router:
    first = draw(st.booleans())
    groups = draw(st.sampled_from((0, 2, 4))) if first else 0
    scorings = ("softmax", "sigmoid") + (("sqrt_softplus",) if first else ())
    renormalize = draw(st.booleans())
    return Router(
        scoring=draw(st.sampled_from(scorings)),
        first=first,
        bias=draw(st.booleans()) and first,
        groups=groups,
        best=draw(st.sampled_from(("top2", "max"))),
        fill=draw(st.sampled_from((float("-inf"), 0.0))),
        gathered=draw(st.booleans()),
        renormalize=renormalize,
        eps=draw(st.sampled_from((0.0, 1e-20, 0.25))) if renormalize else 0.0,
        least=draw(st.sampled_from((0.0, 1e-12))) if renormalize else 0.0,
        scale=draw(st.sampled_from((0.0, 2.5))),
        cast=draw(st.booleans()),
        excluded=draw(st.booleans()),
    )


def run(function, *tensors, names=NAMES, dynamic=None):
    return fuse(function, *tensors, only=[registry()[name] for name in names], dynamic=dynamic)


@hypothesis.settings(max_examples=min(20, hypothesis.settings().max_examples))
@given(
    router=routers(),
    tokens=st.sampled_from((1, 2, 7)),
    top_k=st.sampled_from((1, 2, 3)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 99),
)
def test_every_combination_is_one_op(router, tokens, top_k, dtype, seed):
    result = run(route(router, top_k), *inputs(tokens, dtype, seed))
    assert result.report.matches == {router.fusion: 1}, result.report
    assert torch.equal(result.expected[1], result.actual[1])
    assert_same(result)
    left = {str(node.target) for node in result.after.graph.nodes if node.op == "call_function"}
    assert not left & {"aten.topk.default", "aten.exp.default", "aten.sum.dim_IntList"}


@pytest.mark.parametrize(
    "router", [Router(renormalize=True), Router("sigmoid", bias=True, groups=4)]
)
def test_symbolic_tokens(router):
    logits, bias = inputs(7, torch.bfloat16)
    torch._dynamo.mark_dynamic(logits, 0)
    result = run(route(router, 2), logits, bias)
    assert result.report.matches == {router.fusion: 1}, result.report
    assert "s" in result.report.sites[0].sizes["num_tokens"]
    assert_same(result)


def test_sixteen_bits_throughout():
    """As LFM2 has it: nothing is cast to float32, so every step is rounded."""

    def rounded(logits, bias):
        scores = logits.sigmoid()
        ids = torch.topk(scores + bias, 3, dim=-1)[1]
        weights = scores.gather(1, ids)
        return weights / (weights.sum(-1, keepdim=True) + 1e-6) * 1.5, ids

    result = run(rounded, *inputs(5, torch.bfloat16))
    assert result.report.matches == {"topk_sigmoid": 1}, result.report
    assert result.report.sites[0].pattern == "rounded, correction bias, renormalized"
    assert all(map(torch.equal, result.expected, result.actual))


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize("fill", [float("-inf"), 0.0])
def test_a_mask_of_the_groups_that_go(groups, tokens, fill):
    """Of booleans, over [T, groups, 1], as DeepSeek's own inference code has it."""
    router = Router("sigmoid", bias=True, groups=groups, fill=fill, excluded=True)
    result = run(route(router, 2), *inputs(tokens, torch.bfloat16))
    assert result.report.matches == {"grouped_topk": 1}, result.report
    assert torch.equal(result.expected[1], result.actual[1])
    assert_same(result)


def test_a_mask_of_the_groups_that_stay_is_not_one_of_those_that_go():
    def kept(logits, bias):
        scores = logits.sigmoid()
        worth = scores.view(-1, 4, 4).amax(-1)
        mask = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, worth.topk(2, -1)[1], True)
        choice = scores.view(-1, 4, 4).masked_fill(mask.unsqueeze(-1), float("-inf")).flatten(1)
        ids = choice.topk(2, -1)[1]
        return scores.gather(1, ids), ids

    result = run(kept, *inputs(5, torch.float32))
    assert result.report.matches == {}, result.report
    assert all(map(torch.equal, result.expected, result.actual))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("gathered", [False, True])
def test_tokens_in_two_dimensions(scoring, gathered):
    def batches(logits, bias):
        scores = score(logits.view(2, 3, EXPERTS).float(), scoring)
        weights, ids = torch.topk(scores + bias if gathered else scores, 3, dim=-1)
        weights = scores.gather(-1, ids) if gathered else weights
        return weights / weights.sum(-1, keepdim=True), ids

    result = run(batches, *inputs(6, torch.bfloat16))
    assert result.report.matches == {f"topk_{scoring}": 1}, result.report
    assert torch.equal(result.expected[1], result.actual[1])
    assert_same(result)


def test_the_scores_of_another_token_are_no_weights():
    """Two tokens a row: the ids of the second of them take scores of the first."""

    def others(logits, bias):
        scores = logits.softmax(-1)
        ids = torch.topk(scores, 3, dim=-1)[1]
        return scores.view(3, 2 * EXPERTS).gather(-1, ids.view(3, 6)), ids

    result = run(others, *inputs(6, torch.float32))
    assert result.report.matches == {}, result.report


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_scores_rounded_to_sixteen_bits(scoring):
    def rounded(logits, bias):
        weights, ids = torch.topk(score(logits.float(), scoring).to(logits.dtype), 3, dim=-1)
        return weights, ids

    result = run(rounded, *inputs(5, torch.bfloat16))
    assert result.report.matches == {f"topk_{scoring}": 1}, result.report
    assert all(map(torch.equal, result.expected, result.actual))


def test_what_follows_stays():
    """A scale per expert, after the weights, is no step of a router."""

    def scaled(logits, bias):
        weights, ids = torch.topk(logits.float().softmax(-1), 2)
        weights = weights / weights.sum(-1, keepdim=True)
        return weights * bias[ids], ids

    result = run(scaled, *inputs(5, torch.float32))
    assert result.report.matches == {"topk_softmax": 1}
    assert_same(result)


def test_a_scale_that_dynamic_true_leaves_open_stays():
    class Scaled(torch.nn.Module):
        scale = 2.5

        def forward(self, logits):
            weights, ids = torch.topk(logits.softmax(-1), 2)
            return weights * self.scale, ids

    logits = inputs(5, torch.float32)[0]
    torch._dynamo.mark_static(logits, 1)
    result = run(Scaled(), logits, dynamic=True)
    assert result.report.matches == {"topk_softmax": 1}
    assert_same(result)


def _two_uses(logits, bias):
    scores = logits.softmax(-1)
    weights, ids = torch.topk(scores, 2)
    return weights, ids, scores


def _biased_weights(logits, bias):
    return torch.topk(logits.softmax(-1) + bias, 2)


def _smallest(logits, bias):
    return torch.topk(logits.softmax(-1), 2, largest=False)


def _over_tokens(logits, bias):
    return torch.topk(logits.softmax(-1), 2, dim=0)


def _other_softmax(logits, bias):
    return torch.topk(logits.softmax(0), 2)


def _weights_of_others(logits, bias):
    ids = torch.topk(logits.softmax(-1), 2)[1]
    return logits.tanh().gather(1, ids), ids


def _groups_by_scores(logits, bias):
    scores = logits.sigmoid()
    worth = scores.view(-1, 4, 4).topk(2, -1)[0].sum(-1)
    mask = torch.zeros_like(worth).scatter_(1, worth.topk(2, -1)[1], 1).unsqueeze(-1)
    mask = mask.expand(-1, 4, 4).reshape(-1, 16)
    ids = (scores + bias).masked_fill(~mask.bool(), float("-inf")).topk(2, -1)[1]
    return scores.gather(1, ids), ids


def _raw(logits, bias):
    return torch.topk(logits, 2)


@pytest.mark.parametrize(
    "function",
    [_biased_weights, _smallest, _over_tokens, _other_softmax, _weights_of_others, _groups_by_scores, _raw],
)  # fmt: skip
def test_one_step_outside(function):
    result = run(function, *inputs(4, torch.float32))
    assert result.report.matches == {}, result.report
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert torch.equal(expected, actual)


def test_scores_that_are_read_elsewhere_keep_the_router():
    result = run(_two_uses, *inputs(4, torch.float32))
    assert result.report.matches == {}
    assert "inside of it is also used by output" in misses(result, "topk_softmax")[0]


def test_a_sampler_is_no_router():
    result = run(lambda logits: torch.topk(logits.softmax(-1), 2), torch.randn(2, 4096))
    assert result.report.matches == {}
    assert result.report.near_misses == []
