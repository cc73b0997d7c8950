"""Shared experts on a second stream, beside the routed ones.

    y = fused_moe(x, ...)
    z = linear(silu(linear(x, gate)) * linear(x, up), down)

        ->   y, z = fused_moe_and_shared(x, ..., gate, up, down)

What that can win is the time in which the routed experts leave memory idle: while the ids are sorted, between kernels,
at their ends, and all of it where they are few. So by default it is done up to MOST_TOKENS tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx

from fusion_passes import settings
from fusion_passes.canonical import meanings
from fusion_passes.experts.reading import Unlike, aten, only_reader, strip
from fusion_passes.fusion import Fusion
from fusion_passes.operations import is_tensor, module_path, shape_of
from fusion_passes.places import Place
from fusion_passes.reporting import NearMiss
from fusion_passes.rewriting import Rewrite

NAME = "fused_moe_and_shared"
MOST_TOKENS = 16
_ROUTED = ("hidden_states", "gate_up", "down", "topk_weights", "topk_ids")
_UNKNOWN = ("hidden_scale", "out_dtype")


class _Shared(NamedTuple):
    """The products of shared experts, what is between them, and the result: the last product, or a view of it."""

    gate: fx.Node
    up: fx.Node
    down: fx.Node
    between: fx.Node
    views: tuple[fx.Node, ...] = ()

    @property
    def output(self) -> fx.Node:
        return (self.down, *self.views)[-1]

    def after(self, node: fx.Node) -> _Shared:
        """With the views that are taken before a node runs: they have to follow it."""
        found = self
        while len(found.output.users) == 1:
            (user,) = found.output.users
            if not user < node or strip(user) is not self.down:
                break
            found = found._replace(views=(*found.views, user))
        return found


def _product_of(node: Any, x: fx.Node) -> fx.Node | None:
    """The product that a value is, if it multiplies x."""
    node = strip(node) if is_tensor(node) else node
    found = is_tensor(node) and node.target is aten.mm.default and strip(node.args[0]) is x
    return node if found else None


def _shared_experts(between: fx.Node, x: fx.Node) -> _Shared | None:
    """The experts that all tokens go through, from what is between their products."""
    if between.target is not meanings.silu_mul:
        return None
    gate, up = (_product_of(operand, x) for operand in between.args)
    if gate is None or up is None or gate is up:
        return None
    try:
        down = only_reader(between)
    except Unlike:
        return None
    if down.target is not aten.mm.default or strip(down.args[0]) is not between:
        return None
    return _Shared(gate, up, down, between)


def _find(graph: fx.Graph) -> Iterator[Place | NearMiss]:
    for routed in graph.find_nodes(
        op="call_function", target=torch.ops.custom_ops.fused_moe.default
    ):
        x = strip(routed.args[0])
        for between in graph.find_nodes(op="call_function", target=meanings.silu_mul):
            shared = _shared_experts(between, x)
            if shared is None:
                continue
            shared = shared.after(routed)
            reason = _objection(routed, shared)
            if reason is not None:
                yield NearMiss(NAME, module_path(routed), routed.name, reason)
                continue
            yield _place(graph, routed, shared)
            break


def _objection(routed: fx.Node, shared: _Shared) -> str | None:
    tokens = shape_of(routed.args[0])[0]
    if any(routed.kwargs.get(name) is not None for name in _UNKNOWN):
        return "the tokens are quantized already, and shared experts here are not"
    if any(user < routed for user in shared.output.users):
        return (
            f"{shared.output.name}, the shared experts' result, is read before the routed ones run"
        )
    if settings.current().by_default(NAME):
        if not isinstance(tokens, int):
            return "how many tokens there are is known only at run time"
        if tokens > MOST_TOKENS:
            return f"there are {tokens} tokens; by default, up to {MOST_TOKENS} go on two streams"
    return None


def _place(graph: fx.Graph, routed: fx.Node, shared: _Shared) -> Place:
    inputs: dict[str, fx.Node] = dict(zip(_ROUTED, routed.args))
    inputs |= {name: value for name, value in routed.kwargs.items() if is_tensor(value)}
    inputs |= {f"shared_{name}": getattr(shared, name).args[1] for name in ("gate", "up", "down")}
    experts = shape_of(routed.args[1])[0]
    return Place(
        FUSION,
        graph,
        "gate and up apart",
        [routed, shared.output],
        [shared.between, shared.gate, shared.up, *(shared.down, *shared.views)[:-1]],
        inputs,
        {"num_tokens": shape_of(routed.args[0])[0]},
        limits={inputs["topk_ids"]: experts} if isinstance(experts, int) else {},
        constants={
            "keywords": {
                name: value for name, value in routed.kwargs.items() if not is_tensor(value)
            }
        },
    )


def _rewrite(m: Rewrite) -> tuple[Any, ...]:
    inputs = m.match.inputs
    weights = [
        m.emit(aten.permute.default, inputs[f"shared_{name}"], [1, 0])
        for name in ("gate", "up", "down")
    ]
    tensors = {
        name: node
        for name, node in inputs.items()
        if name not in _ROUTED and not name.startswith("shared_")
    }
    both = m.call(
        NAME,
        *(inputs[name] for name in _ROUTED),
        *weights,
        **m.constants["keywords"],
        **tensors,
    )
    return m.outputs_of(both, 2)


FUSION = Fusion(
    name=NAME,
    summary="shared experts on a second stream, beside the routed ones",
    stage=1,
    priority=-3,  # what became of the routed experts is known then
    find=_find,
    rewrite=_rewrite,
)
