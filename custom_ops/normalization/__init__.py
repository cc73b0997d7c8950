"""RMSNorm, alone, with the residual addition before it and with the group quantization after it."""

from custom_ops.normalization.ops import (
    add_rms_norm,
    add_rms_norm_group_quant,
    rms_norm,
    rms_norm_group_quant,
)

__all__ = ["add_rms_norm", "add_rms_norm_group_quant", "rms_norm", "rms_norm_group_quant"]
