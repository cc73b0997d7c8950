"""SiLU-mul in Triton, alone and with group quantization."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.platform import on_device
from custom_ops.quantization.ops import empty_quant
from custom_ops.quantization.triton_kernels import TILE, scale_steps
from custom_ops.scales import as_rows
from custom_ops.triton_math import (
    exp,
    native_fp8,
    quantize_groups,
    round_to,
    to_float32,
)


@triton.jit
def _silu_mul_tile(gate, up):
    """T(T(silu(gate)) * up) for tiles of dtype T."""
    g = to_float32(gate)
    silu = round_to(tl.div_rn(g, 1.0 + exp(-g)), gate.dtype)
    return round_to(to_float32(silu) * to_float32(up), gate.dtype)


@triton.jit
def _silu_mul(gate_ptr, up_ptr, out_ptr, size, tiles, gate_row, up_row, TILE: tl.constexpr):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    mask = column < size
    gate = tl.load(gate_ptr + row * gate_row + column, mask=mask, other=0.0)
    up = tl.load(up_ptr + row * up_row + column, mask=mask, other=0.0)
    tl.store(out_ptr + row * size + column, _silu_mul_tile(gate, up), mask=mask)


@triton.jit(do_not_specialize=["num_groups", "scale_row", "scale_group"])
def _silu_mul_group_quant(
    gate_ptr,
    up_ptr,
    q_ptr,
    scale_ptr,
    num_groups,
    groups_per_row,
    gate_row,
    up_row,
    scale_row,
    scale_group,
    min_amax,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = group < num_groups
    row = (group // groups_per_row).to(tl.int64)
    column = (group % groups_per_row).to(tl.int64)
    lane = tl.arange(0, GROUP)[None, :]
    gate_start = (row * gate_row + column * GROUP)[:, None]
    up_start = (row * up_row + column * GROUP)[:, None]
    gate = tl.load(gate_ptr + gate_start + lane, mask=mask[:, None], other=0.0)
    up = tl.load(up_ptr + up_start + lane, mask=mask[:, None], other=0.0)
    product = to_float32(_silu_mul_tile(gate, up))
    scale, codes = quantize_groups(product, min_amax, NATIVE_FP8)
    tl.store(q_ptr + (group.to(tl.int64) * GROUP)[:, None] + lane, codes, mask=mask[:, None])
    tl.store(scale_ptr + row * scale_row + column * scale_group, scale, mask=mask)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As `custom_ops.silu_mul`. Takes any row pitch; an input strided along I is copied."""
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    gates, ups = as_rows(gate), as_rows(up)
    size = gate.shape[-1]
    tiles = triton.cdiv(size, TILE)
    with on_device(gate):
        _silu_mul[(gates.shape[0] * tiles,)](
            gates, ups, out, size, tiles, gates.stride(0), ups.stride(0), TILE=TILE, num_warps=4
        )
    return out


def silu_mul_group_quant(
    gate: Tensor, up: Tensor, group_size: int, *, scale_layout: str, min_amax: float
) -> tuple[Tensor, Tensor]:
    """As `custom_ops.silu_mul_group_quant`. Takes any row pitch; an input strided along I is copied."""
    q, scale = empty_quant(gate, group_size, scale_layout)
    gates, ups = as_rows(gate), as_rows(up)
    num_groups = scale.numel()
    block = TILE // group_size
    with on_device(gate):
        _silu_mul_group_quant[(triton.cdiv(num_groups, block),)](
            gates,
            ups,
            q.view(torch.uint8),
            scale,
            num_groups,
            scale.shape[-1],
            gates.stride(0),
            ups.stride(0),
            *scale_steps(scale, scale_layout),
            min_amax,
            GROUP=group_size,
            BLOCK=block,
            NATIVE_FP8=native_fp8(gate),
            num_warps=4,
        )
    return q, scale
