"""The whole of a mixture of experts, walked out from the second of its two products.

    hidden[token of each pair]  ->  product  (+ bias)  ->  activation  ->  product  (+ bias)
        ->  times the top-k weight of each pair  ->  back to the order of pairs  ->  [T, K, H] summed over K

The rows may come by pair or sorted by expert, and whatever is done to each row alone may come before or after they are
put back. Rows of experts that are elsewhere may be set to 0 anywhere: their pairs add nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fusion_passes import index_map, verify
from fusion_passes.experts import combining, first_products
from fusion_passes.experts.activations import activation_of
from fusion_passes.experts.products import (
    Product,
    Quantized,
    before_quantization,
    is_expert_product,
    product_at,
)
from fusion_passes.experts.reading import (
    CAST,
    Unlike,
    aten,
    called,
    dtype_of,
    gathered,
    masked,
    numel,
    only_reader,
    shaped,
    strip,
)
from fusion_passes.experts.routing import Index, Routing, experts_of_router
from fusion_passes.experts.spread import Spread
from fusion_passes.fusion import Fusion
from fusion_passes.index_map import Size
from fusion_passes.operations import module_path, read
from fusion_passes.places import Place
from fusion_passes.reporting import NearMiss


@dataclass
class Block:
    """What the walk found. ``activation``: the keyword arguments of the op that say what it is."""

    routing: Routing
    first: Product
    up: Product | None  # where ``first`` is gate alone
    second: Product
    activation: dict[str, Any]
    inside: list[fx.Node]
    gate_up_bias: fx.Node | None = None
    before: first_products.Weighted | None = None
    hidden_states: fx.Node | None = None
    down_bias: fx.Node | None = None
    topk_weights: fx.Node | None = None  # or, where all tokens go through all experts:
    spread: Spread | None = None
    weights_dtype: torch.dtype | None = None  # in which they are multiplied, once they are found
    quantization: Quantized | None = None
    output: fx.Node | None = None
    sizes: dict[str, Size] = field(default_factory=dict)


def find(fusion: Fusion, graph: fx.Graph) -> Iterable[Place | NearMiss]:
    """Every block of a graph, and for each product that belongs to none the reason."""
    products: dict[fx.Node, Product] = {}
    missed: list[NearMiss] = []

    def miss(node: fx.Node, why: Unlike) -> None:
        missed.append(NearMiss(fusion.name, module_path(node), why.node.name, why.reason))

    for node in graph.nodes:
        if is_expert_product(node) and node.users:
            try:
                products[node] = product_at(node)
            except Unlike as why:
                miss(node, why)
    by_ids: dict[fx.Node, list[Product]] = {}
    ups = first_products.ups(graph, products)
    for product in products.values():
        if product.node not in ups:
            by_ids.setdefault(product.routing.ids, []).append(product)
    for ids, group in by_ids.items():
        if len(group) % 2:
            names = ", ".join(product.node.name for product in group)
            odd = (
                f"of the products of experts only {names} go by the top-k ids {ids.name}, not in pairs: experts are "
                "fused that are two each, of which the second gives each pair of a token and an expert a row of its own"
            )
            miss(group[-1].node, Unlike(ids, odd))
            continue
        for second in group[1::2]:
            try:
                yield place(fusion, graph, _block(second, products))
            except Unlike as why:
                miss(second.node, why)
    yield from dict.fromkeys(missed)  # each product of a block may miss for one and the same reason


def _hidden_states(block: Block) -> fx.Node:
    """What the rows of the first product are, each token's once for each of its experts."""
    product, sizes = block.first, block.sizes
    rows = first_products.unmasked(product.rows, product, block.inside)
    if block.before is not None:
        rows = block.before.rows
    if product.by_token:
        whole = index_map.same_size(numel(rows), sizes["num_tokens"] * sizes["hidden_size"])
        if whole and index_map.same_size(product.by_token, sizes["top_k"]):
            return rows
    taken, by_slot = gathered(rows), product.sorted
    one = index_map.same_size(sizes["top_k"], 1)
    by = None if taken is None or one else product.routing.read(taken[1])
    if taken is not None and by == Index("pair", True):  # each token's row repeated, then sorted
        rows, by_slot = strip(taken[0]), False
        taken = gathered(rows)
    if taken is not None:
        index = product.routing.read(taken[1])
        if one and index == Index("pair", by_slot):  # with one expert a token, pairs are tokens
            index = Index("token", by_slot, 1)
        found = shaped(taken[0], sizes["num_tokens"], sizes["hidden_size"])
        if index is not None and (index.what, index.sorted) == ("token", by_slot):
            if not index_map.same_size(index.top_k, sizes["top_k"]):
                raise Unlike(
                    rows, f"{rows.name} has {index.top_k} rows a token, {sizes['top_k']} are summed"
                )
            if found is not None:
                return found
    elif not by_slot:
        repeated = (
            (sizes["num_tokens"], True),
            (sizes["top_k"], False),
            (sizes["hidden_size"], True),
        )
        wanted = index_map.collapse(repeated)
        for node, mapping in read(rows, None):
            whole = index_map.same_size(numel(node), sizes["num_tokens"] * sizes["hidden_size"])
            if whole and index_map.same_map(wanted, mapping):
                return node
    raise Unlike(
        rows,
        f"{called(rows)}, which {product.node.name} multiplies, is not the hidden states of each pair's token",
    )


