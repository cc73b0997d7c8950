"""The semantics of group quantization in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.scales import E4M3_MAX, to_contiguous, to_layout


def group_quant(
    x: Tensor, group_size: int, *, scale_layout: str, min_amax: float
) -> tuple[Tensor, Tensor]:
    """`custom_ops.group_quant`, step by step."""
    groups = x.unflatten(-1, (x.shape[-1] // group_size, group_size)).float()
    amax = groups.abs().amax(-1).clamp(min=min_amax)
    # On CUDA, PyTorch divides by a Python number by multiplying with its reciprocal, which is one step
    # off for some values; a division by a tensor is IEEE division everywhere.
    scale = amax / torch.full((), E4M3_MAX, dtype=torch.float32, device=x.device)
    codes = (groups / scale.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return to_contiguous(codes.flatten(-2)), to_layout(scale, scale_layout)
