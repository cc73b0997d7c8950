"""Clamped SwiGLU and int8 by a given scale and zero point of its output as one op.

tensor_quant_static_asymmetric(clamped_swiglu(gate, up), scale, zero_point)
    ->   q = clamped_swiglu_tensor_quant_static_asymmetric(gate, up, ..., scale, zero_point)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import (
    CLAMPED_SWIGLU,
    TENSOR_QUANT_STATIC_ASYMMETRIC,
    quantizing,
)

FUSION = quantizing(
    CLAMPED_SWIGLU,
    TENSOR_QUANT_STATIC_ASYMMETRIC,
    "clamped SwiGLU and static int8 with zero points",
    priority=2,
)
