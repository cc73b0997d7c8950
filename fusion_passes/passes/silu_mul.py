"""SiLU of the gate times the up projection as one kernel.

silu(gate) * up   ->   silu_mul(gate, up)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import SILU_MUL, producing

FUSION = producing(SILU_MUL, "SiLU and multiply", priority=-1)
