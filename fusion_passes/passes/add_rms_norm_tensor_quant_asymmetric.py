"""Residual addition, RMSNorm and int8 with a zero point per tensor of its output as one op.

    tensor_quant_asymmetric(rms_norm(h := x + residual, ...))
        ->   q, scale, zero_point, h = add_rms_norm_tensor_quant_asymmetric(x, residual, ...)

The sum is rounded before the norm reads it, as eager does, and is live or dead: both are the same fusion.
Two kernels: the scale is known only when all values are, and the second finds them in the cache.
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import ADD_RMS_NORM, TENSOR_QUANT_ASYMMETRIC, quantizing

FUSION = quantizing(
    ADD_RMS_NORM,
    TENSOR_QUANT_ASYMMETRIC,
    "residual add, RMSNorm and per-tensor int8 with zero points",
    priority=3,
)
