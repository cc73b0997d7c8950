"""Logits in float32 of 16-bit operands: found whatever shape the tokens have, and only where both were widened."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_passes import registry, tables
from fusion_passes.passes.router_logits import MOST_EXPERTS
from fusion_passes.testing import fuse
from tests.fusion_passes.helpers import assert_same
from tests.models.moe_zoo import build, tokens
from tests.models.test_moe import assert_close

pytestmark = pytest.mark.usefixtures("references")

NAME = "router_logits"
TARGET = "custom_ops.router_logits.default"


class Router(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16, experts: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(experts, 64, generator=generator) / 8
        self.weight = nn.Parameter(weight.to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float()).sigmoid()


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def run(module: nn.Module, x: Tensor, **keywords):
    return fuse(module, x, only=[registry()[NAME]], **keywords)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (5, 64), (2, 3, 64)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_both_widened(shape, dtype, dynamic):
    result = run(Router(dtype), rows(*shape, dtype=dtype), dynamic=dynamic)
    assert result.report.matches == {NAME: 1}, result.report
    assert_same(result)
    left = [str(n.target) for n in result.after.graph.nodes if n.op == "call_function"]
    assert TARGET in left
    assert "aten.mm.default" not in left


def test_a_reader_of_the_wide_tokens_keeps_them():
    class Both(Router):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x.float().mean(-1, keepdim=True)

    result = run(Both(), rows(5, 64))
    assert result.report.matches == {NAME: 1}, result.report
    assert_same(result)


@pytest.mark.parametrize("which", ["weight", "tokens", "neither"])
def test_what_is_float32_already_stays(which):
    class Plain(Router):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x if which == "tokens" else x.float(), self.weight.float())

    x = rows(5, 64, dtype=torch.float32 if which != "weight" else torch.bfloat16)
    module = Plain(torch.bfloat16 if which == "tokens" else torch.float32)
    assert run(module, x).report.matches == {}


def test_two_dtypes_are_two_products():
    assert run(Router(torch.float16), rows(5, 64)).report.matches == {}


def test_more_outputs_than_a_router_has():
    report = run(Router(experts=MOST_EXPERTS + 1), rows(5, 64)).report
    assert report.matches == {}
    (miss,) = (miss for miss in report.near_misses if miss.fusion == NAME)
    assert f"there are {MOST_EXPERTS + 1} outputs" in miss.reason


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_in_stock_models(kind):
    """Among all that is on by default: it takes nothing that another matches, nor they from it."""
    default = [each for name, each in registry().items() if tables.default_state(name, "sm_90")[0]]
    model = build(kind, "grouped_mm", "bf16", 2)
    result = fuse(model, tokens(7), use_cache=False, only=default)
    without = [each for each in default if each.name != NAME]
    others = fuse(model, tokens(7), use_cache=False, only=without).report.matches
    assert others.items() >= {"grouped_topk": 2, "fused_moe": 2}.items()
    assert result.report.matches == {NAME: 2, **others}, result.report
    assert_close(result)
