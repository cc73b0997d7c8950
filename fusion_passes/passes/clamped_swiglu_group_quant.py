"""Clamped SwiGLU and the group quantization of its output as one op.

group_quant(clamped_swiglu(gate, up), group_size)   ->   q, scale = clamped_swiglu_group_quant(gate, up, ...)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import CLAMPED_SWIGLU, GROUP_QUANT, quantizing

FUSION = quantizing(
    CLAMPED_SWIGLU, GROUP_QUANT, "clamped SwiGLU and group quantization", priority=2
)
