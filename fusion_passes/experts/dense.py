"""Experts that all tokens go through, where all weights of a token but those of its top-k experts are 0.

    hidden [T, H] for each expert  ->  product [E, T, F]  (+ bias)  ->  activation  ->  product [E, T, H]  (+ bias)
        ->  times the weight of each expert and token  ->  [E, T, H] summed over E

As Llama 4 is written, which multiplies what the experts read, and gpt-oss was in older releases of transformers. The
weights are a matrix [T, E] that a scatter by top-k ids writes into zeros, or into what becomes 0 afterwards:
sigmoid(-inf). So an expert adds 0 to each token that did not choose it, and only the chosen ones have to be computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from fusion_passes import index_map
from fusion_passes.experts import block, combining, first_products, misses
from fusion_passes.experts.activations import activation_of, behind
from fusion_passes.experts.block import Block
from fusion_passes.experts.products import Product, weight_of
from fusion_passes.experts.reading import (
    CAST,
    Unlike,
    aten,
    called,
    dtype_of,
    numel,
    only_reader,
    order_after,
    order_of,
    strip,
)
from fusion_passes.experts.routing import Routing
from fusion_passes.experts.spread import before_cast, factor_of, spread_of
from fusion_passes.fusion import Fusion
from fusion_passes.index_map import Size
from fusion_passes.operations import is_tensor, module_path, read, shape_of
from fusion_passes.places import Place
from fusion_passes.reporting import NearMiss


def find(fusion: Fusion, graph: fx.Graph) -> Iterable[Place | NearMiss]:
    """Every such block of a graph, and the reasons of those that are not as above."""
    for node in graph.nodes:
        if misses.is_dense(node):
            try:
                yield block.place(fusion, graph, _block(node))
            except Unlike as why:
                yield NearMiss(fusion.name, module_path(node), why.node.name, why.reason)


def _block(second: fx.Node) -> Block:
    experts, num_tokens, hidden_size = shape_of(second)
    if dtype_of(second) not in (torch.bfloat16, torch.float16):
        raise Unlike(second, f"{second.name} is {dtype_of(second)}; supported: bfloat16, float16")
    firsts = [value for value in behind(second.args[0]) if misses.multiplies_a_weight(value)]
    inside = [second]
    sizes = {"E": experts, "T": num_tokens, "H": hidden_size}
    hidden_states, before = _hidden_states(firsts[0], sizes, inside)
    after = _After(second, sizes, inside)
    matrices = [found for found in (before and before.matrix, after.matrix) if found is not None]
    if len(matrices) != 1:
        how = "by no weight of a token and an expert" if not matrices else "by two such weights"
        raise Unlike(
            second,
            f"each expert of {second.name} has all tokens, and its results are multiplied {how}",
        )
    spread = spread_of(matrices[0], num_tokens, experts)
    routing = Routing(spread.ids, experts)
    products = {
        node: Product(
            node, node.args[0], weight_of(node.args[1], True), routing, False, of_all=True
        )
        for node in (second, *firsts)
    }
    between = strip(second.args[0])
    inside.append(between)
    activation = activation_of(between, inside)
    first, up, bias = first_products.read_by(activation, products[second], products, inside)
    if strip(first.rows) is not strip(firsts[0].args[0]):  # of which a bias may be made, too
        raise Unlike(first.node, f"{firsts[0].name} multiplies other rows than {first.node.name}")
    if before is not None and (bias is not None or after.bias is not None):
        raise Unlike(
            second, "what experts read is weighted, and with a bias they do not make 0 of 0"
        )
    found = Block(routing, first, up, products[second], activation.words, inside, bias)
    found.hidden_states, found.down_bias = hidden_states, after.bias
    found.spread = spread
    found.weights_dtype = after.dtype if before is None else before.dtype
    if before is not None:
        found.before = first_products.Weighted(
            hidden_states, spread.matrix, before.dtype, before.dtype is torch.float32
        )
    top_k = shape_of(spread.written)[-1]
    if not (isinstance(top_k, int) and isinstance(experts, int) and 2 * top_k <= experts):
        raise Unlike(
            second,
            f"{top_k} of {experts} experts are chosen: where they are more than half, products for these alone may be "
            f"no faster than {second.name}, which is for all",
        )
    block.measure(found, combining.Total(after.total, num_tokens, top_k, hidden_size))
    found.output = after.total
    if dtype_of(after.total) is not dtype_of(second):
        found.output = block.cast_to(after.total, dtype_of(second))
        inside.append(after.total)
    return found


# ---- what the experts read ----------------------------------------------------------------------------------------


class _Before(NamedTuple):
    """``matrix``: what rows were multiplied with, and in which dtype; they are rounded then."""

    matrix: fx.Node
    dtype: torch.dtype


def _hidden_states(
    first: fx.Node, sizes: Mapping[str, Size], inside: list[fx.Node]
) -> tuple[fx.Node, _Before | None]:
    """The hidden states [T, H] that each expert has all of, and how they were multiplied first, if they were."""
    rows = strip(first.args[0])
    if (found := _of_all(first.args[0], None, sizes["E"])) is not None:
        return found, None
    scaled = rows
    if scaled.target is CAST and dtype_of(strip(scaled.args[0])) is torch.float32:
        scaled = strip(scaled.args[0])
    if scaled.target is aten.mul.Tensor and all(map(is_tensor, scaled.args)):
        for given, other in (scaled.args, scaled.args[::-1]):
            hidden = _of_all(before_cast(given), shape_of(scaled), sizes["E"])
            if hidden is not None and hidden.target is CAST and dtype_of(hidden) is torch.float32:
                hidden = strip(hidden.args[0])
            matrix = factor_of(other, scaled, order_of("ETH", sizes), sizes)
            if hidden is not None and matrix is not None and dtype_of(hidden) is dtype_of(first):
                inside += [rows, scaled]
                return hidden, _Before(matrix, dtype_of(scaled))
    raise Unlike(
        first,
        f"{first.name} gives every expert rows of its own: none is routed, but all of them or as many as an expert has "
        "room for are multiplied",
    )


def _of_all(node: fx.Node, shape: Sequence[Size] | None, experts: Size) -> fx.Node | None:
    """[T, H], in any shape, where a node has it once for each expert, one after the other."""
    rest = index_map.divide(index_map.product(shape_of(node) if shape is None else shape), experts)
    if rest is None:
        return None
    wanted, whole = (index_map.collapse([(experts, kept), (rest, True)]) for kept in (False, True))
    for value, mapping in read(node, shape):
        if index_map.same_map(mapping, wanted) and index_map.same_size(numel(value), rest):
            return strip(value)
        if index_map.same_map(mapping, whole) and value.target is aten.repeat.default:
            source, times = value.args
            lead = len(times) - len(shape_of(source))
            repeated = [dim for dim, count in enumerate(times) if count != 1]
            outer = shape_of(source)[: max(repeated[0] - lead, 0)] if repeated else ()
            alone = len(repeated) == 1 and all(size == 1 for size in outer)
            if alone and index_map.same_size(numel(source), rest):
                return strip(source)
    return None


# ---- after the second product -------------------------------------------------------------------------------------


class _After:
    """The way down from the second product: its bias, the matrix that multiplies its results, and their sum."""

    bias: fx.Node | None = None
    matrix: fx.Node | None = None
    dtype: torch.dtype  # in which results are multiplied with it
    total: fx.Node

    def __init__(self, second: fx.Node, sizes: Mapping[str, Size], inside: list[fx.Node]) -> None:
        self.second, self.sizes, self.order = second, sizes, order_of("ETH", sizes)
        node = second
        while True:
            reader = only_reader(node)
            if not any(_is(operand, node) for operand in reader.all_input_nodes):
                raise Unlike(reader, f"{reader.name} reads only some of {node.name}, or some twice")
            if self._is_total(reader, node):
                self.total = reader
                return
            if not self._is_step(reader, node):
                raise Unlike(
                    reader,
                    f"{called(reader)} reads the results of all experts for all tokens, where the product with a "
                    "weight of each, or their sum, is expected",
                )
            inside.append(reader)
            node = reader

    def _is_step(self, reader: fx.Node, node: fx.Node) -> bool:
        if reader.target is CAST:
            return dtype_of(reader) is torch.float32  # nothing is lost
        if reader.target is aten.permute.default:
            order = order_after(reader, self.order, self.sizes)
            self.order = order or self.order
            return order is not None
        if reader.target is aten.add.Tensor and self.bias is None and self.matrix is None:
            added = first_products.with_bias_of_all(reader)
            self.bias = added[1] if added is not None and added[0] is self.second else None
            return self.bias is not None and dtype_of(reader) is dtype_of(self.second)
        if reader.target is aten.mul.Tensor and self.matrix is None:
            others = [operand for operand in reader.args if not _is(operand, node)]
            if len(others) == 1 and is_tensor(others[0]):
                self.matrix = factor_of(others[0], reader, self.order, self.sizes)
                self.dtype = dtype_of(reader)
            return self.matrix is not None
        return False

    def _is_total(self, reader: fx.Node, node: fx.Node) -> bool:
        """sum over E of rows, or weights [T, 1, E] @ rows [T, E, H], or rows [T, H, E] @ weights [T, E, 1]."""
        experts, num_tokens, hidden_size = (self.sizes[name] for name in "ETH")
        if reader.target is aten.sum.dim_IntList:
            shape, (dims, *keeps) = shape_of(reader.args[0]), reader.args[1:]
            if dims is None or len(dims) != 1:
                return False
            dim = dims[0] % len(shape)
            around = [index_map.product(part) for part in (shape[:dim], shape[dim + 1 :])]
            places = {"ETH": [1, num_tokens * hidden_size], "TEH": [num_tokens, hidden_size]}
            return (
                any(
                    self.order == order_of(names, self.sizes)
                    and all(map(index_map.same_size, around, sides))
                    for names, sides in places.items()
                )
                and not any(keeps)
                and dtype_of(reader) in (torch.float32, dtype_of(self.second))
            )
        if reader.target is not aten.bmm.default or self.matrix is not None:
            return False
        position = 0 if _is(reader.args[0], node) else 1
        rows, weights = reader.args[position], reader.args[1 - position]
        order, shapes = (
            ("THE", ((num_tokens, hidden_size, experts), (num_tokens, experts, 1))),
            ("TEH", ((num_tokens, experts, hidden_size), (num_tokens, 1, experts))),
        )[position]
        fits = all(
            len(shape_of(operand)) == 3 and all(map(index_map.same_size, shape_of(operand), shape))
            for operand, shape in zip((rows, weights), shapes, strict=True)
        )
        whole = index_map.same_size(numel(strip(weights)), num_tokens * experts)
        if fits and whole and self.order == order_of(order, self.sizes) and _is(rows, node):
            # these products are not rounded to 16 bits
            self.matrix, self.dtype = strip(weights), torch.float32
        return self.matrix is not None


def _is(operand: Any, node: fx.Node) -> bool:
    return is_tensor(operand) and strip(operand) is strip(node)
