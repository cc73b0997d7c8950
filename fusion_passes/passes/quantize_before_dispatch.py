"""Tokens that the receiving rank quantizes are quantized before they travel: about half the bytes, and the same bits.

    rows = ep_dispatch(x);          fused_moe(rows, <FP8 weights>)   or   group_quant(rows)

        ->   codes, scale = group_quant(x)
             codes, scale = ep_dispatch(codes, scale);   fused_moe(codes, <FP8 weights>, hidden_scale=scale)

A group is a part of one row, which arrives bit for bit, so it does not matter on which side it is quantized. A token
that goes to several ranks is then also quantized once and not on each. A scale of a whole tensor would be another one.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

import custom_ops
from custom_ops.gemm.reference import BLOCK
from custom_ops.scales import GROUP_SIZES
from fusion_passes import index_map, settings, torch_internals
from fusion_passes.canonical import quantizations
from fusion_passes.fusion import Fusion
from fusion_passes.operations import module_path, shape_of
from fusion_passes.reporting import NearMiss, Site

NAME = "quantize_before_dispatch"
DISPATCH = torch.ops.custom_ops.ep_dispatch.default
FUSED_MOE = torch.ops.custom_ops.fused_moe.default
QUANTIZE = torch.ops.custom_ops.group_quant.default
FP8 = torch.float8_e4m3fn
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_HOW = ("min_amax", "scale_mode", "code_mode")


def _transform(graph: fx.Graph) -> Iterator[Site | NearMiss]:
    for node in list(graph.nodes):
        if node.target is DISPATCH and node.args[1] is None:
            rows = _item(node, 0)
            if rows is None or rows.meta["val"].dtype not in _SIXTEEN_BITS:
                continue
            found = [_quantization(user, rows) for user in _readers(rows)]
            if not any(found):
                continue
            reason = _objection(rows, found) or _only_reference(node, found[0])
            if reason is not None:
                yield NearMiss(NAME, module_path(node), node.name, reason)
            else:
                yield _rewrite(graph, node, rows, found[0])


def _quantization(user: fx.Node, rows: fx.Node) -> tuple[int, tuple[tuple[str, Any], ...]] | None:
    """(group size, keywords of group_quant) by which a reader of received rows quantizes them, or None."""
    if user.target is quantizations.group_quant:
        _, group_size, min_amax, arithmetic = user.args
        return group_size, _sorted({"min_amax": min_amax, **arithmetic.arguments()})
    if user.target is QUANTIZE:
        keywords = dict(user.kwargs)
        layout = keywords.pop("scale_layout", "row_major")
        return (user.args[1], _sorted(keywords)) if layout == "row_major" else None
    if user.target is FUSED_MOE and user.args[0] is rows and user.args.count(rows) == 1:
        codes = user.args[1].meta["val"].dtype is FP8
        keywords = {name: user.kwargs[name] for name in _HOW if name in user.kwargs}
        return (BLOCK, _sorted(keywords)) if codes and rows not in user.kwargs.values() else None
    return None


def _sorted(keywords: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Without what is the default anyway, so that two ways of saying the same are equal."""
    defaults = custom_ops.ops()["group_quant"].defaults
    return tuple(sorted((k, v) for k, v in keywords.items() if v != defaults[k]))


def _objection(rows: fx.Node, found: list[Any]) -> str | None:
    for user, how in zip(_readers(rows), found, strict=True):
        if how is None:
            return f"{user.name} reads the received rows as they are, so they have to be sent"
    if len(set(found)) > 1:
        return "its readers quantize the received rows in different ways"
    (group_size, keywords), width = found[0], shape_of(rows)[-1]
    if group_size not in GROUP_SIZES:
        return f"it quantizes {group_size} channels at a time; supported: {', '.join(map(str, GROUP_SIZES))}"
    if index_map.divide(width, group_size) is None:
        return f"rows of {width} channels are no whole number of groups of {group_size}"
    if any(isinstance(value, fx.Node) for _, value in keywords):
        return "how it quantizes is known only at run time"
    return None


def _only_reference(dispatch: fx.Node, how: Any) -> str | None:
    if settings.current().allow_reference or _implementation(dispatch.args[0], how) != "reference":
        return None
    return "group_quant has no fused implementation here; FUSION_PASSES_ALLOW_REFERENCE=1 would use the reference"


def _rewrite(graph: fx.Graph, dispatch: fx.Node, rows: fx.Node, how: Any) -> Site:
    """In place: the node stays, for the number of rows that it receives is bound to it."""
    group_size, keywords = how
    x, dtype = dispatch.args[0], rows.meta["val"].dtype
    with graph.inserting_before(dispatch):
        quantized = graph.call_function(QUANTIZE, (x, group_size), dict(keywords))
        codes, scale = (
            graph.call_function(operator.getitem, (quantized, index)) for index in range(2)
        )
    dispatch.update_arg(0, codes)
    dispatch.update_arg(1, scale)
    received = _item(dispatch, 1)
    if received is None:
        with graph.inserting_after(rows):
            received = graph.call_function(operator.getitem, (dispatch, 1))
    with torch_internals.fake_mode_of(graph):
        quantized.meta["val"] = QUANTIZE(x.meta["val"], group_size, **dict(keywords))
        for index, node in enumerate((codes, scale)):
            node.meta["val"] = quantized.meta["val"][index]
        sent = [node.meta["val"] for node in (codes, scale)]
        old = rows.meta["val"]
        values = [old.new_empty((old.shape[0], s.shape[1]), dtype=s.dtype) for s in sent]
    rows.meta["val"], received.meta["val"] = values
    dispatch.meta["val"] = (*values, *dispatch.meta["val"][2:])
    for node in (quantized, codes, scale, received):
        for key in ("stack_trace", "nn_module_stack"):
            if key in dispatch.meta:
                node.meta[key] = dispatch.meta[key]
    for user in _readers(rows):
        if user.target is FUSED_MOE:
            user.update_kwarg("hidden_scale", received)
            user.update_kwarg("out_dtype", dtype)
        else:
            for item in list(user.users):
                item.replace_all_uses_with((rows, received)[item.args[1]])
    torch_internals.tidy(graph)
    width: Any = shape_of(codes)[-1]
    # sent and received: two bytes of a channel before, one and a part of a scale after
    groups: Any = index_map.divide(width, group_size)
    saved = 2 * shape_of(rows)[0] * (width - 4 * groups)
    return Site(
        NAME,
        module_path(dispatch),
        pattern=f"group_quant of {group_size} channels",
        implementations=(f"group_quant:{_implementation(x, how)}",),
        sizes={"num_rows": str(shape_of(rows)[0]), "hidden_size": str(width)},
        bytes_saved=str(saved),
        bytes_saved_here=torch_internals.size_hint(saved, graph),
    )


def _implementation(x: fx.Node, how: tuple[int, tuple[tuple[str, Any], ...]]) -> str:
    group_size, keywords = how
    choice = custom_ops.ops()["group_quant"].choose(x.meta["val"], group_size, **dict(keywords))
    assert choice.implementation is not None
    return choice.implementation.name


def _readers(rows: fx.Node) -> list[fx.Node]:
    """Who reads the values, and not only how many rows there are."""
    return [user for user in rows.users if user.target is not torch.ops.aten.sym_size.int]


def _item(node: fx.Node, index: int) -> fx.Node | None:
    """The element of a node with several results, if anything reads it."""
    return next((user for user in node.users if user.args[1] == index), None)


FUSION = Fusion(
    name=NAME,
    summary="tokens quantized before they go to the ranks of their experts",
    stage=1,
    transform=_transform,
)
