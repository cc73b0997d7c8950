"""Dispatch, experts and combine in a graph, as the one op that may choose how it runs them.

rows = ep_dispatch(x)                                a pass adds:
y    = fused_moe(rows, <the experts here>)    ->     ep_fused_moe(x, <the experts here>, <a keyword>)
out  = ep_combine(y)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

import custom_ops
from fusion_passes import settings, torch_internals
from fusion_passes.operations import module_path
from fusion_passes.reporting import NearMiss, Site
from fusion_passes.rewriting import choose

DISPATCH = torch.ops.custom_ops.ep_dispatch.default
COMBINE = torch.ops.custom_ops.ep_combine.default
EXPERTS = torch.ops.custom_ops.fused_moe.default
WHOLE = torch.ops.custom_ops.ep_fused_moe.default
BOUNDED = torch.ops.custom_ops.ep_fused_moe.bounded  # the same, which a CUDA graph may hold
_HANDLE = slice(5, 9)
# Whether a number of rows that the data says is not negative, which nobody asks of an op that returns no such number.
_ASKING = (torch.ops.aten.sym_size.int, operator.ge, torch.ops.aten._assert_scalar.default)


def sites(
    graph: fx.Graph,
    name: str,
    keyword: dict[str, Any],
    objection: Callable[[fx.Node], str | None] = lambda dispatch: None,
) -> Iterator[Site | NearMiss]:
    """Give each block of the graph these keywords; yields what was done, or why not, in the name of a fusion.

    objection(node): why the block that begins with an `ep_dispatch`, or is an `ep_fused_moe`, stays as it is, or None.
    """
    for node in list(graph.nodes):
        if is_whole(node):
            reason, whole = _on_a_cpu(node) or objection(node), node
        elif node.target is COMBINE and isinstance(node.args[0], fx.Node):
            experts = node.args[0]
            if experts.target is not EXPERTS:
                continue
            dispatch = _dispatch_of(experts)
            if dispatch is None:
                continue
            reason = _wrong(dispatch, experts, node) or _on_a_cpu(dispatch) or objection(dispatch)
            whole = node
            if reason is None:
                whole = _merge(graph, dispatch, experts, node)
        else:
            continue
        if reason is not None:
            yield NearMiss(name, module_path(node), node.name, reason)
            continue
        for key, value in keyword.items():
            whole.update_kwarg(key, value)
        if _waits_for_nobody(whole):
            whole.target = BOUNDED
        tokens, hidden = whole.args[0].meta["val"].shape
        yield Site(
            name,
            module_path(whole),
            pattern="dispatch, experts, combine",
            implementations=tuple(_implementations(whole)),
            sizes={"num_tokens": str(tokens), "hidden_size": str(hidden)},
            bytes_saved="0",
            bytes_saved_here=0,
        )


def is_whole(node: fx.Node) -> bool:
    return node.target in (WHOLE, BOUNDED)


def _implementations(whole: fx.Node) -> Iterator[str]:
    calls = [("ep_fused_moe", whole.args, whole.kwargs)]
    calls += [("fused_moe", args, how) for _, args, how in whole.meta.get("ops_inside", ())]
    for name, args, how in calls:
        chosen = choose(custom_ops.ops()[name], args, how).implementation
        assert chosen is not None
        yield f"{name}:{chosen.name}"


def _on_a_cpu(node: fx.Node) -> str | None:
    if settings.current().allow_reference or node.args[0].meta["val"].device.type != "cpu":
        return None
    return "nothing is gained by it on a CPU; FUSION_PASSES_ALLOW_REFERENCE=1 would rewrite it"


def _waits_for_nobody(whole: fx.Node) -> bool:
    """Whether a CUDA graph may hold the op: dispatching waits for the host where DeepEP is not installed."""
    how, device = whole.kwargs, whole.meta["val"].device
    gathers = how.get("exchange") == "gather" and bool(how.get("max_tokens"))
    return gathers and "gather" in custom_ops.ops()["ep_fused_moe"].usable(device)


def _dispatch_of(experts: fx.Node) -> fx.Node | None:
    rows = experts.args[0]
    if isinstance(rows, fx.Node) and rows.target is operator.getitem and rows.args[1] == 0:
        source = rows.args[0]
        if isinstance(source, fx.Node) and source.target is DISPATCH:
            return source
    return None


def _wrong(dispatch: fx.Node, experts: fx.Node, combine: fx.Node) -> str | None:
    """Why these three are no block, or None."""
    items = {user.args[1]: user for user in dispatch.users if user.target is operator.getitem}
    wanted = [items.get(index) for index in (0, 3, 2)]
    if [experts.args[0], *experts.args[3:5]] != wanted:
        return "the experts do not take the ids and weights that came with the rows"
    if experts.kwargs.get("expert_map") is not None:
        return "the experts have an expert map, where a rank has those after the rank before"
    if experts.kwargs.get("up") is not None:
        return "gate and up of the experts are two weights, where the op takes one that has both"
    if experts.kwargs.get("hidden_scale") is not (
        None if dispatch.args[1] is None else items.get(1)
    ):
        return "the experts do not take the scales that came with the rows"
    if list(combine.args[1:5]) != [
        items.get(index) for index in range(_HANDLE.start, _HANDLE.stop)
    ]:
        return "what is combined has the handle of another dispatch"
    if dispatch.args[5] != combine.args[5]:
        return "dispatch and combine name different groups"
    for node in (*items.values(), experts):
        for user in node.users:
            if user not in (experts, combine) and not _only_asks(user):
                return f"{user.name} reads {node.name}, which stays inside of the op"
    return None


def _only_asks(node: fx.Node) -> bool:
    """Whether a node, and all that is made of it, asks for no more than that a number of rows is one."""
    return node.target in _ASKING and all(_only_asks(user) for user in node.users)


def _merge(graph: fx.Graph, dispatch: fx.Node, experts: fx.Node, combine: fx.Node) -> fx.Node:
    x, scale, ids, weights, num_experts, group = dispatch.args
    _, gate_up, down, *_ = experts.args
    known = ("hidden_scale", "expert_map", "routed_experts")  # the op's own business
    how = {k: v for k, v in experts.kwargs.items() if k not in known}
    how["max_tokens"] = dispatch.kwargs.get("max_tokens", 0)
    args = (x, scale, ids, weights, gate_up, down, num_experts, group)
    with graph.inserting_before(combine):
        whole = graph.call_function(WHOLE, args, how)
    for key, value in combine.meta.items():
        whole.meta[key] = value
    # What a warm-up is to compile for; the values, for the nodes go away.
    inside = fx.node.map_arg((experts.args, experts.kwargs), lambda node: node.meta["val"])
    whole.meta["ops_inside"] = [(EXPERTS, *inside)]
    combine.replace_all_uses_with(whole)
    graph.erase_node(combine)
    graph.erase_node(experts)
    _erase_with_readers(graph, dispatch)
    torch_internals.tidy(graph)
    return whole


def _erase_with_readers(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase_with_readers(graph, user)
    graph.erase_node(node)
