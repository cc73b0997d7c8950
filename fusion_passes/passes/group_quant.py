"""Group quantization alone: where no kernel fuses with what makes its input, such as attention.

float, abs, amax, clamp, div, div, clamp, cast   ->   group_quant(x, group_size)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import GROUP_QUANT, quantizing

FUSION = quantizing(None, GROUP_QUANT, "group quantization", priority=-1)
