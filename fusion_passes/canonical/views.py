"""Views that do nothing go, and a view of a view is one view.

    view(view(q, [B, S, G, 128]), [B, S, K])  ->  q        where q already is [B, S, K]
    alias(x), slice(x, 0, 0, size of x)       ->  x
    permute(permute(x, [1, 0]), [1, 0])       ->  x
    _assert_tensor_metadata(x, dtype of x)    ->  nothing

So do casts of a kernel's results, there and back (`casts.py`), and clamps by infinity (`clamps.py`). A rewrite returns
each output in the shape that the user's graph had in that place; between two fused ops the views then cancel, so that
the scales reach the GEMM in the layout in which they were made.
"""

from __future__ import annotations

import torch
from torch import fx

from fusion_passes import index_map
from fusion_passes.canonical import casts, clamps
from fusion_passes.operations import shape_of

aten = torch.ops.aten
_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
}


def remove_needless(graph: fx.Graph) -> int:
    """Returns how many nodes were bypassed or erased. The graph's outputs keep their own views (perhaps aliases)."""
    removed = 0
    for node in graph.nodes:
        if _is_known(node):
            graph.erase_node(node)
            removed += 1
            continue
        if (source := _permuted_back(node)) is not None and not _is_returned(node):
            node.replace_all_uses_with(source)
            removed += 1
            continue
        if bypassed := clamps.bypass(node):
            removed += bypassed
            continue
        if (source := casts.undone(node)) is not None:
            node.replace_all_uses_with(source)
            removed += 1
            continue
        if node.op != "call_function" or not node.users or not _is_view(node):
            continue
        source = node.args[0]
        while _is_view(source):
            source = source.args[0]
        if _equal_shapes(source, node) and not _is_returned(node):
            node.replace_all_uses_with(source)
            removed += 1
        elif source is not node.args[0] and node.target in (
            aten.view.default,
            aten.reshape.default,
        ):
            node.replace_input_with(node.args[0], source)
            removed += 1
    return removed


def _is_known(node: fx.Node) -> bool:
    """Whether a node asserts of a value the dtype and the device that the graph says it has, as exported graphs do."""
    if node.target is not torch.ops.aten._assert_tensor_metadata.default:
        return False
    given = dict(zip(("a", "size", "stride", "dtype"), node.args)) | node.kwargs
    value = given.pop("a").meta.get("val")
    known = {"dtype": getattr(value, "dtype", None), "device": getattr(value, "device", None)}
    known["layout"] = torch.strided
    return all(wanted is None or known.get(name) == wanted for name, wanted in given.items())


def _is_returned(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _permuted_back(node: fx.Node) -> fx.Node | None:
    """x, where a node is the transpose of the transpose of x."""
    if node.target is not aten.permute.default or node.args[0].target is not aten.permute.default:
        return None
    inner, outer = node.args[0].args[1], node.args[1]
    rank = len(inner)
    back = [inner[dim % rank] % rank for dim in outer]
    return node.args[0].args[0] if back == list(range(rank)) else None


def _is_view(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
        return False
    if node.target in _VIEWS or node.target is aten.alias.default:
        return True
    return node.target is aten.slice.Tensor and _equal_shapes(node.args[0], node)


def _equal_shapes(a: fx.Node, b: fx.Node) -> bool:
    first, second = shape_of(a), shape_of(b)
    return len(first) == len(second) and all(
        index_map.same_size(x, y) for x, y in zip(first, second, strict=True)
    )
