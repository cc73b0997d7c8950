"""Clamped SwiGLU and the quantization by a given scale of its output as one op.

tensor_quant_static(clamped_swiglu(gate, up), scale)   ->   q = clamped_swiglu_tensor_quant_static(gate, up, ...)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import CLAMPED_SWIGLU, TENSOR_QUANT_STATIC, quantizing

FUSION = quantizing(
    CLAMPED_SWIGLU,
    TENSOR_QUANT_STATIC,
    "clamped SwiGLU and quantization by a given scale",
    priority=2,
)
