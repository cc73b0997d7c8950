"""The residual addition and the RMSNorm that follows it as one kernel.

    h = x + residual; rms_norm(h, weight, eps)   ->   out, h = add_rms_norm(x, residual, weight, eps)

The sum is rounded before the norm reads it, as eager does, and is live or dead: both are the same fusion.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor as T

from fusion_passes.fusion import Fusion
from fusion_passes.passes import _common
from fusion_passes.rewriting import Rewrite


def _meaning(x: T, residual: T, weight: T, eps: float, norm: Callable[..., T]) -> tuple[T, T]:
    total = x + residual
    return norm(total, weight, eps), total


def _rewrite(m: Rewrite) -> tuple[object, ...]:
    x, residual, weight = (m.tensor(name) for name in ("x", "residual", "weight"))
    mode = m.constants["weight_mode"]
    return m.outputs_of(
        m.call("add_rms_norm", x, residual, weight, m.scalar("eps"), weight_mode=mode), 2
    )


FUSION = Fusion(
    name="add_rms_norm",
    summary="residual add and RMSNorm",
    stage=3,
    priority=-1,
    patterns=_common.norm_patterns(
        "add_rms_norm", _meaning, {"x": _common.HIDDEN, "residual": _common.HIDDEN}
    ),
    rewrite=_rewrite,
    bytes_before="8*num_tokens*hidden_size",
    bytes_after="8*num_tokens*hidden_size",
)
