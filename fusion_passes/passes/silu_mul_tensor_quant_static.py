"""SiLU-mul and the quantization by a given scale of its output as one op.

tensor_quant_static(silu(gate) * up, scale)   ->   q = silu_mul_tensor_quant_static(gate, up, scale)
"""

from __future__ import annotations

from fusion_passes.passes._quantizing import SILU_MUL, TENSOR_QUANT_STATIC, quantizing

FUSION = quantizing(
    SILU_MUL, TENSOR_QUANT_STATIC, "SiLU, multiply and static quantization", priority=2
)
