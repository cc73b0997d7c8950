"""GELU-mul (tanh) and the per-token quantization of its output as one op.

token_quant(gelu_tanh(gate) * up)   ->   q, scale = gelu_tanh_mul_token_quant(gate, up)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import GELU_TANH_MUL, TOKEN_QUANT, quantizing

FUSION = quantizing(
    GELU_TANH_MUL, TOKEN_QUANT, "GELU (tanh), multiply and per-token quantization", priority=2
)
