"""The residual addition and the RMSNorm that follows it as one kernel.

    h = x + residual; rms_norm(h, weight, eps)   ->   out, h = add_rms_norm(x, residual, weight, eps)

The sum is rounded before the norm reads it, as eager does, and is live or dead: both are the same fusion.
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import ADD_RMS_NORM, producing

FUSION = producing(ADD_RMS_NORM, "residual add and RMSNorm", priority=-1)
