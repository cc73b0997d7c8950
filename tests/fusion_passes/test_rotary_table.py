"""The cosines and sines of positions are written once where many elements read them, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusion_passes import registry, settings
from fusion_passes.passes import rotary_table
from fusion_passes.testing import fuse
from tests.fusion_passes.helpers import calls, random

KEPT = "prims.inductor_force_stride_order.default"
HEADS, DIM = 4, 8


def rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def angles(tokens: int, dim: int = DIM) -> Tensor:
    inverse = 1.0 / (10000.0 ** (torch.arange(0, dim, 2).float() / dim))
    return torch.arange(tokens).float()[None, :, None] * torch.cat((inverse, inverse))


def rotary(q: Tensor, k: Tensor, angles: Tensor, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """As transformers has it: [1, heads, tokens, dim] by [1, tokens, dim]."""
    cos = (angles.cos() * scaling).to(q.dtype).unsqueeze(1)
    sin = (angles.sin() * scaling).to(q.dtype).unsqueeze(1)
    return q * cos + rotated(q) * sin, k * cos + rotated(k) * sin


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary_table, "MANY", 64)


def only() -> list:
    return [registry()["rotary_table"]]


def drawn(tokens: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, ...]:
    q = random(1, HEADS, tokens, DIM, dtype=dtype, seed=seed)
    return q, random(1, 1, tokens, DIM, dtype=dtype, seed=seed + 1), angles(tokens)


@pytest.mark.usefixtures("few")
@given(
    tokens=st.integers(1, 9),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    scaling=st.sampled_from((1.0, 0.5, 1.3)),
    seed=st.integers(0, 99),
)
def test_bit_for_bit(tokens, dtype, scaling, seed):
    inputs = drawn(tokens, dtype, seed)
    result = fuse(lambda q, k, a: rotary(q, k, a, scaling), *inputs, only=only())
    many = DIM * tokens * 2 * (HEADS + 1) // 2 >= rotary_table.MANY
    assert result.report.matches == ({"rotary_table": 2} if many else {})
    assert calls(result.after.graph).count(KEPT) == 2 * many
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert torch.equal(expected, actual)
        assert expected.stride() == actual.stride()


def test_few_elements_are_left():
    result = fuse(rotary, *drawn(5), only=only())
    assert result.report.matches == {}
    assert calls(result.after.graph) == calls(result.before.graph)


@pytest.mark.usefixtures("few")
def test_what_is_read_once_is_left():
    """One head: every element is computed where it is read, which is as often as a table would have it."""
    result = fuse(lambda q, a: q * a.cos().to(q.dtype), random(1, 64, DIM), angles(64), only=only())
    assert result.report.matches == {}


@pytest.mark.usefixtures("few")
def test_a_number_of_tokens_that_is_not_known_is_left():
    inputs = drawn(40)
    result = fuse(rotary, *inputs, only=only(), dynamic=True)
    assert result.report.matches == {}
    assert calls(result.after.graph) == calls(result.before.graph)


@pytest.mark.usefixtures("few")
def test_inductor_writes_it():
    """In the code that it generates, the cosine stands outside of the loops over heads."""
    from torch._inductor.utils import run_and_get_code

    from fusion_passes.backend import fusion_passes as backend

    torch.compiler.reset()
    found = []
    for how in ({"fusions": "none"}, {"fusions": "none", "rotary_table": True}):
        compiled = torch.compile(rotary, backend=backend, options=how, dynamic=False)
        result, code = run_and_get_code(compiled, *drawn(40))
        found.append((result, code[0].count(".cos()")))
        torch.compiler.reset()
    (plain, twice), (kept, once) = found
    assert once < twice
    for expected, actual in zip(plain, kept, strict=True):
        torch.testing.assert_close(expected, actual, rtol=2e-2, atol=2e-2)


def test_it_can_be_turned_off(few):
    with settings.patch(fusions="all", rotary_table=False):
        assert fuse(rotary, *drawn(40)).report.matches.get("rotary_table") is None
