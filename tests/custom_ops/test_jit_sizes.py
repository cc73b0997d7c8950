"""Sizes as text: they come to what sympy says they do, and nothing else is evaluated."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from custom_ops.jit.sizes import symbols_of, value_of

SYMBOLS = sympy.symbols("s0 s1", integer=True, positive=True)
leaves = st.one_of(st.sampled_from(SYMBOLS), st.integers(1, 9).map(sympy.Integer))
expressions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda a, b: a + b, inner, inner),
        st.builds(lambda a, b: a * b, inner, inner),
        st.builds(lambda a, b: FloorDiv(a, b), inner, st.integers(1, 8).map(sympy.Integer)),
        st.builds(lambda a, b: Mod(a, b), inner, st.integers(2, 8).map(sympy.Integer)),
        st.builds(lambda a, b: Max(a, b), inner, inner),
        st.builds(lambda a, b: Min(a, b), inner, inner),
    ),
    max_leaves=6,
)


@given(expression=expressions, s0=st.integers(1, 9000), s1=st.integers(1, 300))
def test_a_text_comes_to_what_its_expression_does(expression, s0, s1) -> None:
    wanted = int(expression.xreplace(dict(zip(SYMBOLS, map(sympy.Integer, (s0, s1))))))
    text = str(expression)
    assert value_of(text, {"s0": s0, "s1": s1}) == wanted
    assert set(symbols_of([text])) == {symbol.name for symbol in expression.free_symbols}


def test_symbols_come_in_the_order_of_their_appearance() -> None:
    assert symbols_of([4, "s1*s0", "s2", "4*((s0 + 3)//4)"]) == ("s1", "s0", "s2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s0 +", "is no expression"),
        ("__import__('os')", "calls __import__"),
        ("s0.real", "Attribute"),
        ("s0 / 2", "Div"),
        ("1.5*s0", "1.5"),
        ("[s0]", "List"),
        ("Max(s0, key=1)", "calls Max"),
    ],
)
def test_what_is_no_arithmetic_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        value_of(text, {"s0": 1})
