"""Block-scaled FP8 matrix products."""

from custom_ops.gemm.ops import block_scaled_mm, preferred_scale_layout

__all__ = ["block_scaled_mm", "preferred_scale_layout"]
