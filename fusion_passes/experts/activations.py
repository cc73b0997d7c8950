"""What experts do between their two products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from fusion_passes import index_map, torch_internals
from fusion_passes.canonical import meanings
from fusion_passes.experts.reading import (
    CAST,
    Unlike,
    aten,
    called,
    dtype_of,
    element,
    number,
    strip,
)
from fusion_passes.index_map import Size
from fusion_passes.operations import describe, is_tensor, shape_of

GATED = {
    meanings.silu_mul: "silu_mul",
    meanings.gelu_tanh_mul: "gelu_tanh_mul",
    meanings.clamped_swiglu: "clamped_swiglu",
}
# of clamp(x, low, high) and the like: which argument is the lower bound, and which the upper one
_CLAMPS = {
    aten.clamp.default: (1, 2),
    aten.clamp_min.default: (1, None),
    aten.clamp_max.default: (None, 1),
}


class Between(NamedTuple):
    """``words``: the op's for an activation. ``source``: what it reads, ``channels`` wide (None: any width).

    ``up``: None, or gate and up are values of their own, of which ``source`` is gate.
    """

    words: dict[str, Any]
    source: fx.Node
    channels: Size | None
    up: fx.Node | None = None


def activation_of(node: fx.Node, inside: list[fx.Node]) -> Between:
    """The activation that a node is the result of; its nodes go to ``inside``. Raises Unlike for any other."""
    if node.target in GATED:
        gate, up, *numbers = node.args
        words: dict[str, Any] = {"activation": GATED[node.target]}
        if numbers:
            words |= dict(zip(("alpha", "limit"), map(float, numbers), strict=True))
        if node.target is meanings.silu_mul and (limited := _limited(gate, up)) is not None:
            gate, up = limited.gate, limited.up
            words = {"activation": "clamped_silu_mul", "limit": limited.limit}
            inside += limited.inside
        if _are_apart(gate, up):
            return Between(words, gate, None, up)
        source, interleaved, channels = _halves(gate, up, inside)
        return Between(words | {"interleaved": interleaved}, source, channels)
    if (squared := _square_of(node)) is not None and squared.target is aten.relu.default:
        inside.append(squared)
        return Between({"activation": "relu2"}, squared.args[0], None)
    unknown, name = _known_at_run_time(node), called(node)
    if node.target is CAST:
        inner = strip(node.args[0])
        name = f"{called(inner)}, in {dtype_of(inner)} and rounded to {dtype_of(node)} once,"
    if node.target is aten.slice.Tensor:
        widths = [shape_of(at)[-1] for at in (node, node.args[0])]
        raise Unlike(
            node,
            f"{name} leaves {widths[0]} of {widths[1]} channels before the second product, as quantization to FP8 does "
            "where sizes are no multiples of 128: such experts are not fused",
        )
    raise Unlike(
        node,
        f"{name} before the second product is none of the activations that are fused: "
        "silu_mul, gelu_tanh_mul, clamped_swiglu, clamped_silu_mul, relu2"
        + (f" ({unknown.name}, a number in it, is known only at run time)" if unknown else ""),
    )


def _known_at_run_time(node: fx.Node) -> fx.Node | None:
    """A number in the pointwise operations above a node that the graph has as a tensor."""
    stack, seen = [node], {node}
    while stack:
        operation = describe(stack.pop())
        if operation is None or operation.kind != "pointwise":
            continue
        for operand in filter(is_tensor, operation.operands):
            if operand.meta["val"].dim() == 0 and number(operand) is None:
                return operand
            if operand not in seen:
                seen.add(operand)
                stack.append(operand)
    return None


def _square_of(node: fx.Node) -> fx.Node | None:
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2:
        return strip(node.args[0])
    if node.target is aten.mul.Tensor and node.args[0] is node.args[1]:
        return strip(node.args[0])
    return None


def _are_apart(gate: fx.Node, up: fx.Node) -> bool:
    """Whether neither is a part of anything, or clamped as no activation that is fused has it."""
    return strip(gate) is not strip(up) and all(
        part_of(strip(node)) is None and _clamp_of(node) is None for node in (gate, up)
    )


def _halves(gate: fx.Node, up: fx.Node, inside: list[fx.Node]) -> tuple[fx.Node, bool, Size]:
    """What gate and up are the halves of, whether they are its even and its odd channels, and how many these are."""
    parts = []
    for node in (gate, up):
        if part_of(strip(node)) is None and (clamp := _clamp_of(node)) is not None:
            raise Unlike(
                clamp,
                f"{called(clamp)} clamps gate or up before they are multiplied: of the activations that are fused, "
                "clamped_silu_mul and clamped_swiglu do, gate to at most a limit and up between -limit and limit",
            )
    if strip(gate) is strip(up):
        raise Unlike(gate, f"{called(strip(gate))} is both gate and up")
    for node in (gate, up):
        part = part_of(strip(node))
        if part is None:
            raise Unlike(
                node, f"{called(strip(node))}, gate or up, is not a half of the product's channels"
            )
        inside += [strip(node), *strip(node).all_input_nodes]
        parts.append(part)
    first, second = parts
    if strip(first.source) is not strip(second.source) or first.step != second.step:
        raise Unlike(gate, f"{gate.name} and {up.name} are not halves of one product")
    half = index_map.divide(first.channels, 2)
    if (first.start, second.start, first.step) == (0, 1, 2):
        return first.source, True, first.channels
    halved = half is not None and index_map.same_size(second.start, half)
    if halved and (first.start, first.step) == (0, 1):
        return first.source, False, first.channels
    raise Unlike(gate, f"{gate.name}, the gate, is not the first half of the product's channels")


class _Limited(NamedTuple):
    """Gate and up before their clamps, to at most the limit and to at most its magnitude."""

    gate: fx.Node
    up: fx.Node
    limit: float
    inside: list[fx.Node]


def _limited(gate: fx.Node, up: fx.Node) -> _Limited | None:
    """What is under the clamps of a gate and an up projection; None where these are not to one limit."""
    first, second = _unclamped(gate), _unclamped(up)
    if first is None or second is None:
        return None
    limit = first.high
    if (first.low, second.low, second.high) != (-math.inf, -limit, limit) or limit == math.inf:
        return None
    return _Limited(first.source, second.source, limit, first.inside + second.inside)


class _Clamped(NamedTuple):
    """A value that is clamped, the bounds, and the nodes that do it."""

    source: fx.Node
    low: float
    high: float
    inside: list[fx.Node]


def _unclamped(node: fx.Node) -> _Clamped | None:
    """What is under clamps by numbers, in the node's own dtype or in float32; None where it is anything else.

    A bound may be rounded to the dtype of the node before or after, as what is clamped are values of that dtype.
    """
    source, low, high = strip(node), -math.inf, math.inf
    inside: list[fx.Node] = []
    while source.target in _CLAMPS or source.target is CAST:
        if source.target is CAST and dtype_of(source) not in (dtype_of(node), torch.float32):
            return None
        for place, at in enumerate(_CLAMPS.get(source.target, ())):
            given = source.args[at] if at is not None and at < len(source.args) else None
            bound = number(given)
            if given is not None and (bound is None or math.isnan(bound)):
                return None  # a number that is known only at run time, or is none
            if bound is not None:
                low, high = (max(low, bound), high) if place == 0 else (low, min(high, bound))
        inside.append(source)
        source = strip(source.args[0])
    if not low <= high or dtype_of(source) is not dtype_of(node):
        return None
    return _Clamped(source, low, float(high), inside)


def _clamp_of(node: fx.Node) -> fx.Node | None:
    """The clamp that a node is the result of, rounded or not."""
    node = strip(node)
    while node.target is CAST:
        node = strip(node.args[0])
    return node if node.target in _CLAMPS else None


def behind(node: fx.Node) -> Iterator[fx.Node]:
    """A value and those that it comes of by pointwise operations and as a part, down to what is neither."""
    stack, seen = [node], set()
    while stack:
        node = strip(stack.pop())
        if node in seen:
            continue
        seen.add(node)
        yield node
        operation, part = describe(node), part_of(node)
        if part is not None:
            stack.append(part.source)
        elif operation is not None and operation.kind == "pointwise":
            stack += filter(is_tensor, operation.operands)


class Part(NamedTuple):
    """Every step-th channel of a source that has so many channels, from start."""

    source: fx.Node
    start: Size
    step: int
    channels: Size


def part_of(node: fx.Node) -> Part | None:
    """What channels of what a node is, if it is such a part."""
    if (taken := element(node, {aten.split.Tensor, aten.split_with_sizes.default})) is not None:
        split, position = taken
        source, sizes = split.args[0], split.args[1]
        if not _is_last(split.args[2] if len(split.args) > 2 else 0, source):
            return None
        before = sizes[:position] if isinstance(sizes, (list, tuple)) else [sizes] * position
        return Part(source, sum(map(_size, before)), 1, shape_of(source)[-1])
    if node.target is aten.slice.Tensor:
        given: tuple[Any, ...] = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
        source, dim, start, _, step = given
        if not _is_last(dim, source):
            return None
        return Part(source, _size(start or 0), step, shape_of(source)[-1])
    if (picked := _picked(node)) is not None:
        pairs, dim, index = picked
        shape = shape_of(pairs)
        rank = len(shape)
        if rank > 1 and shape[dim] == 2 and dim == rank - 1:  # [..., I, 2]
            return Part(pairs, index, 2, 2 * shape[-2])
        if rank > 1 and shape[dim] == 2 and dim == rank - 2:  # [..., 2, I]
            return Part(pairs, index * shape[-1], 1, 2 * shape[-1])
    return None


def _picked(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """(x, dim, index) where a node is one of the two that a dimension of x has."""
    if node.target is aten.select.int:
        source, dim, index = node.args
    elif (taken := element(node, {aten.unbind.int})) is not None:
        source, dim, index = taken[0].args[0], (*taken[0].args[1:], 0)[0], taken[1]
    else:
        return None
    return (source, dim % len(shape_of(source)), index % 2) if isinstance(index, int) else None


def _size(value: Any) -> Size:
    """A number, as such or as the node that has it where it is known only at run time."""
    known = not isinstance(value, fx.Node)
    return value if known else torch_internals.size_to_expr(value.meta["val"])


def _is_last(dim: int, node: fx.Node) -> bool:
    rank = len(shape_of(node))
    return dim % rank == rank - 1
