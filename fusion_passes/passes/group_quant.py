"""Group quantization on its own: where its input comes from something that no kernel fuses with, such as attention.

float, abs, amax, clamp, div, div, clamp, cast   ->   group_quant(x, group_size)
"""

from __future__ import annotations

from fusion_passes.fusion import Fusion, Pattern
from fusion_passes.passes import _common

FUSION = Fusion(
    name="group_quant",
    summary="quantize to FP8 per token and group",
    stage=3,
    priority=-1,
    patterns=(
        Pattern(_common.quantized, {"x": _common.QUANTIZED, **_common.GROUP}, name="group_quant"),
    ),
    rewrite=lambda m: m.outputs_of(
        m.call("group_quant", m.tensor("x"), m.size("group_size"), **_common.quant_arguments(m)), 2
    ),
    constraints=(_common.SUPPORTED_GROUPS, _common.FINITE_MIN_AMAX),
    bytes_before="num_tokens*num_groups*(3*group_size + 4)",
    bytes_after="num_tokens*num_groups*(3*group_size + 4)",
)
