"""Norms in a spelling that no pattern has: too far from all of them for a near miss, and told all the same.

x / sqrt(mean(x * x) + eps)          a division by a root rounds differently from a product with rsqrt
x * rsqrt(sum(x * x) / n + eps)      the same value, spelt in a way that is not read
x / max(norm(x), eps) * sqrt(n)      F.normalize: the same but for eps, which bounds the length; times a weight
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fusion_passes import index_map, torch_internals
from fusion_passes.operations import (
    describe,
    is_tensor,
    module_path,
    readers,
    shape_of,
    transparent,
)
from fusion_passes.reporting import NearMiss

FUSION = "rms_norm"
_ROOTS = {"aten.sqrt.default": "a square root", "aten.rsqrt.default": "rsqrt"}
_ON_THE_WAY = {"cast", "add", "div", "mul", "aten.clamp_min.default"}


def find(graph: fx.Graph) -> Iterator[NearMiss]:
    """One near miss for each root of a mean of squares that is left in a graph whose norms were recognized."""
    for node in graph.nodes:
        operation = describe(node)
        if operation is not None and operation.name == "div" and _is_scaled_length(node):
            accepted = "x * rsqrt(mean(x * x) + eps)"
            reason = (
                f"{node.name} divides by a length, of which eps is the least; accepted: {accepted}"
            )
            yield NearMiss(FUSION, module_path(node), node.name, reason)
        if operation is None or operation.name not in _ROOTS:
            continue
        mean = _mean_of_squares(node)
        if mean is None:
            continue
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        where = module_path(node)
        if operation.name == "aten.sqrt.default":
            why = "every known spelling multiplies by rsqrt, which rounds differently from a division by a root"
        elif node.meta["val"].dtype is not torch.float32:
            why = "every known spelling computes it in float32"
        else:
            why = "what surrounds it is no known spelling of a norm"
        reason = f"{node.name} is {_ROOTS[operation.name]} of a mean of squares ({mean.name}) in {dtype}: {why}"
        yield NearMiss(FUSION, where, node.name, reason)


def _mean_of_squares(root: fx.Node) -> fx.Node | None:
    """The mean, or the sum that is divided by a number, of squares that a root is of; None where it is of none."""
    node, divided = _source(root.args[0]), False
    while node is not None and (operation := describe(node)) is not None:
        if operation.name == "mean" or (operation.name == "sum" and divided):
            squared = _source(operation.operands[0])
            inner = describe(squared) if squared is not None else None
            if inner is None or inner.name != "square" or _is_centred(inner.operands[0]):
                return None
            return node
        if operation.name not in _ON_THE_WAY:
            return None
        tensors = [operand for operand in operation.operands if is_tensor(operand)]
        divided = divided or (operation.name in ("div", "mul") and len(tensors) == 1)
        node = _source(tensors[0]) if tensors else None
    return None


def _is_scaled_length(divided: fx.Node) -> bool:
    """Whether a row is divided by its length, and multiplied by the root of its width, which makes it an RMSNorm."""
    row, length = divided.args[:2]
    total = _past(length, ("cast", "aten.clamp_min.default", "aten.sqrt.default"))
    summed = describe(total) if total is not None else None
    if total is None or summed is None or summed.name != "sum":
        return False
    squared = _source(summed.operands[0])
    inner = describe(squared) if squared is not None else None
    if squared is None or inner is None or inner.name != "square":
        return False
    if _uncast(inner.operands[0]) is not _uncast(row):
        return False
    whole, rows = (index_map.product(shape_of(node)) for node in (squared, total))
    width = torch_internals.size_hint(index_map.divide(whole, rows) or 0, divided.graph)
    if not width:
        return False
    root = math.sqrt(width)
    return any(abs(factor - root) < 1e-3 * root for factor in _factors(divided))


def _factors(value: fx.Node) -> Iterator[float]:
    """The numbers that a value is multiplied by before anything else happens to it."""
    for reader in readers(value):
        operation = describe(reader)
        if operation is not None and operation.name == "cast":
            yield from _factors(reader)
        elif operation is not None and operation.name == "mul":
            yield from (n for n in operation.operands if isinstance(n, (int, float)))
            yield from _factors(reader)


def _is_centred(value: Any) -> bool:
    """Whether a mean was taken off a value: the mean of its squares is a variance, and the norm a LayerNorm."""
    node = _uncast(value)
    operation = describe(node) if node is not None else None
    if operation is None or operation.name != "sub":
        return False
    taken = _uncast(operation.operands[1])
    mean = describe(taken) if taken is not None else None
    return mean is not None and mean.name == "mean"


def _uncast(value: Any) -> fx.Node | None:
    return _past(value, ("cast",))


def _past(value: Any, names: tuple[str, ...]) -> fx.Node | None:
    """What a value is through views and operations of these names."""
    node = _source(value)
    while node is not None and (operation := describe(node)) and operation.name in names:
        node = _source(operation.operands[0])
    return node


def _source(value: Any) -> fx.Node | None:
    """What a value is through views; None for what is no tensor."""
    while is_tensor(value) and (step := transparent(value)) is not None:
        value = step[0]
    return value if is_tensor(value) else None
