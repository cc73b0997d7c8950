"""RMSNorm and int8 with a zero point per token of its output as one op.

token_quant_asymmetric(rms_norm(x, weight, eps))
    ->   q, scale, zero_point = rms_norm_token_quant_asymmetric(x, weight, eps)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import RMS_NORM, TOKEN_QUANT_ASYMMETRIC, quantizing

FUSION = quantizing(
    RMS_NORM, TOKEN_QUANT_ASYMMETRIC, "RMSNorm and per-token int8 with zero points", priority=2
)