def _block(second: Product, products: Mapping[fx.Node, Product]) -> Block:
    routing, inside = second.routing, [second.node]
    rows = first_products.unmasked(second.rows, second, inside)
    quantized = before_quantization(rows)
    between = rows
    if quantized is not None:
        between = strip(quantized.values)
        inside += quantized.inside
    inside += [rows, between]
    activation = activation_of(between, inside)
    first, up, gate_up_bias = first_products.read_by(activation, second, products, inside)
    block = Block(routing, first, up, second, activation.words, inside, gate_up_bias)
    block.before = first_products.weighted_before(block.first, block.inside)
    _finish(block)
    block.hidden_states = _hidden_states(block)
    _quantized(block, quantized)
    return block


# ---- after the second product: see `combining` --------------------------------------------------------------------


def _finish(block: Block) -> None:
    """Walk down from the second product to the sum over the experts of a token."""
    node, by_slot, dtype = block.second.node, block.second.sorted, dtype_of(block.second.node)
    total: combining.Total | None = None
    while total is None:
        reader = only_reader(node)
        if not any(strip(operand) is strip(node) for operand in reader.all_input_nodes):
            raise Unlike(reader, f"{reader.name} reads only some of {node.name}, or some twice")
        taken, zeroed = gathered(reader), masked(reader)
        added = first_products.with_bias(reader, block.second, by_slot)
        if zeroed is not None and block.routing.is_beyond(zeroed[1], by_slot):
            pass
        elif block.topk_weights is None and added is not None and dtype_of(reader) is dtype:
            if block.down_bias is not None:
                raise Unlike(reader, f"{reader.name} adds a second bias")
            block.down_bias = added[1]
        elif taken is not None and strip(taken[0]) is strip(node):
            if not by_slot or block.routing.read(taken[1]) != Index("slot", False):
                raise Unlike(reader, f"{reader.name} does not put the rows back in order")
            by_slot = False
        elif by_slot and combining.is_put_back(reader, node, block.second):
            by_slot = False
        elif reader.target is aten.mul.Tensor and block.topk_weights is None:
            weights = combining.weights(reader, node, block.second, by_slot)
            block.topk_weights, block.weights_dtype = weights
        elif reader.target is CAST and (dtype_of(node), dtype_of(reader)) == (dtype, torch.float32):
            pass  # nothing is lost
        elif (sum_ := combining.total_at(reader, node, block.second, by_slot)) is not None:
            applied = [sum_.weights, block.topk_weights, block.before]
            if len(applied) - applied.count(None) != 1:
                if any(weights is not None for weights in applied):
                    why = f"{reader.name} sums rows that more than one top-k weight was applied to"
                else:
                    why = f"{reader.name} sums rows that no top-k weight was applied to"
                raise Unlike(reader, why)
            if sum_.weights is not None:
                # these products are not rounded to 16 bits
                block.topk_weights, block.weights_dtype = sum_.weights, torch.float32
            total = sum_
            block.inside += sum_.inside
        elif reader.target is CAST and block.topk_weights is not None:
            raise Unlike(
                reader,
                f"{called(reader)} rounds each weighted row to {dtype_of(reader)}: a sum over them is rounded once",
            )
        else:
            raise Unlike(
                reader,
                f"{called(reader)} reads the experts' results, where the product with the top-k weights, "
                "the order of pairs or their sum is expected",
            )
        node = reader
        applied = [block.topk_weights, block.before]
        weighted = total is None and applied.count(None) == 1 and not by_slot
        if weighted and combining.is_one_each(node, block.second):
            pairs = numel(block.routing.ids)
            total = combining.Total(node, pairs, 1, block.second.weight.shape[1])
        if total is None:
            block.inside.append(node)
    measure(block, total)
    # a sum in float32 is rounded once, by the cast that follows
    block.output = total.node
    if block.before is not None:
        block.topk_weights, block.weights_dtype = block.before.weights, block.before.dtype
    if dtype_of(total.node) is not dtype:
        block.output = cast_to(total.node, dtype)
        block.inside.append(total.node)


