"""A gated activation that no pattern has is told, and what is none is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.fusion_passes.helpers import fuse_all, misses, quantize, random

pytestmark = pytest.mark.usefixtures("references")

UNREAD: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str, str]] = {
    "sigmoid": (lambda gate, up: gate * gate.sigmoid() * up, "silu_mul", "is rounded to"),
    "sigmoid, gate last": (lambda gate, up: up * (gate.sigmoid() * gate), "silu_mul", "is rounded to"),
    "erf": (lambda gate, up: F.gelu(gate) * up, "gelu_tanh_mul", "makes it GELU by erf"),
}  # fmt: skip


@pytest.mark.parametrize("quantized", [False, True])
@given(
    kind=st.sampled_from(sorted(UNREAD)),
    tokens=st.sampled_from((1, 2, 7)),
    halves=st.booleans(),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    seed=st.integers(0, 99),
)
def test_an_unread_gate_is_a_near_miss(quantized, kind, tokens, halves, dtype, seed):
    activate, fusion, words = UNREAD[kind]

    def gated(both: Tensor) -> object:
        gate, up = both.chunk(2, -1) if halves else (both, both.flip(-1))
        result = activate(gate, up)
        return quantize(result) if quantized else result

    result = fuse_all(gated, random(tokens, 256, dtype=dtype, seed=seed))
    assert result.report.matches == ({"group_quant": 1} if quantized else {})
    (reason,) = misses(result, fusion)
    assert words in reason


@pytest.mark.parametrize("casts", [1, 2])
def test_a_sigmoid_in_float32_is_found(casts):
    def gated(gate: Tensor, up: Tensor) -> object:
        wide = gate.float()
        again = gate.float() if casts == 2 else wide
        return quantize((wide * torch.sigmoid(again)).to(gate.dtype) * up)

    result = fuse_all(gated, random(5, 128), random(5, 128, seed=1))
    assert result.report.matches == {"silu_mul_group_quant": 1}, result.report
    assert result.report.near_misses == []


OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a gate of something else": lambda x, y: x * y.sigmoid(),
    "a gate of something else, times more": lambda x, y: x * y.sigmoid() * (x + 1),
    "a swish alone": lambda x, y: x * x.sigmoid() + y,
    "a swish times a weight": lambda x, y: x * x.sigmoid() * y[0],
    "a GELU alone": lambda x, y: F.gelu(x) + y,
    "a GELU times a number": lambda x, y: F.gelu(x) * 2 + y,
    "an error function": lambda x, y: torch.erf(x) * y,
}


@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_what_is_no_gated_activation_is_not_told(kind):
    result = fuse_all(OTHERS[kind], random(5, 128), random(5, 128, seed=1))
    assert result.report.near_misses == []
