"""RMSNorm and the group quantization of its output as one kernel.

    group_quant(rms_norm(x, weight, eps))   ->   rms_norm_group_quant(x, weight, eps)

The norm's output must have no other reader: it is never written.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor as T

from fusion_passes.fusion import Fusion
from fusion_passes.passes import _common
from fusion_passes.rewriting import Rewrite


def _meaning(
    x: T, weight: T, eps: float, group_size: int, min_amax: float, norm: Callable[..., T]
) -> tuple[T, T]:
    return _common.quantized(norm(x, weight, eps), group_size, min_amax)


def _rewrite(m: Rewrite) -> tuple[object, ...]:
    arguments = (m.tensor("x"), m.tensor("weight"), m.scalar("eps"), m.size("group_size"))
    quantization = _common.quant_arguments(m)
    node = m.call(
        "rms_norm_group_quant", *arguments, weight_mode=m.constants["weight_mode"], **quantization
    )
    return m.outputs_of(node, 2)


FUSION = Fusion(
    name="rms_norm_group_quant",
    summary="RMSNorm and FP8 group quantization",
    stage=3,
    priority=2,
    patterns=_common.norm_patterns(
        "rms_norm_group_quant", _meaning, {"x": _common.QUANTIZED}, _common.GROUP
    ),
    rewrite=_rewrite,
    constraints=(_common.SUPPORTED_GROUPS, _common.FINITE_MIN_AMAX),
    # stock: the norm is one kernel and the quantization another, as their reductions differ
    bytes_before="num_tokens*num_groups*(7*group_size + 4)",
    bytes_after="num_tokens*num_groups*(3*group_size + 4)",
)
