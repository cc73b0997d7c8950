"""Linears that read one activation shrink it in one kernel: q, k and v, gate and up.

    lora_add(x, q, [a_q], [b_q], ...), lora_add(x, k, [a_k], [b_k], ...)

    ->   y = lora_shrink(x, [a_q, a_k], ...); lora_expand(y[0:1], [b_q], q, ...), lora_expand(y[1:2], [b_k], k, ...)

These are the adapters of :class:`fusion_passes.lora.AdapterManager` over linears that are no plain ones (block-FP8).
Where an adapter has another rank in each of them, the shrink has the largest: what that adds to the others is left from
an adapter before, and `lora_expand` does not read it. A plain linear and its adapters are one op already:

    lora_linear(x, w_q, None, [a_q], [b_q], ...), lora_linear(x, w_k, None, [a_k], [b_k], ...)

    ->   lora_linears(x, [w_q, w_k], [None, None], [a_q, a_k], [b_q, b_k], ...)

    lora_linear_single(x, w_q, None, a_q, b_q, s), lora_linear_single(x, w_k, None, a_k, b_k, s)

    ->   lora_linears_single(x, [w_q, w_k], [None, None], [a_q, a_k], [b_q, b_k], [s, s])

These are what `lora_linear` makes of PEFT's layers, where their adapters have one rank and one dtype. Over linears
that are no plain ones:

    lora_add_single(x, q, a_q, b_q, s), lora_add_single(x, k, a_k, b_k, s)

    ->   y = lora_shrink_single(x, [a_q, a_k]); lora_expand_single(y[0], q, b_q, s), lora_expand_single(y[1], k, b_k, s)
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

import custom_ops
from fusion_passes import index_map, torch_internals
from fusion_passes.fusion import Fusion
from fusion_passes.operations import module_path, shape_of
from fusion_passes.reporting import Site

aten = torch.ops.aten


def _transform(graph: fx.Graph) -> Iterator[Site]:
    yield from _batches(graph)
    yield from _linears(graph)
    yield from _singles(graph)
    yield from _added_singles(graph)


def _batches(graph: fx.Graph) -> Iterator[Site]:
    groups: dict[Any, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=custom_ops.ops()["lora_add"].overload):
        x, _, a, _, _, _, *batch = node.args
        groups.setdefault((x, shape_of(a[0])[:2], *batch), []).append(node)
    for nodes in groups.values():
        # what is made after the first of them cannot be read there; slots are inputs of the graph, and come before
        together = [n for n in nodes if all(slot < nodes[0] for slot in (*n.args[2], n.args[5]))]
        if len(together) > 1:
            yield from _merge(graph, together)


def _merge(graph: fx.Graph, nodes: list[fx.Node]) -> Iterator[Site]:
    shrink, expand = (custom_ops.ops()[name].overload for name in ("lora_shrink", "lora_expand"))
    x, batch = nodes[0].args[0], nodes[0].args[6:]
    slices = [a for node in nodes for a in node.args[2]]
    with torch_internals.fake_mode_of(graph):
        with graph.inserting_before(nodes[0]):
            ranks = functools.reduce(
                lambda a, b: a if a is b else _call(nodes[0], aten.maximum.default, a, b),
                [node.args[5] for node in nodes],
            )
            y = _call(nodes[0], shrink, x, slices, ranks, *batch)
        start = 0
        for node in nodes:
            _, base, a, b, scaling, ranks, *_ = node.args
            with graph.inserting_before(node):
                part = _call(node, aten.slice.Tensor, y, 0, start, start + len(a))
                node.replace_all_uses_with(
                    _call(node, expand, part, b, base, scaling, ranks, *batch)
                )
            start += len(a)
            graph.erase_node(node)
    yield from _sites(graph, x, nodes)


def _linears(graph: fx.Graph) -> Iterator[Site]:
    groups: dict[Any, list[fx.Node]] = {}
    target = custom_ops.ops()["lora_linear"].overload
    for node in graph.find_nodes(op="call_function", target=target):
        x, _, _, a, _, _, _, *batch = node.args
        if len(a) == 1:  # several slices share a shrink already
            groups.setdefault((x, shape_of(a[0])[:2], *batch), []).append(node)
    for (x, _, *batch), nodes in groups.items():
        together = [n for n in nodes if all(each < nodes[0] for each in n.all_input_nodes)]
        if len(together) < 2:
            continue
        # weights, biases, a, b, scalings, ranks; a and b come as lists of their one slice
        layers = [
            [value[0] if index in (2, 3) else value for value in each]
            for index, each in enumerate(zip(*(node.args[1:7] for node in together), strict=True))
        ]
        _replace_by_one(graph, together, "lora_linears", x, *layers, *batch)
        yield from _sites(graph, x, together)


def _singles(graph: fx.Graph) -> Iterator[Site]:
    groups: dict[Any, list[fx.Node]] = {}
    # a scaling that is a tensor belongs to another overload, and stays
    target = custom_ops.ops()["lora_linear_single"].overload
    for node in graph.find_nodes(op="call_function", target=target):
        x, _, _, a, _, _ = node.args
        groups.setdefault((x, shape_of(a)[0], a.meta["val"].dtype), []).append(node)
    for nodes in groups.values():
        together = [n for n in nodes if all(each < nodes[0] for each in n.all_input_nodes)]
        if len(together) > 1:
            yield from _merge_singles(graph, together)


def _merge_singles(graph: fx.Graph, nodes: list[fx.Node]) -> Iterator[Site]:
    x = nodes[0].args[0]
    layers = [list(each) for each in zip(*(node.args[1:] for node in nodes), strict=True)]
    _replace_by_one(graph, nodes, "lora_linears_single", x, *layers)
    yield from _sites(graph, x, nodes)


def _replace_by_one(graph: fx.Graph, nodes: list[fx.Node], op: str, *args: Any) -> None:
    """Nodes by one call of an op that returns as many tensors."""
    with torch_internals.fake_mode_of(graph), graph.inserting_before(nodes[0]):
        merged = _call(nodes[0], custom_ops.ops()[op].overload, *args)
        outputs = [_call(n, operator.getitem, merged, at) for at, n in enumerate(nodes)]
    for node, output in zip(nodes, outputs, strict=True):
        node.replace_all_uses_with(output)
        graph.erase_node(node)


def _added_singles(graph: fx.Graph) -> Iterator[Site]:
    groups: dict[Any, list[fx.Node]] = {}
    target = custom_ops.ops()["lora_add_single"].overload
    for node in graph.find_nodes(op="call_function", target=target):
        x, _, a, _, _ = node.args
        groups.setdefault((x, shape_of(a)[0], a.meta["val"].dtype), []).append(node)
    for nodes in groups.values():
        # the bases may be made later: only the shrink moves up to where the first of them is
        together = [node for node in nodes if node.args[2] < nodes[0]]
        if len(together) > 1:
            yield from _merge_added_singles(graph, together)


def _merge_added_singles(graph: fx.Graph, nodes: list[fx.Node]) -> Iterator[Site]:
    shrink, expand = (
        custom_ops.ops()[name].overload for name in ("lora_shrink_single", "lora_expand_single")
    )
    x = nodes[0].args[0]
    with torch_internals.fake_mode_of(graph):
        with graph.inserting_before(nodes[0]):
            y = _call(nodes[0], shrink, x, [node.args[2] for node in nodes])
        for index, node in enumerate(nodes):
            _, base, _, b, scaling = node.args
            with graph.inserting_before(node):
                part = _call(node, aten.select.int, y, 0, index)
                node.replace_all_uses_with(_call(node, expand, part, base, b, scaling))
            graph.erase_node(node)
    yield from _sites(graph, x, nodes)


def _sites(graph: fx.Graph, x: fx.Node, nodes: list[fx.Node]) -> Iterator[Site]:
    saved = 2 * index_map.product(shape_of(x))  # the 16-bit activation is read once less
    for node in nodes[1:]:
        yield Site(
            "shared_lora_shrink",
            module_path(node),
            bytes_saved=str(saved),
            bytes_saved_here=torch_internals.size_hint(saved, graph),
        )


def _call(like: fx.Node, target: Any, *args: Any) -> fx.Node:
    node = like.graph.call_function(target, args)
    node.meta = {**like.meta, "val": target(*fx.node.map_arg(args, lambda n: n.meta["val"]))}
    return node


FUSION = Fusion(
    name="shared_lora_shrink",
    summary="the adapters of linears that read one activation shrink it in one kernel",
    stage=1,
    priority=-1,
    transform=_transform,
)
