"""SiLU-mul and int8 with a zero point per token of its output as one op.

token_quant_asymmetric(silu(gate) * up)
    ->   q, scale, zero_point = silu_mul_token_quant_asymmetric(gate, up)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import SILU_MUL, TOKEN_QUANT_ASYMMETRIC, quantizing

FUSION = quantizing(
    SILU_MUL,
    TOKEN_QUANT_ASYMMETRIC,
    "SiLU, multiply and per-token int8 with zero points",
    priority=2,
)
