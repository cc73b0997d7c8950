"""Tanh-GELU-mul and int8 with a zero point per token of its output as one op.

token_quant_asymmetric(gelu(gate, "tanh") * up)
    ->   q, scale, zero_point = gelu_tanh_mul_token_quant_asymmetric(gate, up)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import GELU_TANH_MUL, TOKEN_QUANT_ASYMMETRIC, quantizing

FUSION = quantizing(
    GELU_TANH_MUL,
    TOKEN_QUANT_ASYMMETRIC,
    "tanh-GELU, multiply and per-token int8 with zero points",
    priority=2,
)
