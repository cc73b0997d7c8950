"""RMSNorm and the per-token quantization of its output as one op.

token_quant(rms_norm(x, weight, eps))   ->   q, scale = rms_norm_token_quant(x, weight, eps)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import RMS_NORM, TOKEN_QUANT, quantizing

FUSION = quantizing(RMS_NORM, TOKEN_QUANT, "RMSNorm and per-token quantization", priority=2)
