"""What a router chooses experts by: the scores of the logits, a correction bias, groups of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusion_passes import index_map
from fusion_passes.experts.reading import (
    CAST,
    Unlike,
    aten,
    called,
    dtype_of,
    element,
    number,
    numel,
    strip,
)
from fusion_passes.index_map import Size
from fusion_passes.operations import is_tensor, read, shape_of

TOPK = aten.topk.default
_NOTS = (aten.bitwise_not.default, aten.logical_not.default)  # of booleans, as where takes no other
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


@dataclass
class Scores:
    """``node`` is ``kind`` ("softmax", "sigmoid", "sqrt_softplus" or "logits") of ``logits``."""

    node: fx.Node
    kind: str
    logits: fx.Node
    inside: list[fx.Node]


@dataclass(frozen=True)
class Groups:
    """The experts of all but the best groups are masked: ``masked`` says by what, ``group_score`` which are best."""

    num_groups: Size
    topk_groups: Size
    group_score: str
    masked: str
    of: fx.Node  # what the groups are scored by
    choice: fx.Node  # the masked value


def ungrouped(node: fx.Node, inside: list[fx.Node]) -> tuple[fx.Node, Groups | None]:
    """What experts would be chosen by without groups, and the groups."""
    experts, node = shape_of(node)[-1], strip(node)
    if node.target is not aten.where.self:
        return node, None
    condition, kept, filled = node.args
    stays = number(filled) is not None  # masked_fill(mask, fill) is where(mask, fill, kept)
    if not stays:
        kept, filled = filled, kept
    fill = number(filled)
    masked = {float("-inf"): "-inf", 0.0: "zero"}.get(float("nan") if fill is None else fill)
    if masked is None:
        raise Unlike(node, f"{node.name} sets the experts of other groups to {fill}")
    scatter, mapping = read(condition, shape_of(node))[-1]
    while scatter.target in (*_NOTS, CAST):
        stays ^= scatter.target in _NOTS
        inside.append(scatter)
        scatter, inner = read(scatter.args[0], None)[-1]
        mapping = index_map.compose(mapping or ((1, True),), inner) or ()
    if not _says_groups(scatter, stays):
        raise Unlike(node, f"{called(scatter)} does not say which experts' groups stay")
    num_groups = shape_of(scatter)[-1]
    width = index_map.divide(experts, num_groups)
    spread = index_map.collapse([(shape_of(scatter)[0] * num_groups, True), (width, False)])
    if width is None or not index_map.same_map(spread, mapping):
        raise Unlike(node, f"{scatter.name} is not spread over the experts of each group")
    best = element(scatter.args[2], {TOPK})
    if best is None or best[1] != 1 or not is_topk_over_last(best[0]):
        raise Unlike(node, f"{called(strip(scatter.args[2]))} does not choose groups")
    of, group_score = _group_score(best[0].args[0], num_groups, width, inside)
    inside += [node, scatter, strip(scatter.args[2]), best[0]]
    kept = strip(kept)
    return kept, Groups(num_groups, best[0].args[1], group_score, masked, of, node)


def _says_groups(scatter: fx.Node, stays: bool) -> bool:
    """Whether 1 is written over 0 for the chosen groups, or 0 over 1 where the rest stay not."""
    if scatter.target is not aten.scatter.value or len(shape_of(scatter)) != 2:
        return False
    before = strip(scatter.args[0])
    if before.target is not aten.full.default or scatter.args[1] % 2 != 1:
        return False
    return (before.args[1], scatter.args[3]) == ((0, 1) if stays else (1, 0))


def _group_score(
    node: fx.Node, num_groups: Size, width: Size, inside: list[fx.Node]
) -> tuple[fx.Node, str]:
    """What groups are scored by: the sum of the two best of [T, num_groups, width], or the best."""
    node = strip(node)
    inside.append(node)
    if node.target is aten.sum.dim_IntList and [d % 3 for d in node.args[1]] == [2]:
        two = element(node.args[0], {TOPK})
        if two is not None and two[1] == 0 and two[0].args[1] == 2 and is_topk_over_last(two[0]):
            inside += [strip(node.args[0]), two[0]]
            return _in_groups(two[0].args[0], num_groups, width), "top2"
    best = element(node, {aten.max.dim})
    if best is not None and best[1] == 0 and best[0].args[1] % 3 == 2:
        inside.append(best[0])
        return _in_groups(best[0].args[0], num_groups, width), "max"
    if node.target is aten.amax.default and [d % 3 for d in node.args[1]] == [2]:
        return _in_groups(node.args[0], num_groups, width), "max"
    raise Unlike(node, f"{called(node)} is no score of groups: the two best added up, or the best")


def _in_groups(node: fx.Node, num_groups: Size, width: Size) -> fx.Node:
    found = shape_of(node)
    if len(found) != 3 or not all(map(index_map.same_size, found[1:], (num_groups, width))):
        raise Unlike(node, f"{node.name} is {found}, not experts in {num_groups} groups")
    return strip(node)


def unbiased(node: fx.Node, inside: list[fx.Node]) -> tuple[fx.Node, fx.Node | None]:
    """(scores, correction bias) where a node is their sum."""
    if node.target is not aten.add.Tensor or node.kwargs or not all(map(is_tensor, node.args)):
        return node, None
    experts = shape_of(node)[-1]
    for value, other in (node.args, node.args[::-1]):
        along = len(shape_of(other)) and index_map.same_size(shape_of(other)[-1], experts)
        if along and index_map.same_size(numel(other), experts) and len(shape_of(value)) > 1:
            inside.append(node)
            bias = _widened(strip(other))
            # scores of 16 bits plus a bias that was cast are not rounded, plus one of 16 bits they are
            promoted = torch.promote_types(dtype_of(value), dtype_of(bias))
            return strip(value), bias if promoted is dtype_of(node) else strip(other)
    raise Unlike(node, f"{node.name} adds to the scores of experts what is not one bias for each")


def _widened(node: fx.Node) -> fx.Node:
    """A value of 16 bits before it was cast to float32."""
    if node.target is CAST and dtype_of(node) is torch.float32:
        source = strip(node.args[0])
        if dtype_of(source) in SIXTEEN_BITS:
            return source
    return node


def scores_of(node: fx.Node, num_experts: Size) -> Scores:
    """What a node of [T, E] is of the logits; the logits themselves where it is nothing else."""
    inside: list[fx.Node] = []
    inner = node
    if node.target is CAST and dtype_of(node) in SIXTEEN_BITS:  # softmax in 16 bits, rounded
        inner = strip(node.args[0])
        inside.append(node)
    softmax = softmax_of(inner, num_experts)
    if softmax is not None:
        logits = _widened(softmax[0])
        if inner is not node and dtype_of(logits) is not dtype_of(node):
            raise Unlike(node, f"{node.name} rounds the softmax of {dtype_of(logits)} logits")
        return Scores(node, "softmax", logits, [*inside, *softmax[1]])
    if inner.target is aten.sigmoid.default:
        logits = _widened(strip(inner.args[0]))
        if inner is not node and dtype_of(logits) is not dtype_of(node):
            raise Unlike(node, f"{node.name} rounds the sigmoid of {dtype_of(logits)} logits")
        return Scores(node, "sigmoid", logits, [node, inner])
    root = _sqrt_softplus_of(node)
    if root is not None:
        return Scores(node, "sqrt_softplus", _widened(root[0]), root[1])
    return Scores(node, "logits", _widened(node), [])


def softmax_of(node: fx.Node, width: Size) -> tuple[fx.Node, list[fx.Node]] | None:
    """(x, the nodes) where a node is the softmax of x over its last dimension, which has a size."""
    node = strip(node)
    if not shape_of(node) or not index_map.same_size(shape_of(node)[-1], width):
        return None  # of a group of experts, or of all tokens
    if node.target is aten._softmax.default:
        rank = len(shape_of(node))
        return (strip(node.args[0]), [node]) if node.args[1] % rank == rank - 1 else None
    if node.target is not aten.div.Tensor or not all(map(is_tensor, node.args)):
        return None
    exp, total = strip(node.args[0]), strip(node.args[1])
    if exp.target is not aten.exp.default or not over_last(total, aten.sum.dim_IntList):
        return None
    shifted = strip(exp.args[0])
    if strip(total.args[0]) is not exp or shifted.target is not aten.sub.Tensor:
        return None
    x, largest = strip(shifted.args[0]), strip(shifted.args[1])
    if not over_last(largest, aten.amax.default) or strip(largest.args[0]) is not x:
        return None
    return x, [node, exp, total, shifted, largest]


def over_last(node: fx.Node, target: Any) -> bool:
    if node.target is not target:
        return False
    rank = len(shape_of(node.args[0]))
    return [d % rank for d in node.args[1]] == [rank - 1] and node.args[2:3] == (True,)


def is_topk_over_last(node: fx.Node) -> bool:
    """Whether a top-k takes the largest of the last dimension."""
    rank = len(shape_of(node.args[0]))
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", -1)
    largest = node.args[3] if len(node.args) > 3 else node.kwargs.get("largest", True)
    return dim % rank == rank - 1 and bool(largest)


def _sqrt_softplus_of(node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
    """The root of softplus, which PyTorch spells where(x > 20, x, log1p(exp(x)))."""
    if node.target is not aten.sqrt.default:
        return None
    soft = strip(node.args[0])
    if soft.target is aten.softplus.default and len(soft.args) == 1:
        return strip(soft.args[0]), [node, soft]
    if soft.target is not aten.where.self:
        return None
    condition, x, rest = map(strip, soft.args)
    if condition.target is not aten.gt.Scalar or condition.args[1] != 20:
        return None
    if rest.target is not aten.log1p.default or strip(condition.args[0]) is not x:
        return None
    exp = strip(rest.args[0])
    if exp.target is not aten.exp.default or strip(exp.args[0]) is not x:
        return None
    return x, [node, soft, condition, rest, exp]
