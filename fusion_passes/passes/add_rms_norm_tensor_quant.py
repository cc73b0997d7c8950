"""Residual addition, RMSNorm and the dynamic per-tensor quantization of its output as one op.

    tensor_quant(rms_norm(h := x + residual, ...))   ->   q, scale, h = add_rms_norm_tensor_quant(x, residual, ...)

The sum is rounded before the norm reads it, as eager does, and is live or dead: both are the same fusion.
Two kernels: the scale is known only when all values are, and the second finds them in the cache.
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import ADD_RMS_NORM, TENSOR_QUANT, quantizing

FUSION = quantizing(
    ADD_RMS_NORM, TENSOR_QUANT, "residual add, RMSNorm and per-tensor quantization", priority=3
)
