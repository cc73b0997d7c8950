"""A product with one weight for a whole batch is the product of all its rows, as most linears have it.

    bmm(x [B, M, K], expand(w [K, N], [B, K, N]))      ->      view(mm(reshape(x, [B * M, K]), w), [B, M, N])

`F.linear` of an activation that is no view of rows becomes the former, which no pattern has: the patches of a
convolution are transposed in memory, and so is what is added to them (Pixtral, AIMv2). What no fusion took goes back to
it, as the reshape would copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from fusion_passes import index_map, torch_internals
from fusion_passes.index_map import Size
from fusion_passes.operations import read, shape_of, transparent

aten = torch.ops.aten


@dataclass
class Flattened:
    """``product`` [B * M, N] stands in the graph for a bmm; ``result`` [B, M, N] is the view of it in its place."""

    product: fx.Node
    result: fx.Node
    shape: tuple[Size, ...]  # of x

    def restore(self, graph: fx.Graph) -> None:
        if not self.product.users:  # erased: a fusion took it
            return
        rows, weight = self.product.args
        x = _of_shape(rows, self.shape)
        if x is None:
            return  # a fusion made the rows: they are rows in memory
        with graph.inserting_before(self.product):
            sizes = [_sizes(graph, x, self.shape[:1])[0], -1, -1]
            spread = graph.call_function(aten.expand.default, (weight, sizes))
            batched = graph.call_function(aten.bmm.default, (x, spread))
        batch = x.meta["val"].shape[0]
        spread.meta["val"] = weight.meta["val"].expand(batch, *weight.meta["val"].shape)
        batched.meta = dict(self.result.meta)
        self.result.replace_all_uses_with(batched)


def flatten(graph: fx.Graph) -> list[Flattened]:
    """Put the product of rows in the place of each product of a batch with one weight."""
    found = []
    mode = torch_internals.fake_mode_of(graph)
    for node in graph.find_nodes(op="call_function", target=aten.bmm.default):
        weight = _spread_weight(node.args[1])
        x, width = node.args[0], shape_of(node.args[0])[-1]
        if weight is None or not isinstance(width, int):
            continue
        value, features = x.meta["val"], weight.meta["val"].shape[1]
        count = value.shape[0] * value.shape[1]
        with graph.inserting_before(node):
            rows = graph.call_function(aten.reshape.default, (x, [-1, width]))
            product = graph.call_function(aten.mm.default, (rows, weight))
            sizes = _sizes(graph, x, shape_of(node))
            result = graph.call_function(aten.view.default, (product, sizes))
        result.meta = dict(node.meta)
        with mode:  # not by the operators: a reshape would ask how the sizes lie in memory
            rows.meta = {**node.meta, "val": value.new_empty(count, width)}
            product.meta = {**node.meta, "val": value.new_empty(count, features)}
        node.replace_all_uses_with(result)
        found.append(Flattened(product, result, shape_of(x)))
    if found:
        torch_internals.tidy(graph)
    return found


def restore(graph: fx.Graph, flattened: Sequence[Flattened]) -> None:
    """Undo what no fusion made use of."""
    for entry in flattened:
        entry.restore(graph)
    if flattened:
        torch_internals.tidy(graph)


def _spread_weight(operand: fx.Node) -> fx.Node | None:
    """[K, N], where an operand [B, K, N] is that for every B."""
    node = operand
    while (step := transparent(node)) is not None:
        source = step[0]
        if node.target is aten.expand.default and source.meta["val"].dim() == 2:
            break
        node = source
    else:
        return None
    batch, *rest = shape_of(operand)
    wanted = index_map.collapse([(batch, False), (index_map.product(rest), True)])
    mapping = next(mapping for each, mapping in read(operand, None) if each is source)
    same = index_map.same_size(index_map.product(shape_of(source)), index_map.product(rest))
    fits = index_map.same_size(shape_of(source)[-1], rest[-1])
    return source if same and fits and index_map.same_map(mapping, wanted) else None


def _of_shape(rows: fx.Node, shape: Sequence[Size]) -> fx.Node | None:
    """The nearest value of a shape that the rows are a view of."""
    for node, _ in read(rows, None):
        found = shape_of(node)
        if len(found) == len(shape) and all(map(index_map.same_size, found, shape)):
            return node
    return None


def _sizes(graph: fx.Graph, x: fx.Node, shape: Sequence[Size]) -> list[int | fx.Node]:
    """Arguments for a shape that begins as that of x does."""
    sizes: list[int | fx.Node] = []
    for dim, size in enumerate(shape):
        if not isinstance(size, int):
            node = graph.call_function(aten.sym_size.int, (x, dim))
            node.meta["val"] = x.meta["val"].shape[dim]
            size = node
        sizes.append(size)
    return sizes
