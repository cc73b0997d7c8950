"""The semantics of the RMSNorm family in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.scales import to_contiguous


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, weight_mode: str) -> Tensor:
    """`custom_ops.rms_norm`, as the models spell it."""
    x32 = x.float()
    y = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    if weight_mode == "rounded":
        return to_contiguous(weight * y.to(x.dtype))
    if weight_mode == "float32":
        return to_contiguous((y * weight.float()).to(x.dtype))
    return to_contiguous((y * (1.0 + weight.float())).to(x.dtype))


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, weight_mode: str
) -> tuple[Tensor, Tensor]:
    """`custom_ops.add_rms_norm`: eager addition, then the norm."""
    residual_out = to_contiguous(x + residual)
    return rms_norm(residual_out, weight, eps, weight_mode=weight_mode), residual_out
