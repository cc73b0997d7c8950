"""Small questions to a node, for walks over a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from fusion_passes import index_map
from fusion_passes.index_map import Size
from fusion_passes.operations import is_tensor, read, readers, shape_of, transparent

aten = torch.ops.aten
prims = torch.ops.prims

CAST = prims.convert_element_type.default
_GATHERS = {
    aten.index.Tensor,
    aten.index_select.default,
    aten.embedding.default,
    aten.gather.default,
}
_HOLD_IDS = (torch.int32, torch.int64, torch.float32, torch.float64)
_MASKS = {aten.where.self, aten.where.ScalarSelf}


class Unlike(Exception):
    """A walk came to something that it does not look for; ``node``: where."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


def numel(node: fx.Node) -> Size:
    return index_map.product(shape_of(node))


def views(node: fx.Node) -> Iterator[fx.Node]:
    """The node, and the values that it is only another shape of, nearest first."""
    yield node
    while (step := transparent(node)) is not None and index_map.same_size(
        numel(step[0]), numel(node)
    ):
        node = step[0]
        yield node


def strip(node: fx.Node) -> fx.Node:
    """The value itself: the same elements in the same order, before any view."""
    return list(views(node))[-1]


def uncast(node: fx.Node) -> fx.Node:
    """`strip`, and through casts that keep the ids of experts and the numbers of pairs as they are."""
    node = strip(node)
    while node.target is CAST and dtype_of(node) in _HOLD_IDS:
        node = strip(node.args[0])
    return node


def shaped(node: fx.Node, *shape: Size) -> fx.Node | None:
    """A view of a value that has a shape already."""
    for view in views(node):
        found = shape_of(view)
        if len(found) == len(shape) and all(map(index_map.same_size, found, shape)):
            return view
    return None


def dtype_of(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype


def number(value: Any) -> float | int | None:
    """A number, given as such or as a tensor of one value; None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, fx.Node):
        if value.target is aten.full.default:
            return number(value.args[1])
        if value.target is aten.scalar_tensor.default:
            return number(value.args[0])
    return None


def order_of(names: str, sizes: Mapping[str, Size]) -> str:
    """Dimensions in the order that they have in memory, such as "ETH", without those of size 1."""
    return "".join(name for name in names if sizes[name] != 1)


def order_after(turn: fx.Node, order: str, sizes: Mapping[str, Size]) -> str | None:
    """The order after a permutation; None where its dimensions are not the named ones."""
    source = shape_of(turn.args[0])
    kept = [dim for dim, size in enumerate(source) if size != 1]
    if len(kept) != len(order):
        return None
    named = dict(zip(kept, order, strict=True))
    if not all(index_map.same_size(source[dim], sizes[name]) for dim, name in named.items()):
        return None
    return "".join(named[dim % len(source)] for dim in turn.args[1] if dim % len(source) in named)


def element(node: Any, target: Any = None) -> tuple[fx.Node, int] | None:
    """The source and the index of one element of a tuple; ``target``: that the source must call."""
    node = strip(node) if is_tensor(node) else node
    if not isinstance(node, fx.Node) or getattr(node.target, "__name__", "") != "getitem":
        return None
    source, index = node.args
    if target is not None and source.target not in target:
        return None
    return source, index


def gathered(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, index) where a node is x[index], rows along the first dimension."""
    node = strip(node)
    if node.target not in _GATHERS:
        return None
    source, index = node.args[0], node.args[-1]
    if node.target is aten.index_select.default:
        if node.args[1] != 0:
            return None
        index = node.args[2]
    elif node.target is aten.embedding.default:
        index = node.args[1]
    elif node.target is aten.gather.default:
        each = node.args[2]
        if each.target is aten.remainder.Scalar and each.args[1] == shape_of(source)[0]:
            each = each.args[0]  # take_along_dim, for what is below 0: no token, pair or expert is
        index = of_rows(each, node)
        widths = shape_of(source)[-1:], shape_of(node)[-1:]
        whole = all(map(index_map.same_size, *widths)) and len(shape_of(source)) == 2
        if node.args[1] != 0 or index is each or not whole:
            return None
    elif len(index) != 1:
        return None
    else:
        index = index[0]
    return (source, index) if is_tensor(index) else None


def of_rows(index: fx.Node, rows: fx.Node) -> fx.Node:
    """An index for each row, of one for each element of them."""
    shape = shape_of(rows)
    if len(shape) != 2 or index_map.same_size(numel(index), shape[0]):
        return index
    spread = index_map.collapse([(shape[0], True), (shape[1], False)])
    alike = (source for source, mapping in read(index, None) if index_map.same_map(mapping, spread))
    return next(alike, index)


def masked(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(x, mask) where a node is x with 0 in place of what the mask says."""
    node = strip(node)
    if node.target in _MASKS and number(node.args[1]) == 0 and is_tensor(node.args[2]):
        return node.args[2], node.args[0]
    if node.target is aten.masked_fill.Scalar and node.args[2] == 0:
        return node.args[0], node.args[1]
    return None


def only_reader(node: fx.Node) -> fx.Node:
    """The one operation that reads a value, through views. Raises Unlike where there are more or fewer."""
    found = list(dict.fromkeys(readers(node)))
    if len(found) != 1:
        names = ", ".join(reader.name for reader in found) or "nothing but the graph's output"
        raise Unlike(node, f"{node.name} is read by {names}, where one reader is expected")
    return found[0]


def called(node: Any) -> str:
    """What a node calls, for a sentence: ``"mul (mul_3)"``."""
    if not isinstance(node, fx.Node):
        return repr(node)
    if node.op != "call_function":
        return f"the input {node.name}"
    name = getattr(node.target, "__name__", str(node.target))
    return f"{name.split('.')[0]} ({node.name})"
