"""Group quantization to FP8."""

from custom_ops.quantization.ops import group_quant

__all__ = ["group_quant"]
