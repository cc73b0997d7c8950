"""Group quantization in Triton: a program quantizes a few neighbouring groups."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.platform import on_device
from custom_ops.quantization.ops import empty_quant
from custom_ops.scales import as_rows
from custom_ops.triton_math import native_fp8, quantize_groups, to_float32

# Elements of a program: 8 for each of 128 threads, one 16-byte load.
TILE = 1024


def scale_steps(scale: Tensor, scale_layout: str) -> tuple[int, int]:
    """Elements from a token to the next and from a group to the next, in a scale seen as [M, G]."""
    return (scale.shape[-1] if scale_layout == "row_major" else 1), scale.stride(-1)


@triton.jit(do_not_specialize=["num_groups", "scale_row", "scale_group"])
def _group_quant(
    x_ptr,
    q_ptr,
    scale_ptr,
    num_groups,
    groups_per_row,
    x_row,
    scale_row,
    scale_group,
    min_amax,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    # Groups are counted in 32 bits (2^31 of them exceed any GPU's memory), elements in 64.
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = group < num_groups
    row = (group // groups_per_row).to(tl.int64)
    column = (group % groups_per_row).to(tl.int64)
    lane = tl.arange(0, GROUP)[None, :]
    start = row * x_row + column * GROUP
    x = tl.load(x_ptr + start[:, None] + lane, mask=mask[:, None], other=0.0)
    scale, codes = quantize_groups(to_float32(x), min_amax, NATIVE_FP8)
    tl.store(q_ptr + (group.to(tl.int64) * GROUP)[:, None] + lane, codes, mask=mask[:, None])
    tl.store(scale_ptr + row * scale_row + column * scale_group, scale, mask=mask)


def group_quant(
    x: Tensor, group_size: int, *, scale_layout: str, min_amax: float
) -> tuple[Tensor, Tensor]:
    """As `custom_ops.group_quant`. Takes any row pitch; x is copied when strided along K."""
    q, scale = empty_quant(x, group_size, scale_layout)
    rows = as_rows(x)
    num_groups = scale.numel()
    block = TILE // group_size
    with on_device(x):
        _group_quant[(triton.cdiv(num_groups, block),)](
            rows,
            q.view(torch.uint8),
            scale,
            num_groups,
            scale.shape[-1],
            rows.stride(0),
            *scale_steps(scale, scale_layout),
            min_amax,
            GROUP=group_size,
            BLOCK=block,
            NATIVE_FP8=native_fp8(x),
            num_warps=4,
        )
    return q, scale
