"""SiLU-mul and the group quantization of its output as one op.

group_quant(silu(gate) * up, group_size)   ->   q, scale = silu_mul_group_quant(gate, up, group_size)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import GROUP_QUANT, SILU_MUL, quantizing

FUSION = quantizing(SILU_MUL, GROUP_QUANT, "SiLU, multiply and group quantization", priority=2)
