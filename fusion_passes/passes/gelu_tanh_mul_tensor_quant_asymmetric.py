"""GELU-mul (tanh) and int8 with a zero point per tensor of its output as one op.

    tensor_quant_asymmetric(gelu_tanh(gate) * up)
        ->   q, scale, zero_point = gelu_tanh_mul_tensor_quant_asymmetric(gate, up)

Two kernels: the scale is known only when all values are, and the second finds them in the cache.
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import GELU_TANH_MUL, TENSOR_QUANT_ASYMMETRIC, quantizing

FUSION = quantizing(
    GELU_TANH_MUL,
    TENSOR_QUANT_ASYMMETRIC,
    "GELU (tanh), multiply and per-tensor int8 with zero points",
    priority=2,
)
