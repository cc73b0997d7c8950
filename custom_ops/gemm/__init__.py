"""Matrix products of 8-bit operands with their scales."""

from custom_ops.gemm.ops import block_scaled_mm, preferred_scale_layout, scaled_mm
from custom_ops.gemm.scaled_mm_add import scaled_mm_add

__all__ = ["block_scaled_mm", "preferred_scale_layout", "scaled_mm", "scaled_mm_add"]
