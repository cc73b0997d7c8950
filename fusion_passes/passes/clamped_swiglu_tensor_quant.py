"""Clamped SwiGLU and the dynamic per-tensor quantization of its output as one op.

    tensor_quant(clamped_swiglu(gate, up))   ->   q, scale = clamped_swiglu_tensor_quant(gate, up, alpha, limit)

Two kernels: the scale is known only when all values are, and the second finds them in the cache.
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import CLAMPED_SWIGLU, TENSOR_QUANT, quantizing

FUSION = quantizing(
    CLAMPED_SWIGLU, TENSOR_QUANT, "clamped SwiGLU and per-tensor quantization", priority=2
)
