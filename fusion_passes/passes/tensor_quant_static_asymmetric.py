"""Quantization to int8 with one scale and one zero point for a tensor, given: alone.

mul, round, add, clamp, cast   ->   tensor_quant_static_asymmetric(x, scale, zero_point)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import TENSOR_QUANT_STATIC_ASYMMETRIC, quantizing

FUSION = quantizing(
    None, TENSOR_QUANT_STATIC_ASYMMETRIC, "static int8 quantization with zero points", priority=-1
)
