"""The router of DeepSeek-V2 and -V3 as one kernel: the best experts of the best groups of experts.

sigmoid | softmax (+ bias), best groups, the others masked, topk (/ sum, * scale, cast)   ->   grouped_topk(logits, ...)
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from fusion_passes.experts import routers
from fusion_passes.fusion import Fusion
from fusion_passes.places import Place
from fusion_passes.reporting import NearMiss


def _find(graph: fx.Graph) -> Iterable[Place | NearMiss]:
    return routers.find(FUSION, graph)


FUSION = Fusion(
    name="grouped_topk",
    summary="top-k experts of the best groups, of a router",
    stage=1,
    priority=0,  # after fused_moe, which reads weights and ids wherever they are written to first
    find=_find,
    rewrite=routers.rewrite,
    # stock: the scores are written and read by top-k, and so is what comes after it
    bytes_before="44*num_tokens*num_experts + 40*num_tokens*top_k",
    bytes_after="4*num_tokens*num_experts + 12*num_tokens*top_k",
)
