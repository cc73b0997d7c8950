"""What the index tensors of a mixture of experts hold.

    pair p = token * top_k + k     of a token and one of its experts; the flattened top-k ids are in this order
    slot j                         where a pair is after the pairs were sorted by expert

An index tensor of one entry a pair is known by what its entries are (*pair*, *token*, *expert*, *slot*) and by the
order that they come in (by pair, or by slot, which is *sorted*).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fusion_passes import index_map
from fusion_passes.experts.reading import (
    aten,
    element,
    gathered,
    number,
    numel,
    prims,
    strip,
    uncast,
)
from fusion_passes.index_map import Size
from fusion_passes.operations import is_tensor, read, shape_of

_SORTS = {aten.sort.default, aten.sort.stable}
_FLOOR_DIVISIONS = {aten.div.Tensor_mode, aten.floor_divide.default, aten.div.Scalar_mode}
_CLAMPS = {aten.clamp_min.default, aten.clamp_max.default, aten.clamp.default}
_SCATTERS = {aten.index_put.default, aten.scatter.src}
_TOPK = ("topk_softmax", "topk_sigmoid", "grouped_topk")
_ELEMENTWISE = {
    aten.where.self, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.add.Tensor, aten.sub.Tensor,
    aten.remainder.Scalar, aten.fmod.Scalar, *_CLAMPS,
}  # fmt: skip


@dataclass(frozen=True)
class Index:
    """What an index tensor holds. ``top_k``: the divisor that made tokens of pairs."""

    what: str
    sorted: bool
    top_k: Size = None


@dataclass(frozen=True)
class Routing:
    """The top-k ids that a product of ``num_experts`` goes by. ``ids``: before any view, cast or clamp."""

    ids: fx.Node
    num_experts: int

    def read(self, node: fx.Node) -> Index | None:
        """What an index tensor holds, or None."""
        node = uncast(node)
        if node is self.ids:
            return Index("expert", False)
        if _is_clamped(node, self.num_experts):
            return self._only("expert", self.read(node.args[0]))
        if (taken := element(node, _SORTS)) is not None:
            return self._sorted(*taken)
        if node.target in _SCATTERS:
            return self._scattered(node)
        if node.target in _FLOOR_DIVISIONS:
            return self._token(node)
        if node.target is prims.iota.default:
            counts = node.kwargs.get("start") == 0 and node.kwargs.get("step") == 1
            whole = index_map.same_size(numel(node), numel(self.ids))
            return Index("pair", False) if counts and whole else None
        if (taken := gathered(node)) is not None:
            source, by = self.read(taken[0]), self.read(taken[1])
            if source is not None and not source.sorted and by == Index("pair", True):
                return Index(source.what, True, source.top_k)
            return None
        return self._repeated(node)

    @staticmethod
    def _only(what: str, index: Index | None) -> Index | None:
        return index if index is not None and index.what == what else None

    def _sorted(self, sort: fx.Node, position: int) -> Index | None:
        descending = sort.args[2] if len(sort.args) > 2 else sort.kwargs.get("descending", False)
        source = self.read(sort.args[0])
        if source is None or descending or len(shape_of(sort.args[0])) != 1:
            return None
        if source == Index("expert", False):
            return Index("expert" if position == 0 else "pair", True)
        # sorting the pairs of the slots gives the slots of the pairs
        if source == Index("pair", True):
            return Index("pair" if position == 0 else "slot", False)
        return None

    def _scattered(self, node: fx.Node) -> Index | None:
        """empty[pairs by slot] = 0, 1, 2, ...: the slot of each pair."""
        if node.target is aten.index_put.default:
            accumulates = len(node.args) > 3 and node.args[3]
            if accumulates or len(node.args[1]) != 1:
                return None
            by, values = node.args[1][0], node.args[2]
        else:
            by, values = node.args[2], node.args[3]
        counting = self.read(values) == Index("pair", False)
        return Index("slot", False) if counting and self.read(by) == Index("pair", True) else None

    def _token(self, node: fx.Node) -> Index | None:
        """pair // top_k"""
        by = node.args[1]
        mode = node.kwargs.get("rounding_mode", "floor")  # of pairs, which are not negative
        if mode not in ("floor", "trunc") or not isinstance(by, int):
            return None
        pairs = self._only("pair", self.read(node.args[0]))
        return Index("token", pairs.sorted, by) if pairs is not None else None

    def _repeated(self, node: fx.Node) -> Index | None:
        """0, 1, 2, ..., each top_k times."""
        source, mapping = read(node, None)[-1]
        if source.target is not prims.iota.default or not mapping or mapping[-1][1]:
            return None
        counts = source.kwargs.get("start") == 0 and source.kwargs.get("step") == 1
        leads = all(kept for _, kept in mapping[:-1])  # no digit at all for one token
        return Index("token", False, mapping[-1][0]) if counts and leads else None

    def is_beyond(self, mask: fx.Node, by_slot: bool) -> bool:
        """Whether a mask says which pairs have an expert that is not among those here."""
        mask = strip(mask)
        compared = mask.target is aten.ge.Scalar and mask.args[1] == self.num_experts
        return compared and self.read(mask.args[0]) == Index("expert", by_slot)


def _is_clamped(node: fx.Node, num_experts: int) -> bool:
    """Whether a node changes no id but those beyond the experts here, which add nothing: their weight is 0."""
    if node.target not in _CLAMPS:
        return False
    given = (*node.args[1:], None)[:2]
    bounds = [number(bound) for bound in given]
    if any(bound is not None and found is None for bound, found in zip(given, bounds)):
        return False  # known only at run time
    low, high = (None, bounds[0]) if node.target is aten.clamp_max.default else bounds
    return (low is None or low <= 0) and (high is None or high >= num_experts - 1)


def ids_of(node: fx.Node, num_experts: int) -> fx.Node | None:
    """The top-k ids behind an index tensor that holds an expert for each pair, in either order."""
    node = uncast(node)
    while _is_clamped(node, num_experts):
        node = uncast(node.args[0])
    if (taken := element(node, _SORTS)) is not None:
        return ids_of(taken[0].args[0], num_experts) if taken[1] == 0 else None
    if (taken := gathered(node)) is not None and element(uncast(taken[1]), _SORTS) is not None:
        return ids_of(taken[0], num_experts)
    integer = is_tensor(node) and node.meta["val"].dtype in (torch.int32, torch.int64)
    return node if integer else None


def choice_of(ids: fx.Node) -> fx.Node | None:
    """The top-k, or the op of a router, that ids are from: those of a token are all different."""
    taken = element(ids)
    if taken is None or taken[1] != 1:
        return None
    source = taken[0]
    known = source.target is aten.topk.default or getattr(source.target, "_opname", "") in _TOPK
    return source if known else None


def experts_of_router(ids: fx.Node) -> int:
    """Among how many experts the router chose that these ids are of, also where those elsewhere are masked; 0: unknown.

    No more than a hint of how many pairs are here: nothing depends on it but which kernel is fastest.
    """
    waiting, seen = [uncast(ids)], set()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if (choice := choice_of(node)) is not None:
            choices = shape_of(choice.args[0])[-1]
            return choices if isinstance(choices, int) else 0
        if node.target in _ELEMENTWISE:
            operands = node.args[1:] if node.target is aten.where.self else node.args[:2]
            waiting += [uncast(operand) for operand in operands if is_tensor(operand)]
    return 0
