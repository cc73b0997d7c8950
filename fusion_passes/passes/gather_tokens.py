"""All tokens to all ranks, where nearly every token has experts on nearly every rank anyway.

    combine(experts(dispatch(x)))   ->   ep_fused_moe(x, exchange="gather")

With K of E experts drawn alike, a token has one on a rank of N with the chance 1 - C(E - E / N, K) / C(E, K): 0.998 for
two ranks and 8 of 64, where dispatching moves the same bytes as gathering and has tokens to count and to place besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import comb
from typing import Any

from torch import fx

from custom_ops.expert_parallel import buffers, groups
from fusion_passes import settings
from fusion_passes.expert_parallel import blocks
from fusion_passes.fusion import Fusion
from fusion_passes.reporting import NearMiss, Site

NAME = "gather_tokens"
LEAST_SHARE = 0.95
# By default: as many rows are gathered as a rank may have at most, however few it has, and up to here that takes no
# longer than to dispatch and combine a few (7168 wide on two H200: 78 us to 95).
MOST_ROWS = 256


def share(num_experts: int, ranks: int, top_k: int) -> float:
    """How many of the tokens have an expert on a rank, if all experts are alike."""
    elsewhere = num_experts - num_experts // ranks
    if top_k > elsewhere:
        return 1.0
    return 1 - comb(elsewhere, top_k) / comb(num_experts, top_k)


def _objection(node: fx.Node) -> str | None:
    dispatch: Any = node.args
    num_experts, group = dispatch[6:8] if blocks.is_whole(node) else dispatch[4:6]
    top_k = dispatch[2].meta["val"].shape[1]
    if not isinstance(top_k, int):
        return "how many experts a token has is known only at run time"
    ranks = groups.size(NAME, group)
    found = share(num_experts, ranks, top_k)
    if found < LEAST_SHARE:
        return f"a token has experts on {found:.2f} of the {ranks} ranks; gathered are those with {LEAST_SHARE}"
    if settings.current().by_default(NAME):
        most = node.kwargs.get("max_tokens", 0)
        if not 0 < most <= MOST_ROWS:
            return (
                f"max_tokens is {most}; by default, gathered are 1 to {MOST_ROWS} tokens of a rank"
            )
        if buffers.spans_hosts(ranks):
            return (
                "by default, tokens are gathered within a host; between hosts it was not measured"
            )
    return None


def _transform(graph: fx.Graph) -> Iterator[Site | NearMiss]:
    yield from blocks.sites(graph, NAME, {"exchange": "gather"}, _objection)


FUSION = Fusion(
    name=NAME,
    summary="all tokens to all ranks, where nearly every rank has experts of nearly every token",
    stage=1,
    priority=-1,  # after quantize_before_dispatch, which knows the three ops
    transform=_transform,
)
