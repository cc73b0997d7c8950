"""Matrix products of 8-bit operands with their scales."""

from custom_ops.gemm.ops import block_scaled_mm, preferred_scale_layout, scaled_mm

__all__ = ["block_scaled_mm", "preferred_scale_layout", "scaled_mm"]
