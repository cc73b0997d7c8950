"""RMSNorm and the group quantization of its output as one op.

group_quant(rms_norm(x, weight, eps), group_size)   ->   q, scale = rms_norm_group_quant(x, weight, eps, group_size)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import GROUP_QUANT, RMS_NORM, quantizing

FUSION = quantizing(RMS_NORM, GROUP_QUANT, "RMSNorm and group quantization", priority=2)
