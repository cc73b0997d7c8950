"""What stands before the activation of experts: the first product, of one weight or of gate and up, and its rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from fusion_passes import index_map
from fusion_passes.experts import combining
from fusion_passes.experts.activations import GATED, Between, behind
from fusion_passes.experts.products import Product
from fusion_passes.experts.reading import (
    CAST,
    Unlike,
    aten,
    called,
    dtype_of,
    gathered,
    masked,
    numel,
    strip,
)
from fusion_passes.experts.routing import Index
from fusion_passes.operations import is_tensor, read, shape_of, strides_of


@dataclass(frozen=True)
class Weighted:
    """``rows`` of the first product, before top-k weights (one of each pair, in the order of pairs) multiplied them.

    wide: that was in float32, and rounded.
    """

    rows: fx.Node
    weights: fx.Node
    dtype: torch.dtype
    wide: bool


def ups(graph: fx.Graph, products: Mapping[fx.Node, Product]) -> set[fx.Node]:
    """The products that other products are multiplied with, gates or what no activation takes for one."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target in GATED or node.target is aten.mul.Tensor:
            behind = {
                product_behind(operand, products): None
                for operand in node.args[:2]
                if is_tensor(operand)
            }
            pair = [product for product in behind if product is not None]
            if len(pair) == 2 and not seen.issuperset(pair):
                found.add(pair[1])
                seen.update(pair)
    return found


def product_behind(node: fx.Node, products: Mapping[fx.Node, Product]) -> fx.Node | None:
    """The product that a value, or what it is a part of, comes of by pointwise operations alone."""
    return next((value for value in behind(node) if value in products), None)


def apart(
    gate: fx.Node,
    up: fx.Node,
    second: Product,
    products: Mapping[fx.Node, Product],
    inside: list[fx.Node],
) -> tuple[Product, Product]:
    """The products that gate and up are, each with a weight of its own."""
    for node in (gate, up):
        if product_behind(node, products) is None:
            raise Unlike(
                node,
                f"{called(strip(node))}, gate or up, is not a half of the product's channels, nor a product of its own",
            )
    (first, *biases), (other, bias) = (
        product_read(n, second, products, inside) for n in (gate, up)
    )
    if any(found is not None for found in (*biases, bias)):
        raise Unlike(
            other.node,
            f"{first.node.name} and {other.node.name}, gate and up, are products of their own with a bias: "
            "it is fused where one weight has both",
        )
    values = [unmasked(product.rows, product, inside) for product in (first, other)]
    if values[0] is not values[1] or first.by_token != other.by_token:
        raise Unlike(
            other.node,
            f"{first.node.name} and {other.node.name}, gate and up, multiply different rows",
        )
    weights = first.weight, other.weight
    if any(weight.scale is not None for weight in weights):
        raise Unlike(
            other.node,
            f"{first.node.name} and {other.node.name}, gate and up, are products of their own of FP8 weights: "
            "these are fused where one weight has both",
        )
    kinds = [(w.transposed, shape_of(w.value), strides_of(w.value)) for w in weights]
    if kinds[0] != kinds[1]:
        raise Unlike(
            other.node,
            f"the weights of gate and up, {weights[0].value.name} and {weights[1].value.name}, differ in their sizes "
            "or in how they lie in memory",
        )
    return first, other


def unmasked(node: fx.Node, product: Product, inside: list[fx.Node]) -> fx.Node:
    """A value with a row as each of a product, before the rows of experts that are elsewhere were set to 0."""
    node = strip(node)
    while (taken := masked(node)) is not None and product.routing.is_beyond(
        taken[1], product.sorted
    ):
        inside.append(node)
        node = strip(taken[0])
    return node


