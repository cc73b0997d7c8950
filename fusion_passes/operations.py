"""How a graph is read: operations with operands, and what lies between an operand and its source.

:func:`describe` gives one name to the spellings of an operation; :func:`read` walks from an operand up through
views, expands and slices to the value that they rearrange.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusion_passes import index_map, torch_internals
from fusion_passes.index_map import IndexMap, Size

aten = torch.ops.aten
prims = torch.ops.prims

_RESHAPES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.alias.default, aten.clone.default,
    aten.detach.default,
}  # fmt: skip
_PERMUTES = {aten.permute.default, aten.transpose.int, aten.t.default}
_ROOTS = {0.5: "aten.sqrt.default", -0.5: "aten.rsqrt.default"}
_REDUCTIONS = {
    aten.amax.default: "amax", aten.max.default: "amax", aten.amin.default: "amin", aten.min.default: "amin",
    aten.mean.dim: "mean", aten.sum.dim_IntList: "sum",
}  # fmt: skip
_WITH_INDICES = {aten.max.dim: "amax", aten.min.dim: "amin"}
_ROWWISE_OR_TENSORWISE = ([0], [1])  # recipes of torch.nn.functional.scaled_mm with a scale each
_NAMES = {
    aten.add.Tensor: "add", aten.add.Scalar: "add", aten.mul.Tensor: "mul", aten.mul.Scalar: "mul",
    aten.div.Tensor: "div", aten.div.Scalar: "div", aten.sub.Tensor: "sub", aten.sub.Scalar: "sub",
    prims.convert_element_type.default: "cast",
}  # fmt: skip
COMMUTATIVE = {"add", "mul"}


def shape_of(node: fx.Node) -> tuple[Size, ...]:
    return tuple(torch_internals.size_to_expr(size) for size in node.meta["val"].shape)


def strides_of(node: fx.Node) -> tuple[Size, ...]:
    return tuple(torch_internals.size_to_expr(stride) for stride in node.meta["val"].stride())


def is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


@dataclass(frozen=True)
class Operation:
    """A node, normalized.

    kind: *pointwise* and *reduction* see their operands as flat sequences; *rowwise* operations work on the last
    dimension and take any leading ones; *opaque* ones are compared shape by shape.
    operands: the arguments, tensors and others, keyword arguments last (their names are the attributes).
    """

    name: str
    kind: str
    operands: tuple[Any, ...]
    attributes: tuple[Any, ...] = ()
    digits: IndexMap = ()


_aliases: dict[str, str] = {}


def alias(operator: str, name: str) -> None:
    """Read an operator that may not be registered here, such as ``"ao.x.default"``, as another of that meaning."""
    _aliases[operator] = name


def describe(node: fx.Node) -> Operation | None:
    """The operation that a node stands for; None for the inputs of a graph."""
    if node.op != "call_function" or "val" not in node.meta:
        return None
    target, args, kwargs = node.target, node.args, node.kwargs
    attributes = tuple(sorted(kwargs))
    constants = tuple(kwargs[key] for key in attributes)
    if isinstance(kind := getattr(target, "meaning_kind", None), str):
        return Operation(target.__name__, kind, (*args, *constants), attributes)
    if (name := _values_alone(node)) is not None:
        source, dim = args[0].args[0], args[0].args[1]
        return Operation(
            name, "reduction", (source,), (), index_map.reduction(shape_of(source), [dim])
        )
    if target in _REDUCTIONS:
        shape = shape_of(args[0])
        dims = args[1] if len(args) > 1 and args[1] else range(len(shape))
        # keepdim only shapes the result, which the index maps of its readers account for
        rest = tuple(kwargs[key] for key in attributes if key != "keepdim")
        return Operation(
            _REDUCTIONS[target],
            "reduction",
            (args[0], *rest),
            (),
            index_map.reduction(shape, list(dims)),
        )
    name = _NAMES.get(target) or _aliases.get(str(target), str(target))
    if name == "cast":
        return Operation(name, "pointwise", (args[0],))  # the dtype is compared on the node
    if target is aten.full.default:  # a number as a tensor, on whichever device
        return Operation("constant", "pointwise", (args[1],))
    if target is aten.pow.Tensor_Scalar and args[1] in _ROOTS:  # which eager runs for it
        return Operation(_ROOTS[args[1]], "pointwise", (args[0],))
    if (target is aten.pow.Tensor_Scalar and args[1] == 2) or (
        name == "mul" and args[0] is args[1]
    ):
        return Operation("square", "pointwise", (args[0],))
    if target is aten._scaled_mm_v2.default and (older := _scaled_mm(args)) is not None:
        return Operation("aten._scaled_mm.default", "opaque", older)
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return Operation(name, "pointwise", (*args, *constants), attributes)
    return Operation(name, "opaque", (*args, *constants), attributes)


def _scaled_mm(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What ``aten._scaled_mm`` takes for a call of ``aten._scaled_mm_v2``; None where it has no such product.

    The later operator is what ``torch.nn.functional.scaled_mm`` calls: (a, b, scales of a, recipes, swizzles, scales of
    b, recipes, swizzles, bias, out_dtype, contraction_dim, use_fast_accum), the last two left out where not given.
    """
    a, b, a_scales, a_recipe, a_swizzle, b_scales, b_recipe, b_swizzle, bias, dtype, *rest = args
    recipe = list(a_recipe)
    if recipe != list(b_recipe) or recipe not in _ROWWISE_OR_TENSORWISE:
        return None
    if len(a_scales) != 1 or len(b_scales) != 1 or any([*a_swizzle, *b_swizzle, *rest[:1]]):
        return None
    fast = (True,) if rest[1:] == [True] else ()
    return (a, b, a_scales[0], b_scales[0], bias, None, dtype, *fast)


