"""The experts of a mixture of experts as one op, whichever implementation of them the model was given.

    sort, count, gather, grouped product, activation, grouped product, top-k weights, un-permute, sum
    a matrix for each pair, bmm, activation, bmm, top-k weights, sum
    all tokens for each expert, bmm, activation, bmm, weights of which all but the top-k are 0, sum

        ->   fused_moe(hidden_states, gate_up, down, topk_weights, topk_ids, ...)

The router stays as it is: it is the subject of `topk_softmax`, `topk_sigmoid` and `grouped_topk`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fusion_passes.experts import block, dense, misses
from fusion_passes.experts.spread import Spread
from fusion_passes.fusion import Fusion
from fusion_passes.operations import shape_of
from fusion_passes.places import Place
from fusion_passes.reporting import NearMiss
from fusion_passes.rewriting import Rewrite

aten = torch.ops.aten


def _find(graph: fx.Graph) -> Iterable[Place | NearMiss]:
    found = [*block.find(FUSION, graph), *dense.find(FUSION, graph)]
    return found or misses.unproductive(FUSION, graph)


def _rewrite(m: Rewrite) -> tuple[Any, ...]:
    inputs, constants = m.match.inputs, m.match.constants
    tokens, top_k, hidden_size = (m.size(n) for n in ("num_tokens", "top_k", "hidden_size"))
    weights = {
        name: m.emit(aten.permute.default, inputs[name], [0, 2, 1])
        if constants["transposed"][name]
        else inputs[name]
        for name in ("gate_up", "down", "up")
        if name in inputs
    }
    if constants["spread"] is None:
        topk_weights, topk_ids = inputs["topk_weights"], inputs["topk_ids"]
    else:
        topk_weights, topk_ids = _of_the_chosen(m, constants["spread"])
    if topk_weights.meta["val"].dtype is not constants["weights_dtype"]:
        topk_weights = m.cast(topk_weights, constants["weights_dtype"])
    rows = m.view(inputs["hidden_states"], (tokens, hidden_size))
    topk_weights = m.view(topk_weights, (tokens, top_k))
    topk_ids = m.view(topk_ids, (tokens, top_k))
    before = constants["before"]
    if before is not None:
        rows, topk_weights, topk_ids = _pairs(m, rows, topk_weights, topk_ids, before.wide)
    optional = ("gate_up_bias", "down_bias", "gate_up_scale", "down_scale")
    out = m.call(
        "fused_moe",
        rows,
        weights["gate_up"],
        weights["down"],
        topk_weights,
        topk_ids,
        **constants["keywords"],
        **{name: inputs[name] for name in optional if name in inputs},
        **({"up": weights["up"]} if "up" in weights else {}),
    )
    if before is not None and top_k != 1:
        each = m.view(out, (tokens, top_k, hidden_size))
        out = m.emit(aten.sum.dim_IntList, each, [1])  # in float32, and rounded once
    return (out,)


def _of_the_chosen(m: Rewrite, spread: Spread) -> tuple[fx.Node, fx.Node]:
    """The top-k weights of a matrix of weights, made of what was written to it, and their ids."""
    weights = spread.written
    for node in spread.then:
        args = fx.node.map_arg(node.args, lambda _, now=weights: now)
        weights = m.emit(node.target, *args)
    return weights, spread.ids


def _pairs(
    m: Rewrite, x: fx.Node, weights: fx.Node, ids: fx.Node, wide: bool
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Pairs as tokens with one expert each, their rows multiplied by their weights, and weights of 1."""
    tokens, top_k, hidden_size = (m.size(n) for n in ("num_tokens", "top_k", "hidden_size"))
    dtype = x.meta["val"].dtype
    rows = m.view(x, (tokens, 1, hidden_size))
    if wide:
        rows = m.cast(rows, torch.float32)
    rows = m.emit(aten.mul.Tensor, rows, m.view(weights, (tokens, top_k, 1)))
    if wide:
        rows = m.cast(rows, dtype)
    ones = m.view(m.full(weights, shape_of(weights), 1.0), (tokens * top_k, 1))
    return m.view(rows, (tokens * top_k, hidden_size)), ones, m.view(ids, (tokens * top_k, 1))


_PAIRS = "num_tokens*top_k"

FUSION = Fusion(
    name="fused_moe",
    summary="the experts of a mixture of experts as one op",
    stage=1,
    priority=1,  # what it quantizes for itself is then no quantization to be shared
    find=_find,
    rewrite=_rewrite,
    # Both sides read the weights of the experts that are hit, and write and read the two results of pairs. Stock also
    # writes the rows in order and the first product before its activation, a matrix for each pair in the batched form,
    # and FP8 weights in 16 bits. In the dense form rows are of all tokens and experts (that all weights are read
    # there is not counted).
    bytes_before="2*multiplied_rows*(4*hidden_size + 2*up_features + 2*intermediate_size) + 4*num_tokens*hidden_size"
    " + 4*copied_weights + 5*dequantized_weights",
    bytes_after=f"2*{_PAIRS}*(3*hidden_size + 2*intermediate_size) + 2*num_tokens*hidden_size"
    " + dequantized_weights",
)