def measure(block: Block, total: combining.Total) -> None:
    """The sizes of the whole, and whether the weights are of these sizes."""
    experts, features, width = block.first.weight.shape
    if block.up is not None:
        features *= 2
    hidden_size = total.hidden_size
    block.sizes = {
        "num_tokens": total.num_tokens,
        "top_k": total.top_k,
        "num_experts": experts,
        "hidden_size": hidden_size,
        "up_features": features,
        "intermediate_size": block.second.weight.shape[2],
    }
    gated = 1 if block.activation["activation"] == "relu2" else 2
    expected = (experts, hidden_size, features // gated)
    if (experts, features, width) != (experts, gated * expected[2], hidden_size) or (
        block.second.weight.shape != expected
    ):
        raise Unlike(
            total.node,
            f"the experts' weights are {block.first.weight.shape} and {block.second.weight.shape}: "
            f"they do not lead from {hidden_size} channels back to as many",
        )


def cast_to(total: fx.Node, dtype: torch.dtype) -> fx.Node:
    reader = only_reader(total)
    if reader.target is not CAST or dtype_of(reader) is not dtype:
        raise Unlike(
            total,
            f"{total.name}, the sum over the experts of a token, is {dtype_of(total)} and read by "
            f"{called(reader)}; a result in {dtype} is expected",
        )
    return reader


# ---- FP8 and the place --------------------------------------------------------------------------------------------


def _quantized(block: Block, between: Quantized | None) -> None:
    """Both products take FP8, or neither does."""
    weights = [product.weight for product in (block.first, block.second)]
    scaled = [weight.scale is not None for weight in weights]
    assert block.hidden_states is not None
    hidden = before_quantization(block.hidden_states)
    node = block.second.node
    if not any(scaled):
        if between is not None:
            raise Unlike(node, "the activation is quantized, but the weights are not")
        return
    if not all(scaled) or between is None or hidden is None:
        missing = "a weight" if not all(scaled) else "an activation"
        raise Unlike(node, f"{missing} of the experts is not quantized to FP8")
    if (between.min_amax, between.arithmetic) != (hidden.min_amax, hidden.arithmetic):
        raise Unlike(node, "what the two products read is not quantized in the same way")
    if hidden.arithmetic.arguments().keys() - {"scale_mode", "code_mode"}:
        raise Unlike(node, f"activations are quantized with {hidden.arithmetic}")
    block.hidden_states, block.quantization = hidden.values, hidden


def place(fusion: Fusion, graph: fx.Graph, block: Block) -> Place:
    assert block.output is not None
    first, second = block.first.weight, block.second.weight
    inputs = {
        "hidden_states": block.hidden_states,
        "gate_up": first.value,
        "up": None if block.up is None else block.up.weight.value,
        "down": second.value,
        "topk_weights": block.topk_weights,
        "topk_ids": block.routing.ids if block.spread is None else None,
        "scores": None if block.spread is None else block.spread.scores,
        "gate_up_bias": block.gate_up_bias,
        "down_bias": block.down_bias,
        "gate_up_scale": first.scale,
        "down_scale": second.scale,
    }
    firsts = 1 if block.up is None else 2
    weights = firsts * index_map.product(first.shape) + index_map.product(second.shape)
    tokens = block.sizes["num_tokens"]
    pairs = tokens * block.sizes["top_k"]
    copies = block.second.copies_weights
    sizes = block.sizes | {
        "multiplied_rows": pairs if block.spread is None else tokens * first.shape[0],
        # elements that are written and read again besides the rows
        "copied_weights": weights // first.shape[0] * pairs if copies else 0,
        "dequantized_weights": weights if first.scale is not None else 0,
    }
    words = [
        "dense" if block.spread is not None else "batched" if copies else "grouped",
        block.activation["activation"],
        *(["weights first"] if block.before is not None else []),
        *(["gate and up apart"] if block.up is not None else []),
        *(["interleaved"] if block.activation.get("interleaved") else []),
        *(["bias"] if block.gate_up_bias is not None or block.down_bias is not None else []),
        *(["transposed weights"] if first.transposed else []),
        *(["fp8_block"] if first.scale is not None else []),
    ]
    keywords = dict(block.activation)
    if block.quantization is not None:
        keywords |= {
            "min_amax": block.quantization.min_amax,
            **block.quantization.arithmetic.arguments(),
        }
    routed = experts_of_router(block.routing.ids)
    if isinstance(first.shape[0], int) and routed > first.shape[0]:
        keywords["routed_experts"] = routed
    return Place(
        fusion,
        graph,
        ", ".join(words),
        [block.output],
        list(dict.fromkeys(block.inside)),
        {name: node for name, node in inputs.items() if node is not None},
        sizes,
        limits={block.routing.ids: first.shape[0]},
        # FP8: what stands between the products is quantized again, and a code next to a tie falls to either side
        tolerance=None if block.quantization is None else 2 * verify.ACCUMULATED,
        constants={
            "keywords": keywords,
            "weights_dtype": block.weights_dtype,
            "before": block.before,
            "spread": block.spread,
            "transposed": {
                "gate_up": first.transposed,
                "up": first.transposed,
                "down": second.transposed,
            },
        },
    )
