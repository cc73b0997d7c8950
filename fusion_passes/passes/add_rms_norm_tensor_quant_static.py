"""Residual addition, RMSNorm and the quantization by a given scale of its output as one op.

    tensor_quant_static(rms_norm(h := x + residual, ...), scale)   ->   q, h = add_rms_norm_tensor_quant_static(...)

The sum is rounded before the norm reads it, as eager does, and is live or dead: both are the same fusion.
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import ADD_RMS_NORM, TENSOR_QUANT_STATIC, quantizing

FUSION = quantizing(
    ADD_RMS_NORM,
    TENSOR_QUANT_STATIC,
    "residual add, RMSNorm and static quantization",
    priority=3,
)
