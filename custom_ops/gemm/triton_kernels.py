"""Block-scaled FP8 matrix product in Triton, for any shape and any strides.

Each step multiplies a [BLOCK_M, 128] by a [128, BLOCK_N] tile of codes and adds the product, times the
two scales, to a float32 accumulator. Both tile heights are multiples of 64, so that Hopper uses the same
matrix instruction for each: a row gives the same bits in any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.gemm.reference import BLOCK
from custom_ops.platform import on_device
from custom_ops.scales import as_rows
from custom_ops.triton_math import INTERPRET, decode_e4m3, native_fp8, round_to

# Tiles of rows that run together, so that a tile of b is read from L2 by all of them.
ROW_TILES = 8


@triton.jit
def _operand(codes, NATIVE_FP8: tl.constexpr):
    """Codes as the matrix units take them: as they are, or decoded (exactly) where there is no FP8."""
    operand = codes
    if not NATIVE_FP8:
        operand = decode_e4m3(codes)
        if not INTERPRET:
            operand = operand.to(tl.bfloat16)
    return operand


@triton.jit
def _block_scaled_mm(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    out_ptr,
    M,
    N,
    K,
    a_row,
    a_scale_row,
    a_scale_block,
    b_row,
    b_scale_row,
    b_scale_block,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_TILES: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // (ROW_TILES * column_tiles)
    in_band = tl.program_id(0) % (ROW_TILES * column_tiles)
    height = tl.minimum(row_tiles - band * ROW_TILES, ROW_TILES)
    row_tile = band * ROW_TILES + in_band % height
    column_tile = in_band // height

    row = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + row[:, None] * a_row + k[None, :]
    b_ptrs = b_ptr + column[None, :] * b_row + k[:, None]
    a_scale_ptrs = a_scale_ptr + row * a_scale_row
    # BLOCK_N divides 128: a tile of columns has one scale of b.
    b_scale_ptr += column_tile.to(tl.int64) * BLOCK_N // 128 * b_scale_row

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for block in range(tl.cdiv(K, BLOCK_K)):
        in_k = k < K - block * BLOCK_K
        a = tl.load(a_ptrs, mask=(row < M)[:, None] & in_k[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(column < N)[None, :] & in_k[:, None], other=0.0)
        a_scale = tl.load(a_scale_ptrs, mask=row < M, other=0.0)
        b_scale = tl.load(b_scale_ptr)
        product = tl.dot(_operand(a, NATIVE_FP8), _operand(b, NATIVE_FP8))
        total += product * (a_scale * b_scale)[:, None]
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K
        a_scale_ptrs += a_scale_block
        b_scale_ptr += b_scale_block

    out_ptrs = out_ptr + row[:, None] * N + column[None, :]
    out = round_to(total, out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=(row < M)[:, None] & (column < N)[None, :])


def block_scaled_mm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, out_dtype: torch.dtype
) -> Tensor:
    """As `custom_ops.block_scaled_mm`. Takes any row pitch and any strides of the scales; codes that are
    strided along K are copied.
    """
    n, k = b.shape
    out = torch.empty((*a.shape[:-1], n), dtype=out_dtype, device=a.device)
    rows, columns = as_rows(a), as_rows(b)
    m = rows.shape[0]
    if out.numel() == 0:
        return out
    scale = a_scale if a_scale.dim() == 2 else a_scale.reshape(m, -(-k // BLOCK))
    fp8 = native_fp8(a)
    if not fp8:
        rows, columns = rows.view(torch.uint8), columns.view(torch.uint8)
    block_m = 64 if m <= 64 else 128
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, BLOCK)
    with on_device(a):
        _block_scaled_mm[(tiles,)](
            rows,
            scale,
            columns,
            b_scale,
            out,
            m,
            n,
            k,
            rows.stride(0),
            *scale.stride(),
            columns.stride(0),
            *b_scale.stride(),
            BLOCK_M=block_m,
            BLOCK_N=BLOCK,
            BLOCK_K=BLOCK,
            ROW_TILES=ROW_TILES,
            NATIVE_FP8=fp8,
            num_warps=4 if block_m == 64 else 8,
            num_stages=3,
        )
    return out
