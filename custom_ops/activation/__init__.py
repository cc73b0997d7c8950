"""Gated activations, alone and with the quantization of what they return."""

from custom_ops.activation.masked import silu_mul_group_quant_masked
from custom_ops.activation.ops import (
    clamped_swiglu,
    clamped_swiglu_group_quant,
    clamped_swiglu_tensor_quant,
    clamped_swiglu_tensor_quant_static,
    clamped_swiglu_token_quant,
    gelu_tanh_mul,
    gelu_tanh_mul_group_quant,
    gelu_tanh_mul_tensor_quant,
    gelu_tanh_mul_tensor_quant_static,
    gelu_tanh_mul_token_quant,
    silu_mul,
    silu_mul_group_quant,
    silu_mul_tensor_quant,
    silu_mul_tensor_quant_static,
    silu_mul_token_quant,
)

__all__ = [
    "clamped_swiglu",
    "clamped_swiglu_group_quant",
    "clamped_swiglu_tensor_quant",
    "clamped_swiglu_tensor_quant_static",
    "clamped_swiglu_token_quant",
    "gelu_tanh_mul",
    "gelu_tanh_mul_group_quant",
    "gelu_tanh_mul_tensor_quant",
    "gelu_tanh_mul_tensor_quant_static",
    "gelu_tanh_mul_token_quant",
    "silu_mul",
    "silu_mul_group_quant",
    "silu_mul_group_quant_masked",
    "silu_mul_tensor_quant",
    "silu_mul_tensor_quant_static",
    "silu_mul_token_quant",
]
