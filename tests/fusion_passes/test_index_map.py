"""Index maps against index arrays: what a chain of views does to real elements is the oracle."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import sympy
from hypothesis import assume, given
from hypothesis import strategies as st

from fusion_passes import index_map
from fusion_passes.index_map import IndexMap

TOKENS = sympy.Symbol("s0", integer=True, positive=True)
OTHER = sympy.Symbol("s1", integer=True, positive=True)


def elements(mapping: IndexMap, count: int) -> list[int]:
    """Which element of the source each of ``count`` elements of the reader is: digit by digit, from the last."""
    found = []
    for index in range(count):
        source, weight = 0, 1
        for position in reversed(range(len(mapping))):
            size, kept = mapping[position]
            digit = index if position == 0 else index % int(size)
            index //= max(int(size), 1)
            if kept:
                source += digit * weight
                weight *= int(size)
        found.append(source)
    return found


@dataclass
class Chain:
    """Steps from a source to a reader: the element numbers that arrive, and each step's map and words."""

    array: np.ndarray
    steps: list[IndexMap] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def step(self, array: np.ndarray, mapping: IndexMap, word: str) -> None:
        self.array = array
        self.steps.append(mapping)
        self.words.append(word)

    def composed(self) -> IndexMap | None:
        """As ``operations.read`` composes: from the reader upwards, one step at a time."""
        mapping: IndexMap | None = index_map.broadcast(self.array.shape, self.array.shape)
        for inner in reversed(self.steps):
            mapping = index_map.compose(mapping or ((1, True),), inner)
            if mapping is None:
                return None
        return mapping


@st.composite
def factorizations(draw: st.DrawFn, number: int) -> tuple[int, ...]:
    """A shape with that many elements, ones included."""
    shape = [] if number else [0, draw(st.sampled_from((1, 3)))]
    while number > 1:
        factor = draw(st.sampled_from([d for d in range(2, number + 1) if number % d == 0]))
        shape.append(factor)
        number //= factor
    for _ in range(draw(st.integers(0, 2))):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return tuple(shape)


@st.composite
def chains(
    draw: st.DrawFn, sizes: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8), slices: bool = True
) -> Chain:
    shape = draw(st.lists(st.sampled_from(sizes), max_size=3))
    count = math.prod(shape)
    chain = Chain(np.arange(count).reshape(shape))
    identity = lambda array: ((array.size, True),)  # noqa: E731
    for kind in draw(
        st.lists(st.sampled_from(("reshape", "expand", *(["slice"] if slices else []))), max_size=5)
    ):
        old = chain.array
        if kind == "reshape":
            new = old.reshape(draw(factorizations(old.size)))
            chain.step(new, identity(old), f"reshape{new.shape}")
        elif kind == "expand" and old.size <= 64:
            dim = draw(st.integers(0, old.ndim))
            once = np.expand_dims(old, dim)
            chain.step(once, identity(old), f"unsqueeze({dim})")
            wide = np.repeat(once, draw(st.sampled_from(sizes)), axis=dim)
            chain.step(wide, index_map.broadcast(once.shape, wide.shape), f"expand{wide.shape}")
        elif kind == "slice" and old.ndim and old.shape[0] > 1:
            new = old[: draw(st.integers(1, old.shape[0]))]
            chain.step(new, identity(old), f"[:{new.shape[0]}]")
    return chain


@given(chain=chains())
def test_a_composed_map_says_where_elements_come_from(chain):
    mapping = chain.composed()
    assume(mapping is not None)
    assert elements(mapping, chain.array.size) == chain.array.flatten().tolist(), chain.words


@given(chain=chains(sizes=(1, 2, 4, 8), slices=False))
def test_sizes_that_divide_each_other_always_compose(chain):
    mapping = chain.composed()
    assert mapping is not None, chain.words
    assert elements(mapping, chain.array.size) == chain.array.flatten().tolist(), chain.words


def pairs(drawn: list[Chain]) -> Iterator[tuple[Chain, Chain, bool]]:
    """Chains that end in as many elements, and whether they are the same elements."""
    for a, b in itertools.combinations(drawn, 2):
        if a.array.size == b.array.size and a.composed() is not None and b.composed() is not None:
            yield a, b, bool((a.array.flatten() == b.array.flatten()).all())


