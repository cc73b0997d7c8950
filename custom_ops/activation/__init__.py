"""Gated activations, alone and with group quantization."""

from custom_ops.activation.ops import silu_mul, silu_mul_group_quant

__all__ = ["silu_mul", "silu_mul_group_quant"]
