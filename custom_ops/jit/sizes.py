"""Sizes of a graph as text, such as `4*((s0 + 3)//4)`: which symbols they hold, and what they come to."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Size = int | str

# The functions that sympy and torch print in an expression of sizes.
_FUNCTIONS: dict[str, Callable[..., int]] = {
    "Max": max,
    "Min": min,
    "Mod": lambda a, b: a % b,
    "PythonMod": lambda a, b: a % b,
    "FloorDiv": lambda a, b: a // b,
    "CleanDiv": lambda a, b: a // b,
    "CeilDiv": lambda a, b: -(-a // b),
}
_ALLOWED = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.Call, ast.Name, ast.Load, ast.Constant),
    *(ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Pow, ast.USub, ast.UAdd),
)


def value_of(size: Size, values: Mapping[str, int]) -> int:
    """What a size comes to. Raises ValueError for a text that is no expression of sizes."""
    return size if isinstance(size, int) else eval(_compiled(size)[0], {}, {**_FUNCTIONS, **values})


def symbols_of(sizes: Iterable[Size]) -> tuple[str, ...]:
    """The symbols in some sizes, in the order of their first appearance. Raises ValueError as `value_of`."""
    found: dict[str, None] = {}
    for size in sizes:
        if not isinstance(size, int):
            found |= dict.fromkeys(_compiled(size)[1])
    return tuple(found)


@functools.lru_cache(maxsize=1 << 12)
def _compiled(text: str) -> tuple[Any, tuple[str, ...]]:
    """The code of an expression that holds arithmetic and nothing else, and its symbols."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        raise ValueError(f"{text!r} is no expression of sizes") from None
    names: dict[str, None] = {}
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise ValueError(f"{text!r} holds {type(node).__name__}, which no size does")
        if isinstance(node, ast.Constant) and type(node.value) is not int:
            raise ValueError(f"{text!r} holds {node.value!r}, which is no whole number")
        if isinstance(node, ast.Call) and not (
            isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
        ):
            raise ValueError(f"{text!r} calls {ast.unparse(node.func)}; known: {list(_FUNCTIONS)}")
        if isinstance(node, ast.Name) and node.id not in _FUNCTIONS:
            names[node.id] = None
    return compile(tree, "<size>", "eval"), tuple(names)
