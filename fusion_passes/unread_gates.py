"""Gated activations in a spelling that no pattern has: too far from all of them for a near miss, and told all the same.

gate * sigmoid(gate) * up      in 16 bits, where the sigmoid is rounded by itself, as it is not in silu(gate)
gelu(gate) * up                by erf, which is another function than that by tanh
0.5 * gate * (1 + tanh(...)) * up    in 16 bits, where each step is rounded, or with other steps than torch's own
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from fusion_passes import index_map
from fusion_passes.experts.activations import behind
from fusion_passes.operations import describe, is_tensor, module_path, read, readers, shape_of
from fusion_passes.reporting import NearMiss

_NARROW = (torch.bfloat16, torch.float16)
_FUNCTIONS = ("aten.sigmoid.default", "aten.erf.default", "aten.tanh.default")
_OF_CUBES = 0.044715  # by which alone tanh makes a GELU


def find(graph: fx.Graph) -> Iterator[NearMiss]:
    """One near miss for each such activation that is left in a graph, times a value of its size."""
    for node in graph.nodes:
        operation = describe(node)
        if operation is None:
            continue
        if operation.name not in _FUNCTIONS:
            continue
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        narrow = node.meta["val"].dtype in _NARROW
        if operation.name == "aten.sigmoid.default" and narrow:
            gate = _source(operation.operands[0])
            activated = [to for to, by in _products(node) if _source(by) is gate]
            fusion, reason = (
                "silu_mul",
                f"{node.name} is rounded to {dtype} before it is multiplied by the gate; accepted: silu(gate), "
                "and gate * sigmoid(gate) in float32",
            )
        elif operation.name == "aten.erf.default":
            activated = [to for added in _sums(node) for to, _ in _products(added)]
            fusion, reason = "gelu_tanh_mul", f"{node.name} makes it GELU by erf; accepted: by tanh"
        elif operation.name == "aten.tanh.default" and _is_of_cubes(node):
            activated = [to for added in _sums(node) for to, _ in _products(added)]
            steps = f"is of steps rounded to {dtype} each" if narrow else "is of other steps"
            fusion, reason = (
                "gelu_tanh_mul",
                f"{node.name} {steps}; accepted: gelu(gate, approximate='tanh'), and in float32 "
                "0.5 * gate * (1 + tanh(0.79788 * (gate + 0.044715 * gate ** 3)))",
            )
        else:
            continue
        if any(_is_gated(product) for product in activated):
            yield NearMiss(fusion, module_path(node), node.name, reason)


def _products(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The products of a value with another tensor of its size, cast before or not, and that other one."""
    for reader in readers(node):
        operation = describe(reader)
        if operation is not None and operation.name == "cast":
            yield from _products(reader)
        elif operation is not None and operation.name == "mul":
            for other in filter(is_tensor, operation.operands):
                sizes = [index_map.product(shape_of(n)) for n in (_source(other), node)]
                if _source(other) is not _source(node) and index_map.same_size(*sizes):
                    yield reader, other


def _sums(node: fx.Node) -> Iterator[fx.Node]:
    """What is a value and something more, 1 in a GELU, cast before or not."""
    for reader in readers(node):
        operation = describe(reader)
        if operation is not None and operation.name == "cast":
            yield from _sums(reader)
        elif operation is not None and operation.name == "add":
            yield reader


def _is_of_cubes(tanh: fx.Node) -> bool:
    """Whether one of the pointwise operations before it multiplies by GELU's factor of cubes."""
    operations = map(describe, behind(tanh))
    return any(
        operation is not None and operation.name == "mul" and _OF_CUBES in operation.operands
        for operation in operations
    )


def _is_gated(activated: fx.Node) -> bool:
    """Whether it is multiplied to something in 16 bits, which all ops of gates return."""
    return any(product.meta["val"].dtype in _NARROW for product, _ in _products(activated))


def _source(node: fx.Node) -> fx.Node:
    return read(node, None)[-1][0]
