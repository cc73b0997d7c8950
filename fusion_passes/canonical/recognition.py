"""Norms, activations and quantizations become one node each, whichever way they are spelt.

    float, pow, mean, add, rsqrt, mul, cast, mul      ->  rms_norm(x, weight, eps, "rounded")
    float, abs, amax, clamp, div, div, clamp, cast    ->  group_quant(x, group_size, min_amax, arithmetic)

The same is done to patterns, so a fusion of two of them states its meaning once and meets one spelling. Every
spelling keeps its own roundings: two that round differently are different meanings (``weight_mode``), and one
that is no known meaning stays as it is. What no fusion took in the end goes back to the very nodes it was.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from fusion_passes import torch_internals
from fusion_passes.canonical.meanings import MEANINGS, SHORT_CUTS
from fusion_passes.compiled_pattern import compile_pattern
from fusion_passes.fusion import Fusion
from fusion_passes.matching import Match, candidates, find
from fusion_passes.near_miss import gives_away
from fusion_passes.operations import escapes, is_tensor, shape_of
from fusion_passes.rewriting import NotRewritten, Rewrite

aten = torch.ops.aten


@dataclass
class Recognized:
    """A meaning that stands in the graph for the nodes in ``spelling``, whose inputs are those of ``node``."""

    node: fx.Node
    results: list[fx.Node]
    spelling: fx.Graph
    inputs: list[fx.Node]  # for each argument of node that is a node, its placeholder in spelling

    def restore(self, graph: fx.Graph) -> None:
        if not self.node.users:  # erased: a fusion took it
            return
        # by argument: two inputs may have become one node since
        arguments = [argument for argument in self.node.args if isinstance(argument, fx.Node)]
        values = dict(zip(self.inputs, arguments, strict=True))
        with graph.inserting_before(self.node):
            for (
                node
            ) in self.spelling.nodes:  # what is not in it is a size that is an input of the graph
                if node.op == "call_function":
                    values[node] = graph.node_copy(node, lambda n: values.get(n, n))
        originals = [values[node] for node in self.spelling.output_node().args[0]]
        for index, (result, original) in enumerate(zip(self.results, originals, strict=True)):
            result.replace_all_uses_with(original)
            # a fusion may have read the value before it was brought to the shape of the user's graph
            raw = self.node if is_tensor(self.node) else _element(self.node, index)
            if raw is not None and raw is not result and set(raw.users) - {result}:
                raw.replace_all_uses_with(
                    self._reshaped(graph, original, raw),
                    lambda user, result=result: user is not result,
                )

    def _reshaped(self, graph: fx.Graph, original: fx.Node, raw: fx.Node) -> fx.Node:
        source = self.node.args[0]
        assert isinstance(source, fx.Node)
        shape: list[int | fx.Node] = []
        with graph.inserting_before(self.node):
            for dim, size in enumerate(
                shape_of(raw)
            ):  # its leading dimensions are those of the meaning's input
                shape.append(
                    size
                    if isinstance(size, int)
                    else graph.call_function(aten.sym_size.int, (source, dim))
                )
                if isinstance(node := shape[-1], fx.Node):
                    node.meta["val"] = source.meta["val"].shape[dim]
            view = graph.call_function(aten.view.default, (original, shape))
        view.meta["val"] = raw.meta["val"]
        return view


def recognize(
    graph: fx.Graph, check: Callable[[Match, list[fx.Node]], bool] | None = None
) -> list[Recognized]:
    """Put one node in the graph for each meaning. ``check`` says whether to, once both sides exist."""
    found = []
    for meaning in (*SHORT_CUTS, *MEANINGS):
        for root in _roots(graph, meaning):
            match = find(meaning, graph, root, canonical=False) if root.users else None
            if match is None or any(escapes(match.nodes.values(), match.outputs)):
                continue
            if not all(constraint.holds(match) for constraint in meaning.constraints):
                continue  # reported with the near misses
            rewrite = Rewrite(match, allow_reference=True)
            assert meaning.rewrite is not None
            try:
                emitted = meaning.rewrite(rewrite)
                results = [
                    rewrite.view(r, shape_of(o))
                    for r, o in zip(emitted, match.outputs, strict=True)
                ]
            except NotRewritten:
                rewrite.abandon()
                continue
            for result, output in zip(results, match.outputs, strict=True):
                result.meta["val"] = output.meta[
                    "val"
                ]  # the strides that the rest of the graph counts on
            node = next(n for n in rewrite.emitted if hasattr(n.target, "meaning_kind"))
            inputs = [argument for argument in node.args if isinstance(argument, fx.Node)]
            spelling = _copy_region(match.outputs, inputs)
            if spelling is None or (check is not None and not check(match, results)):
                rewrite.abandon()
                continue
            rewrite.commit(results)
            found.append(Recognized(node, results, *spelling))
        torch_internals.tidy(graph)
    return found


def _roots(graph: fx.Graph, meaning: Fusion) -> list[fx.Node]:
    """Where a meaning could end."""
    signs = [node for node in graph.nodes if gives_away(meaning, node)]
    if meaning.exclusive or not signs:  # no pattern is traced for a graph without any
        return signs
    compiled = [compile_pattern(pattern, canonical=False) for pattern in meaning.patterns]
    return sorted(dict.fromkeys(node for c in compiled for node in candidates(graph, c)))


def restore(graph: fx.Graph, recognized: list[Recognized]) -> None:
    """Undo every recognition that no fusion made use of."""
    for entry in reversed(recognized):
        entry.restore(graph)
    torch_internals.tidy(graph)


def _element(node: fx.Node, index: int) -> fx.Node | None:
    return next(
        (user for user in node.users if user.target is operator.getitem and user.args[1] == index),
        None,
    )


def _copy_region(
    outputs: list[fx.Node], inputs: list[fx.Node]
) -> tuple[fx.Graph, list[fx.Node]] | None:
    """The nodes between ``inputs`` and ``outputs`` as a graph of its own; None if they depend on anything else."""
    # what an input is a view of may be read beside it, in a shape of its own
    views = {n.args[0]: n for n in inputs if n.target in (aten.view.default, aten.reshape.default)}
    region: set[fx.Node] = set()
    reshaped: dict[fx.Node, list[int]] = {}
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in region or node in inputs or node in reshaped:
            continue
        if isinstance(node.meta.get("val"), torch.SymInt):
            continue  # a size stays where it is
        if node in views:
            sizes = [size if isinstance(size, int) else -1 for size in shape_of(node)]
            if sizes.count(-1) > 1:
                return None
            reshaped[node] = sizes
            continue
        if node.op != "call_function":
            return None
        region.add(node)
        stack.extend(node.all_input_nodes)
    copy = fx.Graph()
    copied = {node: copy.placeholder(node.name) for node in dict.fromkeys(inputs)}
    placeholders = [copied[node] for node in inputs]
    for node, sizes in reshaped.items():
        copied[node] = copy.call_function(aten.view.default, (copied[views[node]], sizes))
        copied[node].meta = dict(node.meta)
    for node in sorted(region):
        copied[node] = copy.node_copy(node, lambda n: copied.get(n, n))
    copy.output(tuple(copied[node] for node in outputs))
    return copy, placeholders
