"""Residual addition, RMSNorm and int8 by a given scale and zero point of its output as one op.

    tensor_quant_static_asymmetric(rms_norm(h := x + residual, ...), scale, zero_point)
        ->   q, h = add_rms_norm_tensor_quant_static_asymmetric(x, residual, ..., scale, zero_point)

The sum is rounded before the norm reads it, as eager does, and is live or dead: both are the same fusion.
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import (
    ADD_RMS_NORM,
    TENSOR_QUANT_STATIC_ASYMMETRIC,
    quantizing,
)

FUSION = quantizing(
    ADD_RMS_NORM,
    TENSOR_QUANT_STATIC_ASYMMETRIC,
    "residual add, RMSNorm and static int8 with zero points",
    priority=3,
)
