"""The experts of a mixture of experts as one op, whichever implementation of them the model was given.

    sort, count, gather, grouped product, activation, grouped product, top-k weights, un-permute, sum
    a matrix for each pair, bmm, activation, bmm, top-k weights, sum

        ->   fused_moe(hidden_states, gate_up, down, topk_weights, topk_ids, ...)

The router stays as it is: it is the subject of `topk_softmax`, `topk_sigmoid` and `grouped_topk`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fusion_passes.experts import block
from fusion_passes.fusion import Fusion
from fusion_passes.places import Place
from fusion_passes.reporting import NearMiss
from fusion_passes.rewriting import Rewrite


def _find(graph: fx.Graph) -> Iterable[Place | NearMiss]:
    return block.find(FUSION, graph)


def _rewrite(m: Rewrite) -> tuple[Any, ...]:
    inputs, constants = m.match.inputs, m.match.constants
    tokens, top_k, hidden_size = (m.size(n) for n in ("num_tokens", "top_k", "hidden_size"))
    weights = [
        m.emit(torch.ops.aten.permute.default, inputs[name], [0, 2, 1])
        if constants["transposed"][name]
        else inputs[name]
        for name in ("gate_up", "down")
    ]
    topk_weights = inputs["topk_weights"]
    if constants["exact_weights"] and topk_weights.meta["val"].dtype is not torch.float32:
        topk_weights = m.cast(topk_weights, torch.float32)
    optional = ("gate_up_bias", "down_bias", "gate_up_scale", "down_scale")
    return (
        m.call(
            "fused_moe",
            m.view(inputs["hidden_states"], (tokens, hidden_size)),
            *weights,
            m.view(topk_weights, (tokens, top_k)),
            m.view(inputs["topk_ids"], (tokens, top_k)),
            **constants["keywords"],
            **{name: inputs[name] for name in optional if name in inputs},
        ),
    )


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
    # and FP8 weights in 16 bits.
    bytes_before=f"2*{_PAIRS}*(4*hidden_size + 2*up_features + 2*intermediate_size) + 4*num_tokens*hidden_size"
    " + 4*copied_weights + 5*dequantized_weights",
    bytes_after=f"2*{_PAIRS}*(3*hidden_size + 2*intermediate_size) + 2*num_tokens*hidden_size"
    " + dequantized_weights",
)
