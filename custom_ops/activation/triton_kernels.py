"""The gated activations in Triton, alone and with the quantization of what they return.

The kernels are those of `custom_ops.quantization.triton_kernels`, with the activation as a constant.
"""

from __future__ import annotations

from functools import partial

from custom_ops.quantization import asymmetric_triton
from custom_ops.quantization.triton_kernels import implementations_of, plain

silu_mul = partial(plain, "silu_mul")
(
    silu_mul_group_quant,
    silu_mul_token_quant,
    silu_mul_tensor_quant,
    silu_mul_tensor_quant_static,
) = implementations_of("silu_mul")
(
    silu_mul_token_quant_asymmetric,
    silu_mul_tensor_quant_asymmetric,
    silu_mul_tensor_quant_static_asymmetric,
) = asymmetric_triton.implementations_of("silu_mul")

gelu_tanh_mul = partial(plain, "gelu_tanh_mul")
(
    gelu_tanh_mul_group_quant,
    gelu_tanh_mul_token_quant,
    gelu_tanh_mul_tensor_quant,
    gelu_tanh_mul_tensor_quant_static,
) = implementations_of("gelu_tanh_mul")
(
    gelu_tanh_mul_token_quant_asymmetric,
    gelu_tanh_mul_tensor_quant_asymmetric,
    gelu_tanh_mul_tensor_quant_static_asymmetric,
) = asymmetric_triton.implementations_of("gelu_tanh_mul")

clamped_swiglu = partial(plain, "clamped_swiglu")
(
    clamped_swiglu_group_quant,
    clamped_swiglu_token_quant,
    clamped_swiglu_tensor_quant,
    clamped_swiglu_tensor_quant_static,
) = implementations_of("clamped_swiglu")
(
    clamped_swiglu_token_quant_asymmetric,
    clamped_swiglu_tensor_quant_asymmetric,
    clamped_swiglu_tensor_quant_static_asymmetric,
) = asymmetric_triton.implementations_of("clamped_swiglu")
