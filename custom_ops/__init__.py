"""Fused inference kernels as torch operators: `custom_ops.group_quant(x, 128)`.

Importing this package compiles nothing, does not initialise CUDA, and imports no optional package.
`custom_ops.explain(op, *args)` says which implementation of an op would run, and why not the others.
"""

from custom_ops.activation import silu_mul, silu_mul_group_quant
from custom_ops.gemm import block_scaled_mm
from custom_ops.library import Unavailable, explain, ops
from custom_ops.normalization import (
    add_rms_norm,
    add_rms_norm_group_quant,
    rms_norm,
    rms_norm_group_quant,
)
from custom_ops.quantization import group_quant
from custom_ops.scales import QuantSpec

__all__ = [
    "QuantSpec",
    "Unavailable",
    "add_rms_norm",
    "add_rms_norm_group_quant",
    "block_scaled_mm",
    "explain",
    "group_quant",
    "ops",
    "rms_norm",
    "rms_norm_group_quant",
    "silu_mul",
    "silu_mul_group_quant",
]
