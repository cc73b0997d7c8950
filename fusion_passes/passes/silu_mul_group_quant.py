"""SiLU-mul and the group quantization of its output as one kernel.

group_quant(silu(gate) * up)   ->   silu_mul_group_quant(gate, up)
"""

from __future__ import annotations

from torch import Tensor as T
from torch.nn.functional import silu

from fusion_passes.fusion import Fusion, Pattern
from fusion_passes.passes import _common
from fusion_passes.rewriting import Rewrite


def _meaning(gate: T, up: T, group_size: int, min_amax: float) -> tuple[T, T]:
    return _common.quantized(silu(gate) * up, group_size, min_amax)


def _rewrite(m: Rewrite) -> tuple[object, ...]:
    arguments = (m.tensor("gate"), m.tensor("up"), m.size("group_size"))
    return m.outputs_of(m.call("silu_mul_group_quant", *arguments, **_common.quant_arguments(m)), 2)


_INPUTS = {"gate": _common.QUANTIZED, "up": _common.QUANTIZED, **_common.GROUP}

FUSION = Fusion(
    name="silu_mul_group_quant",
    summary="SiLU, multiply and FP8 group quantization",
    stage=3,
    priority=2,
    patterns=(Pattern(_meaning, _INPUTS, name="silu_mul_group_quant"),),
    rewrite=_rewrite,
    constraints=(_common.SUPPORTED_GROUPS, _common.FINITE_MIN_AMAX),
    # stock writes the product and reads it again in most of the shapes measured
    bytes_before="num_tokens*num_groups*(9*group_size + 4)",
    bytes_after="num_tokens*num_groups*(5*group_size + 4)",
)
