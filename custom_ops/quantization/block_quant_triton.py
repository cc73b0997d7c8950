"""`block_quant` in Triton: a program quantizes a block."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.platform import on_device
from custom_ops.quantization.triton_codes import (
    code_constants,
    codes_of,
    codes_pointer,
    magnitude_bits,
    scale_of,
)
from custom_ops.scales import BLOCK, as_rows, quant_spec


@triton.jit
def _block(
    x_ptr, q_ptr, scale_ptr, rows, columns, blocks, x_row, min_amax, min_scale,
    SIDE: tl.constexpr, SCALE_MODE: tl.constexpr, SCALE_FORMAT: tl.constexpr,
    CODE_MAX: tl.constexpr, INT8: tl.constexpr, CODE_MODE: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = (block // blocks) * SIDE + tl.arange(0, SIDE)
    column = ((block % blocks) * SIDE + tl.arange(0, SIDE))[None, :]
    mask = (row < rows)[:, None] & (column < columns)
    wide = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + wide * x_row + column, mask=mask, other=0.0)
    # One number, as often as there are rows: to the functions of a tile each row is a group.
    largest = tl.max(tl.max(magnitude_bits(x), axis=1), axis=0)
    each = tl.zeros((SIDE,), tl.int32) + largest
    scale = scale_of(each, min_amax, min_scale, x.dtype, CODE_MAX, SCALE_MODE, SCALE_FORMAT)
    codes = codes_of(x, scale, CODE_MAX, INT8, CODE_MODE, NATIVE_FP8)
    tl.store(q_ptr + wide * columns + column, codes, mask=mask)
    at = tl.arange(0, SIDE)
    tl.store(scale_ptr + block + at, scale, mask=at == 0)


def block_quant(
    x: Tensor,
    *,
    min_amax: float,
    dtype: torch.dtype,
    scale_format: str,
    min_scale: float,
    scale_mode: str,
    code_mode: str,
) -> tuple[Tensor, Tensor]:
    """As `custom_ops.block_quant`. Takes any row pitch; an input strided along K is copied."""
    q, scale = quant_spec(dtype, (BLOCK, BLOCK), scale_format).empty(x.shape, x.device)
    rows = as_rows(x)
    with on_device(x):
        _block[(scale.numel(),)](
            rows,
            codes_pointer(q),
            scale,
            *x.shape,
            scale.shape[1],
            rows.stride(0),
            min_amax,
            min_scale,
            SIDE=BLOCK,
            SCALE_MODE=scale_mode,
            SCALE_FORMAT=scale_format,
            **code_constants(x, dtype, code_mode, scale_mode),
            num_warps=8,
        )
    return q, scale
