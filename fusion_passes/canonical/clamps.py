"""A clamp by infinity does nothing: so models write the layers that have no limit (Step-3.7).

clamp_max(x, inf), clamp_min(x, -inf)                          ->  x
convert(clamp_max(convert(x, float32), inf), dtype of x)      ->  x
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_CAST = torch.ops.prims.convert_element_type.default
_NARROW = (torch.bfloat16, torch.float16)


def bypass(node: fx.Node) -> int:
    """Lead what reads a clamp by infinity past it; returns how many nodes are read by nothing then."""
    if not _is_endless(node) or any(user.op == "output" for user in node.users):
        return 0
    source, bypassed = node.args[0], 1
    for user in list(node.users):
        if (narrow := _narrow(source)) is not None and _casts_to(user, narrow):
            user.replace_all_uses_with(narrow)
            bypassed += 1
    node.replace_all_uses_with(source)
    return bypassed


def _is_endless(node: fx.Node) -> bool:
    if node.kwargs or len(node.args) < 2:
        return False
    if node.target is aten.clamp_max.default:
        bounds = (None, node.args[1])
    elif node.target is aten.clamp_min.default:
        bounds = (node.args[1], None)
    elif node.target is aten.clamp.default:
        bounds = (*node.args[1:], None)[:2]
    else:
        return False
    if not node.meta["val"].dtype.is_floating_point:  # a whole number has no infinity
        return False
    return _is(bounds[0], -math.inf) and _is(bounds[1], math.inf)


def _is(bound: Any, infinity: float) -> bool:
    return bound is None or (isinstance(bound, float) and bound == infinity)


def _narrow(node: Any) -> fx.Node | None:
    """x, where a node is x in 16 bits as float32."""
    if not isinstance(node, fx.Node) or node.target is not _CAST:
        return None
    source, wide = node.args[0], node.meta["val"].dtype is torch.float32
    return source if wide and source.meta["val"].dtype in _NARROW else None


def _casts_to(node: fx.Node, narrow: fx.Node) -> bool:
    """Whether a node is a cast to the dtype of another, and may be that very tensor: no result of the graph."""
    if node.target is not _CAST or any(user.op == "output" for user in node.users):
        return False
    return node.meta["val"].dtype is narrow.meta["val"].dtype
