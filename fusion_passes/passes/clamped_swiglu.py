"""The clamped SwiGLU of gpt-oss as one kernel.

(up.clamp(-limit, limit) + 1) * (g * sigmoid(alpha * g)), g = gate.clamp(max=limit)   ->   clamped_swiglu(...)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import CLAMPED_SWIGLU, producing

FUSION = producing(CLAMPED_SWIGLU, "clamped SwiGLU", priority=-1)
