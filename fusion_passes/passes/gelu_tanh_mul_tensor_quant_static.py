"""GELU-mul (tanh) and the quantization by a given scale of its output as one op.

tensor_quant_static(gelu_tanh(gate) * up, scale)   ->   q = gelu_tanh_mul_tensor_quant_static(gate, up, scale)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import GELU_TANH_MUL, TENSOR_QUANT_STATIC, quantizing

FUSION = quantizing(
    GELU_TANH_MUL,
    TENSOR_QUANT_STATIC,
    "GELU (tanh), multiply and static quantization",
    priority=2,
)
