"""Where an operand's elements come from, whatever views, expands and reshapes lie in between.

Every tensor is read as the flat row-major sequence of its elements. A reshape is then the identity, an
expand repeats elements, a slice that keeps a prefix of the leading dimension shortens the sequence. What
remains of any chain of them is an :class:`IndexMap`: a mixed-radix number with one *digit* per run of
dimensions, each digit either *kept* (it selects an element of the source) or *repeated* (it does not).

    x[T, G, 1] read by an operation over [T, G, 128]      ((T*G, kept), (128, repeated))
    w[H]       read by an operation over [B, S, H]        ((B*S, repeated), (H, kept))

Two chains that spell the same map compare equal: ``repeat_interleave``, ``unsqueeze().expand().reshape()``
and broadcasting against a 4-D view all become the same digits. Reductions use the same form, with *repeated*
read as *reduced*. Sizes are ints or sympy expressions; nothing here ever adds a guard.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

Size = Any
"""An ``int`` or a ``sympy.Expr``."""
Digit = tuple[Size, bool]
"""A size, and whether the digit is kept."""
IndexMap = tuple[Digit, ...]


def same_size(a: Size, b: Size) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(a == b or sympy.expand(a - b) == 0)


def divide(a: Size, b: Size) -> Size | None:
    """``a / b`` where that is known to be a whole number, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    if same_size(a, b):
        return 1
    quotient = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    numerator, denominator = quotient.as_numer_denom()
    if denominator != 1:
        return None
    return int(numerator) if numerator.is_number else numerator


def product(sizes: Sequence[Size]) -> Size:
    result: Size = 1
    for size in sizes:
        result = result * size
    return result


def collapse(digits: Sequence[Digit]) -> IndexMap:
    """Drop digits of size 1 and merge neighbours of one kind."""
    merged: list[Digit] = []
    for size, kept in digits:
        if isinstance(size, int) and size == 1:
            continue
        if merged and merged[-1][1] == kept:
            merged[-1] = (merged[-1][0] * size, kept)
        else:
            merged.append((size, kept))
    return tuple(merged)


def broadcast(source: Sequence[Size], result: Sequence[Size]) -> IndexMap:
    """The map of a tensor of shape ``source`` that is broadcast to shape ``result``."""
    padded = [1] * (len(result) - len(source)) + list(source)
    return collapse(
        [(out, not (isinstance(size, int) and size == 1 and not same_size(out, 1)))
         for size, out in zip(padded, result, strict=True)]
    )  # fmt: skip


def reduction(shape: Sequence[Size], dims: Sequence[int]) -> IndexMap:
    """The digits of a tensor of ``shape`` of which the dimensions ``dims`` are reduced (not kept)."""
    reduced = {dim % len(shape) for dim in dims} if shape else set()
    return collapse([(size, dim not in reduced) for dim, size in enumerate(shape)])


def compose(outer: IndexMap, inner: IndexMap) -> IndexMap | None:
    """First ``outer`` (from the reader to a middle tensor), then ``inner`` (from there to the source).

    The kept digits of ``outer`` count the middle tensor's elements, as all digits of ``inner`` do; both are
    split until they agree. None where the sizes do not split evenly.
    """
    result: list[Digit] = []
    pending = list(inner)
    for position in reversed(range(len(outer))):
        size, kept = outer[position]
        if not kept:
            result.append((size, False))
            continue
        if (
            position == 0
        ):  # whatever is left lies under the leading digit, whole or cut short by a slice
            result.extend(reversed(pending))
            pending.clear()
            break
        rest = size
        while not same_size(rest, 1):
            if not pending:
                return None
            inner_size, inner_kept = pending.pop()
            quotient = divide(rest, inner_size)
            if quotient is not None:
                result.append((inner_size, inner_kept))
                rest = quotient
                continue
            quotient = divide(inner_size, rest)
            if quotient is None:
                return None
            result.append((rest, inner_kept))
            pending.append((quotient, inner_kept))
            rest = 1
    if any(not same_size(size, 1) for size, _ in pending):
        return None
    return collapse(result[::-1])


def same_map(a: IndexMap, b: IndexMap) -> bool:
    """Whether two collapsed maps agree.

    A leading kept digit is the quotient by all the others, so its size follows from the number of elements
    and is not compared; that is what makes a prefix slice of the leading dimension transparent.
    """
    a, b = (m if m and m[0][1] else ((1, True), *m) for m in (a, b))
    if len(a) != len(b):
        return False
    return all(
        kept == other_kept and (index == 0 or same_size(size, other))
        for index, ((size, kept), (other, other_kept)) in enumerate(zip(a, b, strict=True))
    )
