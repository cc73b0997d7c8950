"""Fused inference kernels as torch operators: `custom_ops.group_quant(x, 128)`.

Importing this package compiles nothing, does not initialise CUDA, and imports no optional package.
`custom_ops.explain(op, *args)` says which implementation of an op would run, and why not the others.
"""

from custom_ops.activation import (
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
    silu_mul_group_quant_masked,
    silu_mul_tensor_quant,
    silu_mul_tensor_quant_static,
    silu_mul_token_quant,
)
from custom_ops.gemm import block_scaled_mm, scaled_mm
from custom_ops.library import Unavailable, explain, ops
from custom_ops.normalization import (
    add_rms_norm,
    add_rms_norm_group_quant,
    add_rms_norm_tensor_quant,
    add_rms_norm_tensor_quant_static,
    add_rms_norm_token_quant,
    rms_norm,
    rms_norm_group_quant,
    rms_norm_tensor_quant,
    rms_norm_tensor_quant_static,
    rms_norm_token_quant,
)
from custom_ops.quantization import (
    block_quant,
    group_quant,
    tensor_quant,
    tensor_quant_static,
    token_quant,
    token_quant_asymmetric,
)
from custom_ops.scales import QuantSpec

__all__ = [
    "QuantSpec",
    "Unavailable",
    "add_rms_norm",
    "add_rms_norm_group_quant",
    "add_rms_norm_tensor_quant",
    "add_rms_norm_tensor_quant_static",
    "add_rms_norm_token_quant",
    "block_quant",
    "block_scaled_mm",
    "clamped_swiglu",
    "clamped_swiglu_group_quant",
    "clamped_swiglu_tensor_quant",
    "clamped_swiglu_tensor_quant_static",
    "clamped_swiglu_token_quant",
    "explain",
    "gelu_tanh_mul",
    "gelu_tanh_mul_group_quant",
    "gelu_tanh_mul_tensor_quant",
    "gelu_tanh_mul_tensor_quant_static",
    "gelu_tanh_mul_token_quant",
    "group_quant",
    "ops",
    "rms_norm",
    "rms_norm_group_quant",
    "rms_norm_tensor_quant",
    "rms_norm_tensor_quant_static",
    "rms_norm_token_quant",
    "scaled_mm",
    "silu_mul",
    "silu_mul_group_quant",
    "silu_mul_group_quant_masked",
    "silu_mul_tensor_quant",
    "silu_mul_tensor_quant_static",
    "silu_mul_token_quant",
    "tensor_quant",
    "tensor_quant_static",
    "token_quant",
    "token_quant_asymmetric",
]
