"""Per-token quantization alone: where no kernel fuses with what makes its input, such as attention.

float, abs, amax, clamp, div, div, clamp, cast   ->   token_quant(x)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import TOKEN_QUANT, quantizing

FUSION = quantizing(None, TOKEN_QUANT, "per-token quantization", priority=-1)
