"""RMSNorm as one kernel.

float, pow, mean, add eps, rsqrt, mul, cast, mul weight   ->   rms_norm(x, weight, eps)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import RMS_NORM, producing

FUSION = producing(RMS_NORM, "RMSNorm", priority=-2)
