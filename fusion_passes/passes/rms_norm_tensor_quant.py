"""RMSNorm and the dynamic per-tensor quantization of its output as one op.

    tensor_quant(rms_norm(x, weight, eps))   ->   q, scale = rms_norm_tensor_quant(x, weight, eps)

Two kernels: the scale is known only when all values are, and the second finds them in the cache.
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import RMS_NORM, TENSOR_QUANT, quantizing

FUSION = quantizing(RMS_NORM, TENSOR_QUANT, "RMSNorm and per-tensor quantization", priority=2)
