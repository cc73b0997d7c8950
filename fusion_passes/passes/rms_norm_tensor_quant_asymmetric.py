"""RMSNorm and int8 with a zero point per tensor of its output as one op.

    tensor_quant_asymmetric(rms_norm(x, weight, eps))
        ->   q, scale, zero_point = rms_norm_tensor_quant_asymmetric(x, weight, eps)

Two kernels: the scale is known only when all values are, and the second finds them in the cache.
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import RMS_NORM, TENSOR_QUANT_ASYMMETRIC, quantizing

FUSION = quantizing(
    RMS_NORM, TENSOR_QUANT_ASYMMETRIC, "RMSNorm and per-tensor int8 with zero points", priority=2
)
