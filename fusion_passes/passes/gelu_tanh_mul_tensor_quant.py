"""GELU-mul (tanh) and the dynamic per-tensor quantization of its output as one op.

    tensor_quant(gelu_tanh(gate) * up)   ->   q, scale = gelu_tanh_mul_tensor_quant(gate, up)

Two kernels: the scale is known only when all values are, and the second finds them in the cache.
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import GELU_TANH_MUL, TENSOR_QUANT, quantizing

FUSION = quantizing(
    GELU_TANH_MUL, TENSOR_QUANT, "GELU (tanh), multiply and per-tensor quantization", priority=2
)
