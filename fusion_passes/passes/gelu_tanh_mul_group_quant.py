"""GELU-mul (tanh) and the group quantization of its output as one op.

group_quant(gelu_tanh(gate) * up, group_size)   ->   q, scale = gelu_tanh_mul_group_quant(gate, up, group_size)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import GELU_TANH_MUL, GROUP_QUANT, quantizing

FUSION = quantizing(
    GELU_TANH_MUL, GROUP_QUANT, "GELU (tanh), multiply and group quantization", priority=2
)
