"""Logits in float32 of 16-bit operands, on the matrix units for 16 bits.

    linear(x.float(), weight.float())   ->   router_logits(x, weight)

As the routers of DeepSeek-V3 and many later models are written. Stock makes float32 copies of both and multiplies those
without matrix units, which at 4096 tokens takes a quarter of the block.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor as T

from fusion_passes.fusion import Constraint, Fusion, Pattern, Tensor
from fusion_passes.matching import Match

MOST_EXPERTS = 1024


def _linear(x: T, weight: T) -> T:
    return F.linear(x.float(), weight.float())


def _experts(match: Match) -> Any:
    return match.sizes["experts"]


def _few(match: Match) -> bool:
    experts = _experts(match)
    return isinstance(experts, int) and experts <= MOST_EXPERTS


def _measured_as(match: Match) -> dict[str, Any] | None:
    sizes = {"experts": _experts(match), "hidden": match.sizes["hidden_size"]}
    return sizes if all(isinstance(size, int) for size in sizes.values()) else None


FUSION = Fusion(
    name="router_logits",
    summary="float32 logits of a router from 16-bit operands",
    stage=2,
    patterns=(
        Pattern(
            _linear,
            {"x": Tensor("num_tokens", "hidden_size"), "weight": Tensor("experts", "hidden_size")},
            name="both widened",
        ),
    ),
    rewrite=lambda m: (m.call("router_logits", m.tensor("x"), m.tensor("weight")),),
    constraints=(
        Constraint(
            _few,
            lambda match: (
                f"there are {_experts(match)} outputs; a router's are known to be up to {MOST_EXPERTS}"
            ),
        ),
    ),
    allow_shared=True,  # a second cast of the tokens is another reader's, and costs it nothing
    needs="aten.mm.default",
    measured_as=_measured_as,
    # stock: both are copied in float32
    bytes_before="10*num_tokens*hidden_size + 10*experts*hidden_size + 4*num_tokens*experts",
    bytes_after="2*num_tokens*hidden_size + 2*experts*hidden_size + 4*num_tokens*experts",
)
