"""Residual addition, RMSNorm and the per-token quantization of its output as one op.

    token_quant(rms_norm(h := x + residual, ...))   ->   q, scale, h = add_rms_norm_token_quant(x, residual, ...)

The sum is rounded before the norm reads it, as eager does, and is live or dead: both are the same fusion.
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import ADD_RMS_NORM, TOKEN_QUANT, quantizing

FUSION = quantizing(
    ADD_RMS_NORM, TOKEN_QUANT, "residual add, RMSNorm and per-token quantization", priority=3
)
