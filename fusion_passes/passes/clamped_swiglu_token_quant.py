"""Clamped SwiGLU and the per-token quantization of its output as one op.

token_quant(clamped_swiglu(gate, up))   ->   q, scale = clamped_swiglu_token_quant(gate, up, alpha, limit)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import CLAMPED_SWIGLU, TOKEN_QUANT, quantizing

FUSION = quantizing(
    CLAMPED_SWIGLU, TOKEN_QUANT, "clamped SwiGLU and per-token quantization", priority=2
)
