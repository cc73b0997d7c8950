"""RMSNorm as one kernel.

float, pow, mean, add eps, rsqrt, mul, cast, mul weight   ->   rms_norm(x, weight, eps)
"""

from __future__ import annotations

from fusion_passes.fusion import Fusion
from fusion_passes.passes import _common
from fusion_passes.rewriting import Rewrite


def _rewrite(m: Rewrite) -> tuple[object, ...]:
    mode = m.constants["weight_mode"]
    return (
        m.call("rms_norm", m.tensor("x"), m.tensor("weight"), m.scalar("eps"), weight_mode=mode),
    )


FUSION = Fusion(
    name="rms_norm",
    summary="RMSNorm",
    stage=3,
    priority=-2,
    patterns=_common.norm_patterns(
        "rms_norm", lambda x, weight, eps, norm: norm(x, weight, eps), {"x": _common.HIDDEN}
    ),
    rewrite=_rewrite,
    bytes_before="4*num_tokens*hidden_size",
    bytes_after="4*num_tokens*hidden_size",
)
