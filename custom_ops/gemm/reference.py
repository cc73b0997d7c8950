"""The semantics of the scaled matrix products in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.scales import to_contiguous

BLOCK = 128


def dequantize_rows(a: Tensor, a_scale: Tensor) -> Tensor:
    """float32 values of [..., K] codes with one scale per row and 128 channels."""
    return a.float() * a_scale.repeat_interleave(BLOCK, dim=-1)[..., : a.shape[-1]]


def dequantize_blocks(b: Tensor, b_scale: Tensor) -> Tensor:
    """float32 values of [N, K] codes with one scale per 128 x 128 block."""
    rows = b_scale.repeat_interleave(BLOCK, dim=0)[: b.shape[0]]
    return b.float() * rows.repeat_interleave(BLOCK, dim=1)[:, : b.shape[1]]


def block_scaled_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype
) -> Tensor:
    """`custom_ops.block_scaled_mm`: dequantize to float32, multiply in float32, round once."""
    product = dequantize_rows(a, a_scale) @ dequantize_blocks(b, b_scale).t()
    return to_contiguous(product.to(out_dtype))


def scaled_mm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    epilogue: str,
) -> Tensor:
    """`custom_ops.scaled_mm`: int8 products are summed in float64, which holds each such sum exactly."""
    wide = torch.float64 if a.dtype == torch.int8 else torch.float32
    value = (a.to(wide) @ b.to(wide).t()).float()
    rows = a_scale.float() if a_scale.numel() != 1 else a_scale.float().reshape(())
    steps = (rows, b_scale.float().flatten())
    if epilogue != "float32":
        if epilogue == "out_dtype":
            value = value.to(out_dtype).float()
        for scale in steps:
            value = (value * scale).to(out_dtype).float()
    else:
        value = value * steps[0] * steps[1]
    if bias is not None:
        value = value + bias.float()
    return to_contiguous(value.to(out_dtype))
