"""Clamps by infinity go, and nothing else does."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fusion_passes import registry
from fusion_passes.testing import fuse
from tests.fusion_passes.helpers import assert_same, random

pytestmark = pytest.mark.usefixtures("references")

SPECIAL = (math.inf, -math.inf, math.nan, 0.0, -0.0, 3e38, 1.5)
BOUNDS = (None, math.inf, -math.inf, 0.5, -0.5, 0.0)


def limited(limit):
    """A gated activation as Step-3.7 has it, with or without a limit."""

    def fn(gate, up):
        return F.silu(gate).clamp(max=limit) * up.clamp(min=-limit, max=limit)

    return fn


def clamps(result) -> int:
    return sum("clamp" in str(node.target) for node in result.after.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_without_a_limit_is_silu_mul(dtype):
    gate, up = random(5, 64, dtype=dtype), random(5, 64, dtype=dtype)
    result = fuse(limited(math.inf), gate, up, only=[registry()["silu_mul"]])
    assert result.report.matches == {"silu_mul": 1}, result.report
    assert not clamps(result)
    assert_same(result)


def test_a_limit_stays():
    result = fuse(limited(0.5), random(5, 64), random(5, 64), only=[registry()["silu_mul"]])
    assert result.report.matches == {}
    assert clamps(result) == 3
    assert_same(result)


@given(
    low=st.sampled_from(BOUNDS),
    high=st.sampled_from(BOUNDS),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32, torch.int32)),
    again=st.booleans(),
    returned=st.booleans(),
)
def test_any_bounds(low, high, dtype, again, returned):
    """What comes out has the bits of eager, and the tensors that are returned stay two."""
    if low is None and high is None:
        return
    x = torch.tensor(SPECIAL if dtype.is_floating_point else range(-3, 4)).to(dtype)

    def fn(x):
        y = x.clamp(low, high)
        y = y.clamp(min=-math.inf) if again else y
        return (x + 1, y) if returned else (x + 1, y * 2)

    result = fuse(fn, x, only=[registry()["silu_mul"]])
    for actual, expected in zip(result.actual, fn(x), strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())
        assert actual.dtype is expected.dtype
        assert torch.equal(actual.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert actual.data_ptr() != x.data_ptr()
