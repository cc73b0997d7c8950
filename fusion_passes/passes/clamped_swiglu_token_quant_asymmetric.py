"""Gpt-oss's clamped SwiGLU and int8 with a zero point per token of its output as one op.

token_quant_asymmetric(clamped_swiglu(gate, up))
    ->   q, scale, zero_point = clamped_swiglu_token_quant_asymmetric(gate, up, alpha, limit)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import CLAMPED_SWIGLU, TOKEN_QUANT_ASYMMETRIC, quantizing

FUSION = quantizing(
    CLAMPED_SWIGLU,
    TOKEN_QUANT_ASYMMETRIC,
    "clamped SwiGLU and per-token int8 with zero points",
    priority=2,
)
