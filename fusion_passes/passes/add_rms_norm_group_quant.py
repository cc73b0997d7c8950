"""Residual addition, RMSNorm and the group quantization of its output as one kernel.

    h = x + residual; group_quant(rms_norm(h, weight, eps))   ->   q, scale, h = add_rms_norm_group_quant(...)

The sum is rounded before the norm reads it, as eager does, and is live or dead: both are the same fusion.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor as T

from fusion_passes.fusion import Fusion
from fusion_passes.passes import _common
from fusion_passes.rewriting import Rewrite


def _meaning(
    x: T,
    residual: T,
    weight: T,
    eps: float,
    group_size: int,
    min_amax: float,
    norm: Callable[..., T],
) -> tuple[T, T, T]:
    total = x + residual
    return *_common.quantized(norm(total, weight, eps), group_size, min_amax), total


def _rewrite(m: Rewrite) -> tuple[object, ...]:
    tensors = tuple(m.tensor(name) for name in ("x", "residual", "weight"))
    quantization = _common.quant_arguments(m)
    mode = m.constants["weight_mode"]
    node = m.call(
        "add_rms_norm_group_quant",
        *tensors,
        m.scalar("eps"),
        m.size("group_size"),
        weight_mode=mode,
        **quantization,
    )
    return m.outputs_of(node, 3)


FUSION = Fusion(
    name="add_rms_norm_group_quant",
    summary="residual add, RMSNorm and FP8 group quantization",
    stage=3,
    priority=3,
    patterns=_common.norm_patterns(
        "add_rms_norm_group_quant",
        _meaning,
        {"x": _common.QUANTIZED, "residual": _common.QUANTIZED},
        _common.GROUP,
    ),
    rewrite=_rewrite,
    constraints=(_common.SUPPORTED_GROUPS, _common.FINITE_MIN_AMAX),
    # stock: the sum and the norm are one kernel and the quantization another, as their reductions differ
    bytes_before="num_tokens*num_groups*(11*group_size + 4)",
    bytes_after="num_tokens*num_groups*(7*group_size + 4)",
)
