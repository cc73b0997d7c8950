"""Clamped SwiGLU and int8 with a zero point per tensor of its output as one op.

    tensor_quant_asymmetric(clamped_swiglu(gate, up))
        ->   q, scale, zero_point = clamped_swiglu_tensor_quant_asymmetric(gate, up, ...)

Two kernels: the scale is known only when all values are, and the second finds them in the cache.
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import CLAMPED_SWIGLU, TENSOR_QUANT_ASYMMETRIC, quantizing

FUSION = quantizing(
    CLAMPED_SWIGLU,
    TENSOR_QUANT_ASYMMETRIC,
    "clamped SwiGLU and per-tensor int8 with zero points",
    priority=2,
)
