"""RMSNorm and int8 by a given scale and zero point of its output as one op.

tensor_quant_static_asymmetric(rms_norm(x, weight, eps), scale, zero_point)
    ->   q = rms_norm_tensor_quant_static_asymmetric(x, weight, eps, scale, zero_point)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import RMS_NORM, TENSOR_QUANT_STATIC_ASYMMETRIC, quantizing

FUSION = quantizing(
    RMS_NORM, TENSOR_QUANT_STATIC_ASYMMETRIC, "RMSNorm and static int8 with zero points", priority=2
)
