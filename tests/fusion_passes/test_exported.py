"""Graphs of torch.export: the same meanings, with an assertion of its dtype behind each cast."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

import fusion_passes
from fusion_passes.canonical import views
from tests.fusion_passes.helpers import fuse_all, random

pytestmark = pytest.mark.usefixtures("references")

ASSERTION = torch.ops.aten._assert_tensor_metadata.default


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(256, eps=1e-6)
        self.gate, self.up, self.down = (nn.Linear(256, 256, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def model() -> nn.Module:
    torch.manual_seed(0)
    return fusion_passes.quantize_(nn.Sequential(Block(), Block()).bfloat16().eval())


@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_model_fuses_as_the_model_does(decomposed):
    stock, x = model(), torch.randn(3, 256, dtype=torch.bfloat16)
    expected = fuse_all(stock, x).report.matches
    assert expected["add_rms_norm_group_quant"] == 1
    program = torch.export.export(stock, (x,))
    program = program.run_decompositions() if decomposed else program
    result = fuse_all(program.module(), x)
    assert result.report.matches == expected, result.report


def test_tokens_of_an_exported_model_stay_dynamic():
    stock, x = model(), torch.randn(3, 256, dtype=torch.bfloat16)
    tokens = torch.export.Dim.DYNAMIC
    exported = torch.export.export(stock, (x,), dynamic_shapes=({0: tokens},)).module()
    result = fuse_all(exported, x, dynamic=True)
    assert result.report.matches["block_scaled_linear"] == 6, result.report
    assert result.report.matches["silu_mul_group_quant"] == 2, result.report


@pytest.mark.parametrize(
    ("asserted", "stays"),
    [
        ((None, None, torch.float32), False),
        ((None, None, None), False),
        ((None, None, torch.bfloat16), True),
        (((3, 256), None, torch.float32), True),  # what a size is may be known only at run time
    ],
)
def test_only_what_is_certain_is_not_asserted(asserted, stays):
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(3, 256)
    graph.call_function(ASSERTION, (x, *asserted))
    graph.output((x,))
    views.remove_needless(graph)
    assert any(node.target is ASSERTION for node in graph.nodes) is stays


def test_what_is_asserted_is_gone_from_the_rewritten_graph_alone():
    """The graph that eager runs keeps it."""
    exported = torch.export.export(model(), (torch.randn(3, 256, dtype=torch.bfloat16),)).module()
    before = copy.deepcopy(exported)
    result = fuse_all(exported, torch.randn(3, 256, dtype=torch.bfloat16))
    assert any(node.target is ASSERTION for node in result.before.graph.nodes)
    assert not any(node.target is ASSERTION for node in result.after.graph.nodes)
    assert str(before.graph) == str(exported.graph)


@given(
    width=st.sampled_from((1, 33, 256)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    magnitude=st.sampled_from((1e-3, 1.0, 40.0)),
    seed=st.integers(0, 99),
)
def test_silu_by_a_sigmoid(width, dtype, magnitude, seed):
    """As core ATen has it; the values are those of silu but for the last bit of float32."""
    gate = random(7, width, dtype=torch.float32, seed=seed) * magnitude

    def block(gate, up):
        wide = gate.float()
        return (wide * torch.sigmoid(wide)).to(gate.dtype) * up

    result = fuse_all(block, gate.to(dtype), random(7, width, dtype=dtype, seed=seed + 1))
    assert result.report.matches == {"silu_mul": 1}, result.report


def test_a_rounded_sigmoid_is_no_silu():
    result = fuse_all(lambda g, u: g * torch.sigmoid(g) * u, random(7, 256), random(7, 256, seed=1))
    assert result.report.matches == {}, result.report
