"""SiLU-mul and int8 by a given scale and zero point of its output as one op.

tensor_quant_static_asymmetric(silu(gate) * up, scale, zero_point)
    ->   q = silu_mul_tensor_quant_static_asymmetric(gate, up, scale, zero_point)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import SILU_MUL, TENSOR_QUANT_STATIC_ASYMMETRIC, quantizing

FUSION = quantizing(
    SILU_MUL,
    TENSOR_QUANT_STATIC_ASYMMETRIC,
    "SiLU, multiply and static int8 with zero points",
    priority=2,
)
