"""Experts on several ranks take their tokens in two halves: one travels while the other is computed.

    combine(experts(dispatch(x)))        for `overlap_from` tokens or more, of any rank

        ->   ep_fused_moe(x, split_from=overlap_from)

Each half is dispatched and combined by itself, on a stream, a buffer and a handle of its own, and each token keeps its
rows: so the results are those of the whole. It costs a second reading of the experts' weights.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from fusion_passes import settings
from fusion_passes.expert_parallel import blocks
from fusion_passes.fusion import Fusion
from fusion_passes.reporting import NearMiss, Site

NAME = "two_batch_overlap"


def _transform(graph: fx.Graph) -> Iterator[Site | NearMiss]:
    yield from blocks.sites(graph, NAME, {"split_from": settings.current().overlap_from})


FUSION = Fusion(
    name=NAME,
    summary="experts on several ranks in two batches: one travels while the other is computed",
    stage=1,
    priority=-2,  # after quantize_before_dispatch, which knows the three ops
    transform=_transform,
)
