"""Casts of what a kernel returned there and back: gone where they lose nothing, and only there."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx

from bench.suites import quantization
from fusion_passes import Fusion, registry
from fusion_passes.canonical import casts
from fusion_passes.testing import fuse
from tests.fusion_passes.helpers import random

pytestmark = pytest.mark.usefixtures("references")

CAST = torch.ops.prims.convert_element_type.default


def asymmetric(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    codes, scale, zero = quantization.token_quant_asymmetric(x)
    return codes, scale, zero.to(dtype)


def symmetric(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """torchao's int8, whose scale of 16 bits is read in another dtype."""
    zero = torch.zeros(x.shape[:-1], dtype=x.dtype)
    low, high = torch.minimum(x.amin(-1), zero), torch.maximum(x.amax(-1), zero)
    scale = (torch.maximum(-low, high) / 127.0).float().clamp(min=1e-5).to(x.dtype).unsqueeze(-1)
    codes = (x * (1.0 / scale)).round() + zero.unsqueeze(-1)
    codes = codes.float().clamp(-127, 127).to(x.dtype).to(torch.int8)
    return codes, scale.to(dtype)


def alone() -> list[Fusion]:
    return [registry()[name] for name in ("token_quant", "token_quant_asymmetric")]


def left(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is CAST]


@pytest.mark.parametrize(
    ("quantize", "kernels"), [(asymmetric, torch.int8), (symmetric, torch.float32)]
)
@given(
    tokens=st.integers(1, 5),
    width=st.sampled_from((2, 33, 128)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    wanted=st.sampled_from((torch.int8, torch.float32)),
    seed=st.integers(0, 99),
)
def test_back_to_the_dtype_of_the_kernel(quantize, kernels, tokens, width, dtype, wanted, seed):
    x = random(tokens, width, dtype=dtype, seed=seed)
    result = fuse(lambda x: quantize(x, wanted), x, only=alone())
    assert sum(result.report.matches.values()) == 1
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert expected.dtype == actual.dtype
        assert torch.equal(expected, actual)
    if wanted is kernels:
        assert left(result.after.graph) == []
    else:
        assert left(result.after.graph)


@pytest.mark.parametrize("quantize", [asymmetric, symmetric])
def test_what_no_fusion_takes_keeps_its_casts(quantize):
    wanted = torch.int8 if quantize is asymmetric else torch.float32
    result = fuse(lambda x: quantize(x, wanted), random(3, 64), only=[])
    assert result.report.matches == {}
    assert len(left(result.after.graph)) == len(left(result.before.graph))
    assert all(torch.equal(a, b) for a, b in zip(result.expected, result.actual, strict=True))


def graph_of_casts(through: torch.dtype, *, lossless: bool, both: bool) -> fx.Node:
    """A kernel's float32 scale, cast to another dtype and back; returns the last cast."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(torch.ops.custom_ops.token_quant.default, (x,))
    scale = graph.call_function(operator.getitem, (made, 1))
    scale.meta["val"] = torch.empty(2, 1)
    inner = graph.call_function(CAST, (scale, through))
    inner.meta["val"] = torch.empty(2, 1, dtype=through)
    outer = graph.call_function(CAST, (inner, torch.float32))
    outer.meta["val"] = torch.empty(2, 1)
    graph.output((outer, scale) if both else (outer,))
    if lossless:
        casts.lossless(inner)
    return outer


@given(
    through=st.sampled_from((torch.bfloat16, torch.float16, torch.float64)),
    lossless=st.booleans(),
    both=st.booleans(),
)
def test_only_what_is_said_to_lose_nothing(through, lossless, both):
    """A cast that may round stays, and so do two results of a graph, of which a caller may write into one."""
    outer = graph_of_casts(through, lossless=lossless, both=both)
    found = casts.undone(outer)
    assert (found is not None) == (lossless and not both)
    if found is not None:
        assert found is outer.args[0].args[0]


def test_a_cast_to_yet_another_dtype_stays():
    outer = graph_of_casts(torch.bfloat16, lossless=True, both=False)
    outer.meta["val"] = outer.meta["val"].half()
    assert casts.undone(outer) is None