def read_by(
    activation: Between,
    second: Product,
    products: Mapping[fx.Node, Product],
    inside: list[fx.Node],
) -> tuple[Product, Product | None, fx.Node | None]:
    """The product that an activation reads, that of up where it has one of its own, and the bias."""
    if activation.up is not None:
        return *apart(activation.source, activation.up, second, products, inside), None
    first, bias = product_read(activation.source, second, products, inside)
    width = first.weight.shape[1]
    if not index_map.same_size(activation.channels or width, width):
        raise Unlike(
            activation.source,
            f"{called(strip(activation.source))} is not halved in all channels of {first.node.name}",
        )
    return first, None, bias


def product_read(
    source: fx.Node, second: Product, products: Mapping[fx.Node, Product], inside: list[fx.Node]
) -> tuple[Product, fx.Node | None]:
    """The product that the activation reads, and the bias added to it."""
    node = unmasked(source, second, inside)
    bias = None
    if node not in products and (added := with_bias(node, second, second.sorted)) is not None:
        inside.append(node)
        node, bias = unmasked(added[0], second, inside), added[1]
    first = products.get(node)
    if first is None:
        raise Unlike(node, f"the activation reads {called(node)}, where a product is expected")
    if first.routing != second.routing or first.sorted != second.sorted:
        raise Unlike(node, f"{node.name} and {second.node.name} go by different top-k ids")
    inside.append(node)
    return first, bias


def with_bias(node: fx.Node, product: Product, by_slot: bool) -> tuple[fx.Node, fx.Node] | None:
    """(value, bias [E, out]) where a node is the value plus the bias of each row's expert."""
    if product.of_all:
        return with_bias_of_all(node)
    if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return None
    for value, other in (node.args, node.args[::-1]):
        taken = gathered(other) if is_tensor(value) and is_tensor(other) else None
        if taken is not None and len(shape_of(taken[0])) == 2:
            sizes = [numel(operand) for operand in (value, other)]
            if not all(index_map.same_size(size, numel(node)) for size in sizes):
                continue  # one of them is repeated
            experts = index_map.same_size(shape_of(taken[0])[0], product.weight.shape[0])
            if experts and product.routing.read(taken[1]) == Index("expert", by_slot):
                return value, taken[0]
    return None


def with_bias_of_all(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(product, bias [E, F]) where a node is a product [E, T, F] plus the bias of each expert."""
    if node.target is not aten.add.Tensor or node.kwargs or not all(map(is_tensor, node.args)):
        return None
    for value, other in (node.args, node.args[::-1]):
        source = strip(value)
        if source.target is not aten.bmm.default:
            continue
        experts, num_tokens, features = shape_of(source)
        wanted = index_map.collapse([(experts, True), (num_tokens, False), (features, True)])
        for bias, mapping in read(other, shape_of(node)):
            sizes = (*shape_of(bias), numel(node))
            expected = (experts, features, numel(source))
            fits = len(sizes) == 3 and all(map(index_map.same_size, sizes, expected))
            if fits and index_map.same_map(mapping, wanted):
                return source, bias
    return None


def weighted_before(product: Product, inside: list[fx.Node]) -> Weighted | None:
    """How the rows of the first product were multiplied by the top-k weights, if they were."""
    scaled = unmasked(product.rows, product, [])
    walked, wide = [scaled], False
    if scaled.target is CAST and dtype_of(strip(scaled.args[0])) is torch.float32:
        scaled, wide = strip(scaled.args[0]), True
        walked.append(scaled)
    if product.by_token or scaled.target is not aten.mul.Tensor:
        return None
    for operand in filter(is_tensor, scaled.args):
        node = strip(operand)
        if not index_map.same_size(numel(node), numel(scaled)):
            continue
        try:
            weights, dtype = combining.weights(scaled, node, product, product.sorted)
        except Unlike:
            continue
        if wide:
            if node.target is not CAST or dtype_of(node.args[0]) is not dtype_of(product.node):
                continue
            walked.append(node)
            node = strip(node.args[0])
        inside += walked
        return Weighted(node, weights, dtype, wide)
    return None
