"""Shared experts beside the routed ones: found in stock models, and left where that is not what they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_passes import registry
from fusion_passes.passes.fused_moe_and_shared import MOST_TOKENS, NAME
from fusion_passes.testing import fuse
from tests.models.moe_zoo import build, tokens
from tests.models.test_moe import assert_close

HIDDEN, WIDTH, EXPERTS, TOP_K = 128, 128, 4, 2


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_PASSES_ALLOW_REFERENCE", "1")
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "triton")  # its interpreter takes minutes for a model


class Block(nn.Module):
    """Routed experts and shared ones as somebody may write them."""

    def __init__(self, spelling: str = "after") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            drawn = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            return nn.Parameter(drawn.bfloat16(), requires_grad=False)

        self.spelling = spelling
        self.router = weight(EXPERTS, HIDDEN)
        self.gate_up, self.down = weight(EXPERTS, 2 * WIDTH, HIDDEN), weight(EXPERTS, HIDDEN, WIDTH)
        self.gate, self.up, self.last = weight(64, HIDDEN), weight(64, HIDDEN), weight(HIDDEN, 64)
        self.other = weight(64, HIDDEN)

    def shared(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate), F.linear(x, self.up)
        if self.spelling == "gelu":
            return F.linear(F.gelu(gate, approximate="tanh") * up, self.last)
        if self.spelling == "of other tokens":
            up = F.linear(2 * x, self.up)
        between = F.silu(gate) * up
        if self.spelling == "read twice":
            return F.linear(between, self.last) + F.linear(between, self.last.roll(1, 0))
        return F.linear(between, self.last)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, HIDDEN)
        first = self.shared(x) if self.spelling in ("before", "read before") else None
        scores = F.linear(rows, self.router).float().softmax(-1)
        if self.spelling == "read before":
            scores = scores + first.view(-1, HIDDEN).float().mean(-1, keepdim=True)
        weights, ids = scores.topk(TOP_K)
        routed = self.routed(rows, weights.to(x.dtype), ids).view_as(x)
        return routed + (self.shared(x) if first is None else first)

    def routed(self, rows: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        pairs, every = rows.repeat_interleave(TOP_K, 0).unsqueeze(1), ids.flatten()
        first = torch.bmm(pairs, self.gate_up[every].transpose(1, 2)).squeeze(1)
        gate, up = first.chunk(2, -1)
        second = torch.bmm((F.silu(gate) * up).unsqueeze(1), self.down[every].transpose(1, 2))
        return (second.view(*ids.shape, HIDDEN) * weights.unsqueeze(-1)).sum(1)


def fused(spelling: str, count: int = 5, **keywords):
    x = torch.randn(1, count, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    only = [registry()[name] for name in ("fused_moe", NAME)]
    return fuse(Block(spelling), x, only=only, **keywords)


def matches(report) -> int:
    assert report.matches["fused_moe"] == 1, report
    return report.matches.get(NAME, 0)


@pytest.mark.parametrize("spelling", ["after", "before"])
def test_both_become_one_op(spelling):
    result = fused(spelling)
    assert matches(result.report) == 1
    assert_close(result)
    left = {str(node.target) for node in result.after.graph.nodes}
    assert f"custom_ops.{NAME}.default" in left
    assert "custom_ops.fused_moe.default" not in left


@pytest.mark.parametrize("spelling", ["gelu", "of other tokens", "read twice"])
def test_what_is_something_else_stays(spelling):
    assert matches(fused(spelling).report) == 0


def test_a_result_that_the_router_reads_is_a_near_miss():
    report = fused("read before").report
    assert matches(report) == 0
    (miss,) = (miss for miss in report.near_misses if miss.fusion == NAME)
    assert "the shared experts' result, is read before the routed ones run" in miss.reason


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen2_moe", "glm4_moe"])
def test_in_stock_models(kind):
    router = "topk_softmax" if kind == "qwen2_moe" else "grouped_topk"
    only = [registry()[name] for name in (router, "fused_moe", NAME)]
    result = fuse(build(kind, "grouped_mm", "bf16", 2), tokens(7), use_cache=False, only=only)
    assert result.report.matches == {NAME: 2, router: 2, "fused_moe": 2}, result.report
    assert not [miss for miss in result.report.near_misses if miss.fusion == NAME]


@pytest.mark.parametrize("count", [MOST_TOKENS, MOST_TOKENS + 1])
def test_how_many_tokens_by_default(count, monkeypatch):
    from fusion_passes.passes import fused_moe_and_shared

    class Default:
        def by_default(self, name: str) -> bool:
            return name == NAME

    monkeypatch.setattr(fused_moe_and_shared, "settings", SimpleNamespace(current=Default))
    report = fused("after", count).report
    assert matches(report) == (count <= MOST_TOKENS)
    reasons = [miss.reason for miss in report.near_misses if miss.fusion == NAME]
    if count > MOST_TOKENS:
        assert reasons == [
            f"there are {count} tokens; by default, up to {MOST_TOKENS} go on two streams"
        ]
