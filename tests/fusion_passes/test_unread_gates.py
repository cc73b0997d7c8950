"""A gated activation that no pattern has is told, and what is none is not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.fusion_passes.helpers import fuse_all, misses, quantize, random

pytestmark = pytest.mark.usefixtures("references")


def _cubes(x: Tensor) -> Tensor:
    return math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))


def _new_gelu(x: Tensor) -> Tensor:
    """NewGELUActivation of transformers."""
    return 0.5 * x * (1.0 + torch.tanh(_cubes(x)))


def _fast_gelu(x: Tensor) -> Tensor:
    """FastGELUActivation of transformers."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _rounded(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """In float32, and no step more."""
    return function(x.float()).to(x.dtype)


UNREAD: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str, str]] = {
    "sigmoid": (lambda gate, up: gate * gate.sigmoid() * up, "silu_mul", "is rounded to"),
    "sigmoid, gate last": (lambda gate, up: up * (gate.sigmoid() * gate), "silu_mul", "is rounded to"),
    "erf": (lambda gate, up: F.gelu(gate) * up, "gelu_tanh_mul", "makes it GELU by erf"),
    "tanh": (lambda gate, up: _new_gelu(gate) * up, "gelu_tanh_mul", "steps rounded to"),
    "tanh, up first": (lambda gate, up: up * _new_gelu(gate), "gelu_tanh_mul", "steps rounded to"),
    "tanh, of other steps": (
        lambda gate, up: _fast_gelu(gate.float()).to(gate.dtype) * up, "gelu_tanh_mul", "is of other steps",
    ),
    "erf, rounded before it is added to": (
        lambda gate, up: 0.5 * gate * (1 + _rounded(torch.erf, gate / 2**0.5)) * up, "gelu_tanh_mul", "GELU by erf",
    ),
    "tanh, rounded before it is added to": (
        lambda gate, up: 0.5 * gate * (1 + _rounded(torch.tanh, _cubes(gate))) * up, "gelu_tanh_mul", "other steps",
    ),
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


def test_a_gelu_written_out_in_float32_is_found():
    def gated(gate: Tensor, up: Tensor) -> object:
        return quantize(_new_gelu(gate.float()).to(gate.dtype) * up)

    result = fuse_all(gated, random(5, 128), random(5, 128, seed=1))
    assert result.report.matches == {"gelu_tanh_mul_group_quant": 1}, result.report
    assert result.report.near_misses == []


@pytest.mark.parametrize("activate", [F.gelu, _new_gelu, lambda x: x * x.sigmoid()])
def test_of_float32_alone_nothing_is_told(activate):
    """No op of gates takes it, whichever its spelling."""
    x, y = (random(5, 128, dtype=torch.float32, seed=seed) for seed in (0, 1))
    result = fuse_all(lambda gate, up: activate(gate) * up, x, y)
    assert result.report.matches == {}
    assert result.report.near_misses == []


def test_a_sigmoid_in_float32_is_not_called_rounded():
    """No op takes a gate in float32, but nothing is rounded before the swish is."""
    x, y = random(5, 128, dtype=torch.float32), random(5, 128, seed=1)
    result = fuse_all(lambda gate, up: (gate * gate.sigmoid()).to(up.dtype) * up, x, y)
    assert result.report.matches == {}
    assert result.report.near_misses == []


OTHERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a gate of something else": lambda x, y: x * y.sigmoid(),
    "a gate of something else, times more": lambda x, y: x * y.sigmoid() * (x + 1),
    "a swish alone": lambda x, y: x * x.sigmoid() + y,
    "a swish times a weight": lambda x, y: x * x.sigmoid() * y[0],
    "a GELU alone": lambda x, y: F.gelu(x) + y,
    "a GELU times a number": lambda x, y: F.gelu(x) * 2 + y,
    "a tanh, one more": lambda x, y: x * (1 + torch.tanh(y)) * (x + 2),
    "an error function": lambda x, y: torch.erf(x) * y,
    "an error function, negated": lambda x, y: x * -torch.erf(x) * y,
    "an error function, rounded and squared": lambda x, y: _rounded(torch.erf, x).square() * x * y,
    "a tanh of cubes, negated": lambda x, y: x * -torch.tanh(_cubes(x)) * y,
    "a tanh of cubes, taken from 1": lambda x, y: x * (1 - _rounded(torch.tanh, _cubes(x))) * y,
}


@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_what_is_no_gated_activation_is_not_told(kind):
    result = fuse_all(OTHERS[kind], random(5, 128), random(5, 128, seed=1))
    assert result.report.near_misses == []
