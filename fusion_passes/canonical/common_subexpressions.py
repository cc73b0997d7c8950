"""Equal computations become one node.

    q1 = quantize(x); k1 = mm(q1, wq)           q = quantize(x)
    q2 = quantize(x); k2 = mm(q2, wk)    ->     k1 = mm(q, wq); k2 = mm(q, wk)

Every linear of a quantized model quantizes the activation it is given, so q/k/v and gate/up repeat the same
dozen nodes; only after they are merged does a norm's output have the one user that a producer fusion needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fusion_passes.operations import shape_of

_VIEWS = {torch.ops.aten.view.default, torch.ops.aten.reshape.default}


def merge(
    graph: fx.Graph, only: Callable[[fx.Node], bool] = lambda node: True
) -> list[tuple[fx.Node, fx.Node]]:
    """Merge equal nodes (``only`` those); returns pairs of (merged away, survivor), the former erased."""
    seen: dict[Any, fx.Node] = {}
    merged = []
    for node in filter(only, list(graph.nodes)):
        if node.op not in ("call_function", "get_attr") or not _is_pure(node) or _is_returned(node):
            continue
        key = _key(node)
        survivor = seen.setdefault(key, node)
        if survivor is not node:
            node.replace_all_uses_with(survivor)
            graph.erase_node(node)
            merged.append((node, survivor))
    return merged


def _key(node: fx.Node) -> Any:
    if node.target in _VIEWS:  # the shape itself, of which -1 and a number are two spellings
        return node.args[0], shape_of(node)
    return node.op, node.target, _freeze(node.args), _freeze(node.kwargs)


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if hasattr(target, "meaning_kind"):
        return True
    if isinstance(target, torch._ops.OpOverload):
        impure = target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags
        # an allocation without contents may be written to later; a symbolic item() makes a new symbol each time
        return (
            not impure
            and target.namespace in ("aten", "prims", "custom_ops")
            and not _makes_something_new(target)
        )
    return node.op == "get_attr" or getattr(target, "__module__", "") in (
        "_operator",
        "operator",
        "math",
    )


def _makes_something_new(target: torch._ops.OpOverload) -> bool:
    name = target._schema.name
    return "empty" in name or name.endswith(("::_local_scalar_dense", "::nonzero", "::bernoulli"))


def _is_returned(node: fx.Node) -> bool:
    # two results of a graph must stay two tensors: the caller may write into one of them
    return any(user.op == "output" or (is_view(user) and _is_returned(user)) for user in node.users)


def is_view(node: fx.Node) -> bool:
    """Whether a node only looks at a part of a value, or at all of it in another shape or order."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _freeze(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(_freeze(item) for item in value))
    if isinstance(value, dict):
        return tuple(sorted((key, _freeze(item)) for key, item in value.items()))
    # 1, 1.0 and True are equal to Python but not to an operator; neither are 0.0 and -0.0
    return (type(value).__name__, repr(value)) if isinstance(value, (bool, int, float)) else value
