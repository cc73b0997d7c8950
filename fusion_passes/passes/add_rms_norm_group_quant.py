"""Residual addition, RMSNorm and the group quantization of its output as one op.

    group_quant(rms_norm(h := x + residual, ...), group_size)   ->   q, scale, h = add_rms_norm_group_quant(...)

The sum is rounded before the norm reads it, as eager does, and is live or dead: both are the same fusion.
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import ADD_RMS_NORM, GROUP_QUANT, quantizing

FUSION = quantizing(
    ADD_RMS_NORM, GROUP_QUANT, "residual add, RMSNorm and group quantization", priority=3
)