def _values_alone(node: fx.Node) -> str | None:
    """The reduction that the first of ``max(dim)`` or ``min(dim)`` is where nothing reads where its values stand."""
    if node.target is not operator.getitem or node.args[1] != 0:
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.target not in _WITH_INDICES:
        return None
    alone = all(user.target is operator.getitem and user.args[1] == 0 for user in source.users)
    return _WITH_INDICES[source.target] if alone else None


def is_constant(node: fx.Node) -> bool:
    """Whether all elements are one number, so that no rearrangement of them matters."""
    return node.target is aten.full.default


def transparent(node: fx.Node) -> tuple[fx.Node, IndexMap] | None:
    """The source of a node that only rearranges elements, and how; None for every other node."""
    if (
        node.op != "call_function"
        or not node.args
        or not is_tensor(node.args[0])
        or not is_tensor(node)
    ):
        return None
    source = node.args[0]
    shape, source_shape = shape_of(node), shape_of(source)
    identity = ((index_map.product(source_shape), True),)
    if node.target in _RESHAPES:
        return source, identity
    if node.target is aten.expand.default:
        return source, index_map.broadcast(source_shape, shape)
    if node.target is aten.slice.Tensor:
        dim = node.args[1] if len(node.args) > 1 else 0
        start = node.args[2] if len(node.args) > 2 else 0
        step = node.args[4] if len(node.args) > 4 else 1
        whole = all(index_map.same_size(a, b) for a, b in zip(shape, source_shape, strict=True))
        leading = all(size == 1 for size in shape[: dim % len(shape)])
        return (
            (source, identity)
            if step == 1 and (whole or (start in (0, None) and leading))
            else None
        )
    if node.target in _PERMUTES:
        moved = [d for d in _permutation(node, len(shape)) if source_shape[d] != 1]
        return (source, identity) if moved == sorted(moved) else None
    if node.target is aten.abs.default:  # as DeepGEMM takes it of a scale
        return (source, identity) if _is_not_negative(source) else None
    if node.target is aten.mul.Tensor:  # 1.0 / x is reciprocal(x) * 1.0
        by_one = node.args[1] == 1 and not is_tensor(node.args[1])
        return (source, identity) if by_one and _same_dtype(node, source) else None
    if node.target is prims.convert_element_type.default:
        return (source, identity) if _same_dtype(node, source) else None
    return None


