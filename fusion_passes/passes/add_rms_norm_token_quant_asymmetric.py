"""Residual addition, RMSNorm and int8 with a zero point per token of its output as one op.

    token_quant_asymmetric(rms_norm(h := x + residual, ...))
        ->   q, scale, zero_point, h = add_rms_norm_token_quant_asymmetric(x, residual, ...)

The sum is rounded before the norm reads it, as eager does, and is live or dead: both are the same fusion.
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import ADD_RMS_NORM, TOKEN_QUANT_ASYMMETRIC, quantizing

FUSION = quantizing(
    ADD_RMS_NORM,
    TOKEN_QUANT_ASYMMETRIC,
    "residual add, RMSNorm and per-token int8 with zero points",
    priority=3,
)
