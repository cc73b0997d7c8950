"""RMSNorm and the quantization by a given scale of its output as one op.

tensor_quant_static(rms_norm(x, weight, eps), scale)   ->   q = rms_norm_tensor_quant_static(x, weight, eps, scale)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import RMS_NORM, TENSOR_QUANT_STATIC, quantizing

FUSION = quantizing(RMS_NORM, TENSOR_QUANT_STATIC, "RMSNorm and static quantization", priority=2)
