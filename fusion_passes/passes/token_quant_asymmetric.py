"""Quantization to int8 per token, with a scale and a zero point.

amin, amax, sub, div, clamp, div, round, ..., cast   ->   token_quant_asymmetric(x)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import TOKEN_QUANT_ASYMMETRIC, quantizing

FUSION = quantizing(
    None, TOKEN_QUANT_ASYMMETRIC, "per-token int8 quantization with zero points", priority=-1
)
