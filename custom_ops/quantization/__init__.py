"""Quantization to FP8 and int8: of activations per group, token and tensor, of weights per block."""

from custom_ops.quantization.asymmetric import (
    tensor_quant_asymmetric,
    tensor_quant_static_asymmetric,
    token_quant_asymmetric,
)
from custom_ops.quantization.block_quant import block_quant
from custom_ops.quantization.ops import (
    group_quant,
    tensor_quant,
    tensor_quant_static,
    token_quant,
)

__all__ = [
    "block_quant",
    "group_quant",
    "tensor_quant",
    "tensor_quant_asymmetric",
    "tensor_quant_static",
    "tensor_quant_static_asymmetric",
    "token_quant",
    "token_quant_asymmetric",
]
