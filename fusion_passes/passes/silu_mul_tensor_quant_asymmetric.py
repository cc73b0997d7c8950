"""SiLU-mul and int8 with a zero point per tensor of its output as one op.

    tensor_quant_asymmetric(silu(gate) * up)
        ->   q, scale, zero_point = silu_mul_tensor_quant_asymmetric(gate, up)

Two kernels: the scale is known only when all values are, and the second finds them in the cache.
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import SILU_MUL, TENSOR_QUANT_ASYMMETRIC, quantizing

FUSION = quantizing(
    SILU_MUL,
    TENSOR_QUANT_ASYMMETRIC,
    "SiLU, multiply and per-tensor int8 with zero points",
    priority=2,
)