def _is_not_negative(node: fx.Node) -> bool:
    """Whether no element can have a sign, but for NaN: magnitudes, their maxima and bounds, and parts of those."""
    while node.op == "call_function" and is_tensor(node):
        target, args = node.target, node.args
        if target is aten.abs.default:
            return True
        if target is aten.clamp_min.default:
            return isinstance(args[1], (int, float)) and args[1] > 0
        scaled = target in (aten.div.Tensor, aten.mul.Tensor)
        if scaled and not (isinstance(args[1], (int, float)) and args[1] > 0):
            return False
        kept = _REDUCTIONS.get(target) == "amax" or target is prims.convert_element_type.default
        if not (scaled or kept or target in _RESHAPES):
            return False
        node = args[0]
    return False


def _same_dtype(a: fx.Node, b: fx.Node) -> bool:
    return a.meta["val"].dtype == b.meta["val"].dtype


def _permutation(node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [dim % rank for dim in node.args[1]]
    first, second = (
        (node.args[1], node.args[2]) if node.target is aten.transpose.int else (0, rank - 1)
    )
    order[first % rank], order[second % rank] = order[second % rank], order[first % rank]
    return order


def read(operand: fx.Node, reader_shape: Sequence[Size] | None) -> list[tuple[fx.Node, IndexMap]]:
    """The operand and the values it is a rearrangement of, nearest first, each with the map from its reader.

    ``reader_shape``: the shape that the operand is broadcast to; None for an operand that is read as it is.
    """
    shape = shape_of(operand)
    mapping = index_map.broadcast(shape, shape if reader_shape is None else reader_shape)
    chain = [(operand, mapping)]
    while (step := transparent(chain[-1][0])) is not None:
        source, inner = step
        composed = index_map.compose(chain[-1][1] or ((1, True),), inner)
        if composed is None:
            break
        chain.append((source, composed))
    return chain


def uncut(chain: Sequence[fx.Node]) -> tuple[Sequence[fx.Node], bool]:
    """Of a chain from an operand up to its source, the nodes before rows are lost; and whether any are."""
    for index, (node, source) in enumerate(itertools.pairwise(chain)):
        if node.target is aten.slice.Tensor and shape_of(node) != shape_of(source):
            return chain[: index + 1], True
    return chain, False


def readers(node: fx.Node) -> Iterator[fx.Node]:
    """The operations that read a value, through views; the graph's output is none."""
    for user in node.users:
        if transparent(user) is not None:
            yield from readers(user)
        elif user.op != "output":
            yield user


def escapes(
    inside: Iterable[fx.Node], outputs: Iterable[fx.Node]
) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Pairs of a node of ``inside`` that is no output, and a user of it that is outside."""
    inside, outputs = set(inside), set(outputs)
    for node in sorted(inside - outputs):
        if is_constant(node):
            continue  # a copy of it costs nothing
        stack = list(node.users)
        while stack:
            user = stack.pop()
            if user in inside or user.target is aten.sym_size.int:
                continue  # how large it is, is known without it
            # max(dim) is read through its first output, which is the operation
            if user.target in _WITH_INDICES or (
                user.op != "output" and transparent(user) is not None
            ):
                stack.extend(user.users)
            else:
                yield node, user


def module_path(node: fx.Node) -> str:
    """The module whose forward a node comes from, such as ``model.layers.3.mlp``."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed([entry[0] for entry in stack.values()]), ""))
    path = re.sub(r"^L\['(self|fn|model)'\]\.?", "", path)
    path = re.sub(
        r"\._modules\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]",
        lambda m: "." + next(filter(None, m.groups())),
        path,
    )
    return path.lstrip(".") or "(top)"
