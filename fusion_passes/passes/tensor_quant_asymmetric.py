"""Quantization to int8 with one scale and one zero point for a tensor, found from it: alone.

amin, amax, sub, div, clamp, div, round, ..., cast   ->   tensor_quant_asymmetric(x)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import TENSOR_QUANT_ASYMMETRIC, quantizing

FUSION = quantizing(
    None, TENSOR_QUANT_ASYMMETRIC, "per-tensor int8 quantization with zero points", priority=-1
)
