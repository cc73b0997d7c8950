"""Norms without a weight, and what else they may be written with: a power for the root, a product that widens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor as T

from fusion_passes.testing.equivalence import Result
from tests.fusion_passes.helpers import fuse_all, misses, quantize, random

pytestmark = pytest.mark.usefixtures("references")

EPS = 1e-6


def by_rsqrt(x: T) -> T:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def by_power(x: T) -> T:
    """As Gemma 4 writes it."""
    h = x.float()
    return (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + EPS, -0.5)).to(x.dtype)


def by_function(x: T) -> T:
    """As nanochat writes it."""
    return F.rms_norm(x, (x.shape[-1],), None, EPS)


def by_promotion(x: T) -> T:
    """As T5 writes it: the product with the root is what widens x."""
    return (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def by_two_casts(x: T) -> T:
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


SPELLINGS = (by_rsqrt, by_power, by_function, by_promotion, by_two_casts)


def assert_same(result: Result) -> None:
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert expected.dtype is actual.dtype
        assert expected.stride() == actual.stride() or expected.numel() < 2
        assert torch.equal(expected.float(), actual.float()), "not bit for bit what eager computes"


@given(
    spelling=st.sampled_from(SPELLINGS),
    tokens=st.sampled_from((1, 2, 7)),
    width=st.sampled_from((128, 256, 384)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    added=st.booleans(),
    live=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_norm_without_a_weight_fuses_with_what_is_around_it(
    spelling, tokens, width, dtype, added, live, seed
):
    x, y = (random(tokens, width, dtype=dtype, seed=seed + i) for i in range(2))

    def block(x: T, y: T) -> tuple[T, ...]:
        x = x + y if added else x
        return (*quantize(spelling(x)), *([x * 2] if live else []))

    result = fuse_all(block, x, y)
    name = f"{'add_' * added}rms_norm_group_quant"
    assert result.report.matches == {name: 1}, result.report
    assert_same(result)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_power_is_the_root_of_a_norm_with_a_weight(spelling):
    weight = random(256, seed=3)
    result = fuse_all(lambda x, w: quantize(w * spelling(x)), random(5, 256), weight)
    assert result.report.matches == {"rms_norm_group_quant": 1}, result.report
    (site,) = result.report.sites
    assert "no weight" not in site.pattern
    assert_same(result)


def test_a_product_that_widens_before_a_weight_in_float32():
    def norm(x: T, w: T) -> T:
        root = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
        return (x * root * w).to(x.dtype)

    result = fuse_all(lambda x, w: quantize(norm(x, w)), random(5, 256), random(256, seed=3))
    assert result.report.matches == {"rms_norm_group_quant": 1}, result.report
    assert_same(result)


def test_another_power_is_no_root():
    def cubic(x: T) -> T:
        h = x.float()
        return (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + EPS, -0.25)).to(x.dtype)

    assert fuse_all(cubic, random(5, 256)).report.matches == {}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_heads(spelling):
    """Queries are normed by head, in a view whose result is transposed later."""
    result = fuse_all(lambda x: spelling(x.view(5, 4, 64)) * 2, random(5, 256))
    assert result.report.matches == {"rms_norm": 1}, result.report
    assert_same(result)


@pytest.mark.parametrize("shape", [(5, 1), (5, 256)])
def test_a_gate_after_it_stays_outside(shape):
    result = fuse_all(lambda x, g: g * by_rsqrt(x), random(5, 256), random(*shape, seed=1))
    assert result.report.matches == {"rms_norm": 1}, result.report
    assert_same(result)


def test_a_weight_that_no_norm_has_is_named():
    """It would fire as one without a weight, and hide that a weight in 16 bits is all that is missing."""
    weight = random(256, dtype=torch.float32, seed=2)
    result = fuse_all(lambda x, w: w * by_rsqrt(x), random(5, 256), weight)
    assert result.report.matches == {}
    assert any("float32" in reason for reason in misses(result, "rms_norm"))


def test_symbolic_width():
    result = fuse_all(lambda x: by_rsqrt(x) * 2, random(5, 256), dynamic=True)
    assert result.report.matches == {"rms_norm": 1}, result.report
    assert_same(result)


def test_all_of_a_graph_share_one_weight_of_ones():
    """Each would be a kernel that fills it."""

    def layers(x: T) -> T:
        for _ in range(3):
            codes, scale = quantize(by_rsqrt(x))
            x = x + (codes.float() * scale.repeat_interleave(128, -1)).to(x.dtype)
        return x

    result = fuse_all(layers, random(5, 256))
    assert sum(result.report.matches.values()) == 3, result.report
    ones = [node for node in result.after.graph.nodes if node.target is torch.ops.aten.full.default]
    assert len([node for node in ones if node.args[0] == [256]]) == 1
