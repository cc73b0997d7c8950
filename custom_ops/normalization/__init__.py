"""RMSNorm, alone, with the residual addition before it and with the quantization after it."""

from custom_ops.normalization.ops import (
    add_rms_norm,
    add_rms_norm_and_group_quant,
    add_rms_norm_and_token_quant,
    add_rms_norm_group_quant,
    add_rms_norm_tensor_quant,
    add_rms_norm_tensor_quant_static,
    add_rms_norm_token_quant,
    add_rms_norm_token_quant_asymmetric,
    rms_norm,
    rms_norm_and_group_quant,
    rms_norm_and_token_quant,
    rms_norm_group_quant,
    rms_norm_tensor_quant,
    rms_norm_tensor_quant_static,
    rms_norm_token_quant,
    rms_norm_token_quant_asymmetric,
)

__all__ = [
    "add_rms_norm",
    "add_rms_norm_and_group_quant",
    "add_rms_norm_and_token_quant",
    "add_rms_norm_group_quant",
    "add_rms_norm_tensor_quant",
    "add_rms_norm_tensor_quant_static",
    "add_rms_norm_token_quant",
    "add_rms_norm_token_quant_asymmetric",
    "rms_norm",
    "rms_norm_and_group_quant",
    "rms_norm_and_token_quant",
    "rms_norm_group_quant",
    "rms_norm_tensor_quant",
    "rms_norm_tensor_quant_static",
    "rms_norm_token_quant",
    "rms_norm_token_quant_asymmetric",
]
