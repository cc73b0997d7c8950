"""How many pairs each expert has, in every way that models count them.

cumsum(histc(ids, E, 0, E - 1 or E))        cumsum(bincount(ids, minlength=E))
cumsum(sum(ids[:, None] == arange(E)))      one_hot and a sum are that, too
cumsum(sum(scatter(zeros[T, E], ids, 1)))   of the ids of a token, which are all different; of True, too
cumsum(zeros[E] with 1 added at each id)    scatter_add, index_add, index_put
searchsorted(sorted ids, arange(E), right)  or from the left for 1 .. E
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fusion_passes import index_map
from fusion_passes.experts.reading import CAST, aten, number, numel, prims, strip, uncast
from fusion_passes.experts.routing import Index, Routing, choice_of, ids_of
from fusion_passes.operations import is_tensor, shape_of

_ADDING = {aten.scatter_add.default, aten.index_add.default, aten.index_put.default}


def counted(offsets: fx.Node, num_experts: int) -> fx.Node | None:
    """The top-k ids whose number per expert, added up, are the offsets of a grouped product."""
    sums = uncast(offsets)
    if sums.target is aten.searchsorted.Tensor:
        values = _searched(sums, num_experts)
        wanted = Index("expert", True)
    elif sums.target is aten.cumsum.default and sums.args[1] in (0, -1):
        values = _values(uncast(sums.args[0]), num_experts)
        wanted = None  # in whichever order, but all of them
    else:
        return None
    ids = None if values is None else ids_of(values, num_experts)
    if ids is None or values is None:
        return None
    index = Routing(ids, num_experts).read(values)
    if index is None or index.what != "expert" or wanted not in (None, index):
        return None
    return ids


def _values(counts: fx.Node, num_experts: int) -> fx.Node | None:
    """What is counted, one number below ``num_experts`` after the other; None for any other counts."""
    if counts.target is aten.histc.default:
        given: tuple[Any, ...] = (*counts.args[1:], *(100, 0, 0)[len(counts.args) - 1 :])
        bins, low, high = given
        # bin floor(id * E / high) is the id for both, as the highest value belongs to the last bin
        ends = number(high) in (num_experts - 1, num_experts)
        return counts.args[0] if ends and (bins, number(low)) == (num_experts, 0) else None
    if counts.target is aten.bincount.default:
        fits = counts.kwargs.get("minlength", counts.args[-1]) == num_experts
        return counts.args[0] if fits else None
    if counts.target in _ADDING:
        return _added_at(counts, num_experts)
    if counts.target is aten.sum.dim_IntList:
        return _summed(counts, num_experts)
    return None


def _summed(total: fx.Node, num_experts: int) -> fx.Node | None:
    """The sum over all but the last dimension of what says of each value and expert whether they are the same."""
    shape = shape_of(total.args[0])
    rank = len(shape)
    if sorted(dim % rank for dim in total.args[1]) != list(range(rank - 1)):
        return None
    if not index_map.same_size(shape[-1], num_experts):
        return None
    same = strip(total.args[0])
    while same.target is CAST:
        same = strip(same.args[0])
    if same.target is aten.eq.Tensor:
        for values, experts in (same.args, same.args[::-1]):
            spread = shape_of(values)[-1:] == (1,) and index_map.same_size(
                numel(values) * num_experts, numel(same)
            )
            if spread and _counts_from(experts, 0, num_experts):
                return values
    if same.target is aten.scatter.value and _is_empty(same.args[0]):
        # the ids of a token differ, so that no 1 takes the place of another
        values = same.args[2]
        chosen = choice_of(uncast(values)) is not None
        if same.args[1] % len(shape_of(same)) == 1 and same.args[3] == 1 and chosen:
            return values if len(shape_of(same)) == 2 else None
    return None


def _is_empty(node: fx.Node) -> bool:
    """Whether nothing is in it yet: 0, or False in a map of what goes where."""
    node = strip(node)
    return number(node) == 0 or (node.target is aten.full.default and node.args[1] is False)


def _added_at(node: fx.Node, num_experts: int) -> fx.Node | None:
    """zeros[num_experts] with 1 added at each value."""
    zeros = node.args[0]
    if node.target is aten.index_put.default:
        if len(node.args[1]) != 1 or node.args[3:4] != (True,):
            return None
        values, ones = node.args[1][0], node.args[2]
    else:
        if node.args[1] not in (0, -1) or node.kwargs:
            return None
        values, ones = node.args[2], node.args[3]
    empty = number(uncast(zeros)) == 0 and shape_of(zeros) == (num_experts,)
    return values if empty and is_tensor(values) and number(uncast(ones)) == 1 else None


def _searched(node: fx.Node, num_experts: int) -> fx.Node | None:
    """The sorted values of which a search says where those of each expert end."""
    if node.kwargs.keys() - {"right", "side", "out_int32"}:
        return None
    right = node.kwargs.get("right") or node.kwargs.get("side") == "right"
    ends = _counts_from(node.args[1], 0 if right else 1, num_experts)
    return node.args[0] if ends and len(shape_of(node.args[0])) == 1 else None


def _counts_from(node: fx.Node, start: int, count: int) -> bool:
    """Whether a tensor is start, start + 1, ..., so many."""
    iota = uncast(node) if is_tensor(node) else None
    return (
        iota is not None
        and iota.target is prims.iota.default
        and (iota.args[0], iota.kwargs.get("start"), iota.kwargs.get("step")) == (count, start, 1)
    )
