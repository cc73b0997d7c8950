"""Why mixtures of experts stay as they are that are written in a way of their own."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from fusion_passes import index_map
from fusion_passes.experts import routers
from fusion_passes.experts.activations import behind
from fusion_passes.experts.reading import CAST, aten, called, strip
from fusion_passes.fusion import Fusion
from fusion_passes.operations import describe, module_path, readers, shape_of
from fusion_passes.reporting import NearMiss

_COMPARES = {getattr(aten, name).Scalar for name in ("eq", "ne", "ge", "gt", "le", "lt")} | {
    getattr(aten, name).Tensor for name in ("eq", "ne", "ge", "gt", "le", "lt")
}
_LOOP = ", as a loop over experts asks for its tokens, where the graph breaks, or every expert takes them all"


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
            f"no product goes by the experts that {called(router)} chooses; {ids.name}, their ids, are read by {read}"
            + (_LOOP if found and all(reader.target in _COMPARES for reader in found) else "")
            + ". "
            "Experts are fused that are grouped products, or products with a matrix gathered for each token",
        )


def is_dense(node: fx.Node) -> bool:
    """Whether a node is the second product of experts that all have the same number of rows."""
    if not multiplies_a_weight(node):
        return False
    experts = shape_of(node)[0]
    for value in behind(node.args[0]):
        operation = describe(value)
        if operation is not None and operation.kind == "reduction":
            return False  # as a softmax has them: attention over keys and values that are given
        if multiplies_a_weight(value) and index_map.same_size(shape_of(value)[0], experts):
            return True
    return False


def multiplies_a_weight(node: fx.Node) -> bool:
    """Whether a node is a product of as many matrices, the second of them given to the graph."""
    if node.target is not aten.bmm.default:
        return False
    weight = strip(node.args[1])
    while weight.target in (CAST, aten.permute.default):
        weight = strip(weight.args[0])
    return weight.op == "placeholder"
