"""Where a match stopped, and the words in which the report says so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusion_passes.compiled_pattern import Monomial
from fusion_passes.index_map import IndexMap
from fusion_passes.operations import Operation, describe, is_tensor, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Mismatch:
    """Where a match stopped. ``progress``: how many of the pattern's operations had been found by then.

    whole: whether it is a match that its fusion refuses.
    """

    progress: int
    total: int
    node: fx.Node | None
    reason: str
    whole: bool = False


def product_of(monomial: Monomial) -> str:
    number, names = monomial
    return " * ".join([*names, *([str(number)] if number != 1 or not names else [])])


def digits(mapping: IndexMap) -> str:
    return (
        " x ".join(f"{size}{'' if kept else ' repeated'}" for size, kept in mapping)
        or "one element"
    )


def short(name: str) -> str:
    """An operation's own name: "mul" of "aten.mul.Tensor", "getitem" of "<built-in function getitem>"."""
    if function := re.match(r"<(?:built-in )?function (\w+)", name):
        return function[1]
    for namespace in ("aten.", "prims.", "custom_ops."):
        name = name.removeprefix(namespace)
    return name.split(".")[0]


def named(value: Any) -> str:
    return value.name if isinstance(value, fx.Node) else repr(value)


def found_as(node: fx.Node, operation: Operation | None) -> str:
    if operation is None:
        return f"{node.op} {node.name}"
    cut = f", {part(node, node.args[0])}" if node.target is aten.slice.Tensor else ""
    return f"{short(operation.name)} ({node.name}){cut}"


def part(node: fx.Node, source: Any) -> str:
    part, whole = (f"[{', '.join(map(str, shape_of(each)))}]" for each in (node, source))
    return f"{part} of {whole}"


def another(
    pattern_node: fx.Node, expected: Operation, node: fx.Node, found: Operation | None
) -> str:
    """What a place is where a pattern has another operation."""
    source = expected.operands[0] if expected.name == "cast" else None
    if isinstance(source, fx.Node) and is_tensor(source) and is_tensor(pattern_node):
        dtypes = [n.meta["val"].dtype for n in (source, pattern_node)]
        given = node.meta["val"].dtype if is_tensor(node) else None
        if dtypes == [torch.bfloat16, torch.float32] and given is torch.float32:
            return (
                f"{found_as(node, found)} is {given} already, where bfloat16 or float16 values that are cast to "
                "float32 are expected"
            )
    rounded = _rounded(node, found)
    if rounded is not None and is_tensor(pattern_node) and expected.name != "cast":
        theirs = found_as(rounded, describe(rounded))
        wanted, given = (n.meta["val"].dtype for n in (pattern_node, rounded))
        return f"expected {short(expected.name)} in {wanted}, found {theirs} in {given}"
    return f"expected {short(expected.name)}, found {found_as(node, found)}"


def _rounded(node: fx.Node, found: Operation | None) -> fx.Node | None:
    """The 16-bit value that a node casts to float32, or that it is a cast to."""
    source = found.operands[0] if found is not None and found.name == "cast" else None
    if not isinstance(source, fx.Node):
        return None
    wide = node.meta["val"].dtype is torch.float32
    value = source if wide else node
    return value if value.meta["val"].dtype in (torch.bfloat16, torch.float16) else None