@given(drawn=st.lists(chains(sizes=(1, 2, 4)), min_size=12, max_size=24))
def test_equal_maps_read_equal_elements(drawn):
    for a, b, same in pairs(drawn):
        assert same or not index_map.same_map(a.composed(), b.composed()), (a.words, b.words)


@given(drawn=st.lists(chains(sizes=(1, 2, 4), slices=False), min_size=12, max_size=24))
def test_equal_elements_have_equal_maps(drawn):
    """Otherwise a spelling of a pattern would go unnoticed."""
    for a, b, same in pairs(drawn):
        assert not same or index_map.same_map(a.composed(), b.composed()), (a.words, b.words)


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_a_reduction_keeps_the_digits_that_number_its_result(shape, data):
    dims = data.draw(st.lists(st.integers(-len(shape), len(shape) - 1), max_size=len(shape)))
    kept = [d for d in range(len(shape)) if d not in {dim % len(shape) for dim in dims}]
    numbers = np.arange(math.prod(shape[d] for d in kept))
    numbers = numbers.reshape([shape[d] if d in kept else 1 for d in range(len(shape))])
    expected = np.broadcast_to(numbers, shape).flatten().tolist()
    mapping = index_map.reduction(shape, dims)
    if mapping and not mapping[0][1]:
        mapping = ((1, True), *mapping)  # what leads here is repeated a known number of times
    assert elements(mapping, math.prod(shape)) == expected


@given(chain=chains(sizes=(0, 1, 2, 3)))
def test_empty_tensors_compose_without_errors(chain):
    mapping = chain.composed()
    assert mapping is None or index_map.same_map(mapping, mapping)


def spellings(tokens, groups, size):
    """A scale for each group of a row, spelt three ways, and the operands' own map."""
    source = ((tokens * groups, True),)
    flat = (tokens, groups * size)
    wide = (tokens, groups, size)
    interleaved = index_map.compose(
        index_map.broadcast(flat, flat), index_map.broadcast((tokens, groups, 1), wide)
    )
    broadcast = index_map.broadcast((tokens, groups, 1), wide)
    twice = index_map.compose(((tokens, True), (groups, True), (size, False), (1, True)), source)
    return [interleaved, broadcast, twice]


@pytest.mark.parametrize("tokens", [1, 7, TOKENS, TOKENS * OTHER, 2 * TOKENS + 1])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("size", [1, 128])
def test_a_scale_reads_the_same_in_each_spelling(tokens, groups, size):
    first, *rest = spellings(tokens, groups, size)
    assert all(other is not None and index_map.same_map(first, other) for other in rest)
    weight = index_map.broadcast((groups * size,), (tokens, groups * size))
    assert index_map.same_map(first, weight) == (size == 1 and tokens == 1)


def test_another_row_length_is_another_map():
    assert not index_map.same_map(((TOKENS, True), (128, False)), ((TOKENS, True), (64, False)))
    assert not index_map.same_map(((TOKENS, False), (128, True)), ((TOKENS, True), (128, False)))
    assert not index_map.same_map(((2, True), (TOKENS, False)), ((2, True), (OTHER, False)))


polynomials = st.builds(
    lambda a, b, c: a * TOKENS * OTHER + b * TOKENS + c,
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(1, 9),
)


@given(a=polynomials, b=polynomials, seed=st.integers(1, 50))
def test_a_quotient_is_whole_whatever_the_sizes_are(a, b, seed):
    assert index_map.same_size(index_map.divide(sympy.expand(a * b), b), a)
    quotient = index_map.divide(a, b)
    if quotient is not None:
        values = {TOKENS: seed, OTHER: 3 * seed + 1}
        assert sympy.sympify(quotient * b - a).subs(values) == 0
        assert sympy.sympify(quotient).subs(values).is_integer


@pytest.mark.parametrize(
    ("a", "b"), [(TOKENS, 2), (TOKENS, OTHER), (7, 2), (7, 0), (2, TOKENS), (TOKENS // 2, 2)]
)
def test_what_may_leave_a_remainder_is_not_divided(a, b):
    assert index_map.divide(a, b) is None
