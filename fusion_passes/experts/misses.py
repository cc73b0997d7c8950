"""Why mixtures of experts stay as they are that are written in a way of their own."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from fusion_passes.experts import routers
from fusion_passes.experts.activations import GATED
from fusion_passes.experts.products import Product
from fusion_passes.experts.reading import Unlike, aten, called, strip
from fusion_passes.fusion import Fusion
from fusion_passes.operations import module_path, readers
from fusion_passes.reporting import NearMiss


def separate(group: Iterable[Product]) -> Unlike | None:
    """Why products of one routing stay where gate and up are two of them."""
    nodes = {product.node for product in group}
    for node in nodes:
        for reader in readers(node):
            pair = [strip(operand) for operand in reader.args[:2]] if reader.target in GATED else []
            if len(pair) == 2 and nodes >= set(pair) and pair[0] is not pair[1]:
                return Unlike(
                    reader,
                    f"gate and up are products of their own, {pair[0].name} and {pair[1].name}: experts are fused "
                    "where one weight has both, [num_experts, 2 * intermediate_size, hidden_size]",
                )
    return None


def unproductive(fusion: Fusion, graph: fx.Graph) -> Iterable[NearMiss]:
    """Routers of a graph without any product that goes by expert."""
    for router, ids in routers.chosen_anywhere(graph):
        found = list(dict.fromkeys(readers(ids)))
        if any(str(reader.target).startswith("custom_ops.") for reader in found):
            continue
        read = (
            ", ".join(map(called, found))
            or "nothing in this graph, which breaks before the experts"
        )
        yield NearMiss(
            fusion.name,
            module_path(router),
            ids.name,
            f"no product goes by the experts that {called(router)} chooses; {ids.name}, their ids, are read by {read}. "
            "Experts are fused that are grouped products, or products with a matrix gathered for each token",
        )


def is_dense(node: fx.Node) -> bool:
    """Whether a node is the second product of experts that all have the same number of rows."""
    if node.target is not aten.bmm.default or strip(node.args[1]).op != "placeholder":
        return False
    return strip(node.args[0]).target in GATED
