"""SiLU-mul and the per-token quantization of its output as one op.

token_quant(silu(gate) * up)   ->   q, scale = silu_mul_token_quant(gate, up)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import SILU_MUL, TOKEN_QUANT, quantizing

FUSION = quantizing(SILU_MUL, TOKEN_QUANT, "SiLU, multiply and per-token quantization", priority=2)
