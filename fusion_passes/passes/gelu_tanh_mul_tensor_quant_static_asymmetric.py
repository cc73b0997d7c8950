"""GELU-mul (tanh) and int8 by a given scale and zero point of its output as one op.

tensor_quant_static_asymmetric(gelu_tanh(gate) * up, scale, zero_point)
    ->   q = gelu_tanh_mul_tensor_quant_static_asymmetric(gate, up, scale, zero_point)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import (
    GELU_TANH_MUL,
    TENSOR_QUANT_STATIC_ASYMMETRIC,
    quantizing,
)

FUSION = quantizing(
    GELU_TANH_MUL,
    TENSOR_QUANT_STATIC_ASYMMETRIC,
    "GELU (tanh), multiply and static int8 with zero points",
    priority=2,
)
