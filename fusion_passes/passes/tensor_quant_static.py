"""Quantization by a given scale alone: where no kernel fuses with what makes its input, such as attention.

float, div, clamp, cast   ->   tensor_quant_static(x, scale)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import TENSOR_QUANT_STATIC, quantizing

FUSION = quantizing(None, TENSOR_QUANT_STATIC, "static quantization", priority=-1)
