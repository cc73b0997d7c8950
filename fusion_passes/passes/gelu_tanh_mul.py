"""GELU (tanh) of the gate times the up projection as one kernel: the MLP of Gemma.

gelu(gate, approximate="tanh") * up   ->   gelu_tanh_mul(gate, up)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import GELU_TANH_MUL, producing

FUSION = producing(GELU_TANH_MUL, "GELU (tanh) and multiply", priority=-1)
