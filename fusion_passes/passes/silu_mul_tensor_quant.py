"""SiLU-mul and the dynamic per-tensor quantization of its output as one op.

    tensor_quant(silu(gate) * up)   ->   q, scale = silu_mul_tensor_quant(gate, up)

Two kernels: the scale is known only when all values are, and the second finds them in the cache.
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import SILU_MUL, TENSOR_QUANT, quantizing

FUSION = quantizing(
    SILU_MUL, TENSOR_QUANT, "SiLU, multiply and per-tensor quantization", priority=2
)
