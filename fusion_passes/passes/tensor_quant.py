"""Dynamic per-tensor quantization alone: where no kernel fuses with what makes its input, such as attention.

float, abs, amax, clamp, div, div, clamp, cast   ->   tensor_quant(x)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import TENSOR_QUANT, quantizing

FUSION = quantizing(None, TENSOR_QUANT, "per-tensor quantization", priority=-1)
