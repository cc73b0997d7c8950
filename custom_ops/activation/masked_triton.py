"""`silu_mul_group_quant_masked` in Triton: a program quantizes a few groups of an expert, if it has them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.platform import on_device
from custom_ops.quantization.triton_codes import code_constants, codes_pointer
from custom_ops.quantization.triton_kernels import TILE, quantize_groups
from custom_ops.scales import quant_spec


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _masked(
    x_ptr, counts_ptr, q_ptr, scale_ptr,
    tokens, blocks, groups_per_row, x_expert, x_row, counts_step,
    scale_expert, scale_row, scale_group, min_amax, min_scale,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
    SCALE_MODE: tl.constexpr, SCALE_FORMAT: tl.constexpr,
    CODE_MAX: tl.constexpr, INT8: tl.constexpr, CODE_MODE: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks) * BLOCK
    count = tl.minimum(tl.load(counts_ptr + expert * counts_step), tokens)
    if first < count * groups_per_row:
        width = groups_per_row * GROUP
        gate_ptr = x_ptr + expert * x_expert
        quantize_groups(
            gate_ptr, gate_ptr + width, q_ptr + expert * tokens * width,
            scale_ptr + expert * scale_expert, first, count * groups_per_row, groups_per_row,
            x_row, x_row, 1, 1, scale_row, scale_group, 0.0, 0.0, min_amax, min_scale,
            "silu_mul", GROUP, BLOCK,
            SCALE_MODE, SCALE_FORMAT, CODE_MAX, INT8, CODE_MODE, NATIVE_FP8,
        )  # fmt: skip


def silu_mul_group_quant_masked(
    gate_up: Tensor,
    counts: Tensor,
    group_size: int,
    *,
    scale_layout: str,
    min_amax: float,
    dtype: torch.dtype,
    scale_format: str,
    min_scale: float,
    scale_mode: str,
    code_mode: str,
) -> tuple[Tensor, Tensor]:
    """As `custom_ops.silu_mul_group_quant_masked`. An input strided along its columns is copied."""
    x = gate_up if gate_up.stride(-1) == 1 else gate_up.contiguous()
    experts, tokens, width = x.shape
    spec = quant_spec(dtype, (1, group_size), scale_format, scale_layout)
    q, scale = spec.empty_of_experts((experts, tokens, width // 2), x.device)
    groups = width // 2 // group_size
    block = TILE // group_size
    blocks = triton.cdiv(tokens * groups, block)
    with on_device(x):
        _masked[(experts * blocks,)](
            x,
            counts,
            codes_pointer(q),
            scale,
            tokens,
            blocks,
            groups,
            x.stride(0),
            x.stride(1),
            counts.stride(0),
            *scale.stride(),
            min_amax,
            min_scale,
            GROUP=group_size,
            BLOCK=block,
            SCALE_MODE=scale_mode,
            SCALE_FORMAT=scale_format,
            **code_constants(x, dtype, code_mode, scale_mode),
            num_warps=4,
        )
    return q, scale
