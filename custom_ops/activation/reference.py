"""The semantics of the gated activations in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.quantization.reference import group_quant
from custom_ops.scales import DEFAULT_MIN_AMAX, quant_spec, to_contiguous


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`custom_ops.silu_mul`: eager silu and eager product."""
    # silu rounds to the dtype of gate, and so does the product: the two roundings of eager.
    return to_contiguous(torch.nn.functional.silu(gate) * up)


def gelu_tanh_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`custom_ops.gelu_tanh_mul`: eager gelu and eager product."""
    return to_contiguous(torch.nn.functional.gelu(gate, approximate="tanh") * up)


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """`custom_ops.clamped_swiglu`, as gpt-oss spells it: each line rounds to the dtype of gate."""
    gate = gate.clamp(max=limit)
    up = up.clamp(min=-limit, max=limit)
    glu = gate * torch.sigmoid(gate * alpha)
    return to_contiguous((up + 1) * glu)


def silu_mul_group_quant_masked(
    gate_up: Tensor,
    counts: Tensor,
    group_size: int,
    *,
    scale_layout: str = "column_major_tma",
    min_amax: float = DEFAULT_MIN_AMAX,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: str = "float32",
    min_scale: float = 0.0,
    scale_mode: str = "divide",
    code_mode: str = "divide",
) -> tuple[Tensor, Tensor]:
    """`custom_ops.silu_mul_group_quant_masked`; what it leaves unwritten is whatever memory held."""
    experts, tokens, width = gate_up.shape
    spec = quant_spec(dtype, (1, group_size), scale_format, scale_layout)
    q, scale = spec.empty_of_experts((experts, tokens, width // 2), gate_up.device)
    codes, scales = group_quant(
        silu_mul(*gate_up.chunk(2, -1)),
        group_size,
        scale_layout=scale_layout,
        min_amax=min_amax,
        dtype=dtype,
        scale_format=scale_format,
        min_scale=min_scale,
        scale_mode=scale_mode,
        code_mode=code_mode,
    )
    # On the device all the way: nothing here waits for the counts.
    valid = torch.arange(tokens, device=gate_up.device) < counts.unsqueeze(1)
    valid = valid.unsqueeze(-1)
    raw, raw_codes = q.view(torch.uint8), codes.view(torch.uint8)
    raw.copy_(torch.where(valid, raw_codes, raw))
    scale.copy_(torch.where(valid, scales, scale))
    return q, scale
