"""Casts of what a kernel returned, there and back, go where they lose nothing.

    convert(convert(zero_point, float32), int8)    ->  zero_point      a code is a whole number
    convert(convert(scale, bfloat16), float32)     ->  scale           which the kernel rounded to bfloat16

A quantization returns its scale in float32 and its zero point in int8, and a graph may have them in another dtype that
holds them as well. That cast stands for what the graph had, and mostly the graph casts once more; what is left between
a kernel and its reader is a kernel of Inductor's.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

_CAST = torch.ops.prims.convert_element_type.default
_LOSSLESS = "lossless_cast"  # in the meta of a node


def lossless(node: fx.Node) -> fx.Node:
    """The node, as a cast of values that are exact in its dtype."""
    node.meta[_LOSSLESS] = True
    return node


def undone(node: fx.Node) -> fx.Node | None:
    """x, where a node casts a lossless cast of x back to the dtype of x, and a kernel of `custom_ops` returned x.

    None where both are results of the graph: those stay two tensors.
    """
    inner = _source(node)
    source = _source(inner) if inner is not None and inner.meta.get(_LOSSLESS) else None
    if source is None or not _is_made_by_a_kernel(source) or _dtype(source) is not _dtype(node):
        return None
    return None if _is_returned(node) and _is_returned(source) else source


def _source(node: fx.Node) -> fx.Node | None:
    """What a node casts; None for any other node."""
    if node.op != "call_function" or node.target is not _CAST:
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) else None


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _is_returned(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _is_made_by_a_kernel(node: fx.Node) -> bool:
    # a meaning that no fusion takes goes back to the nodes that it stands for, with the dtypes that those have
    viewed = node.args[0] if node.target is torch.ops.aten.view.default else node
    assert isinstance(viewed, fx.Node)
    made = viewed.args[0] if viewed.target is operator.getitem else viewed
    target = getattr(made, "target", None)
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "custom_ops"
