"""The base product of a linear layer with the low-rank product in its epilogue, in Triton with TMA.

One kernel multiplies x by W and, tile by tile, adds what the expand would add, so that the base is never written and
read again. It waits for the shrink, which may run beside it, only once the first product is done.
"""

from __future__ import annotations

import triton
import triton.language as tl

from custom_ops.lora.triton_kernels import add_low_rank, low_rank, start_next
from custom_ops.triton_math import INTERPRET, round_to, to_float32


@triton.jit
def _product(
    x_desc,
    w_desc,
    row,
    column,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x @ W.T in float32 for a tile."""
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = x_desc.load([row, k])
        w = w_desc.load([column, k])
        if INTERPRET:
            x, w = to_float32(x), to_float32(w)
        total = tl.dot(x, w.T, total)
    return total


@triton.jit
def linear_kernel(
    x_desc,
    w_desc,
    bias_ptr,
    y_ptr,
    b_ptr,
    scaling,
    out_ptr,
    T,
    N,
    K,
    R,
    y_split,
    b_row,
    ROW_TILES: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUND: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out = T(T(x @ W.T + bias) + scaling * y @ B.T) for one adapter; PROGRAMS programs share the tiles.

    PARTS: 1, 2 or 4: in how many parts the columns of a tile are finished, for fewer registers.
    """
    row_tiles = tl.cdiv(T, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, PROGRAMS, flatten=FLATTEN):
        band = tile // (ROW_TILES * column_tiles)
        in_band = tile % (ROW_TILES * column_tiles)
        height = tl.minimum(row_tiles - band * ROW_TILES, ROW_TILES)
        row = (band * ROW_TILES + in_band % height) * BLOCK_M
        column = (in_band // height) * BLOCK_N
        total = _product(x_desc, w_desc, row, column, K, BLOCK_M, BLOCK_N, BLOCK_K)
        if HAS_BIAS:
            n = column + tl.arange(0, BLOCK_N)
            total += to_float32(tl.load(bias_ptr + n, mask=n < N, other=0.0))[None, :]
        base = round_to(total, out_ptr.dtype.element_ty)
        token = row + tl.arange(0, BLOCK_M).to(tl.int64)
        if PARTS == 1:
            parts = (base,)
        elif PARTS == 2:
            parts = _halves(base, BLOCK_M, BLOCK_N)
        else:
            left, right = _halves(base, BLOCK_M, BLOCK_N)
            parts = _halves(left, BLOCK_M, BLOCK_N // 2) + _halves(right, BLOCK_M, BLOCK_N // 2)
        WIDTH: tl.constexpr = BLOCK_N // PARTS
        for part in tl.static_range(PARTS):
            n = column + part * WIDTH + tl.arange(0, WIDTH)
            product = low_rank(
                y_ptr,
                b_ptr,
                token,
                token < T,
                n,
                n < N,
                R,
                R,
                b_row,
                tl.cast(y_split, tl.int64),
                out_ptr.dtype.element_ty,
                SPLITS,
                ROUND,
                BLOCK_M,
                WIDTH,
                BLOCK_R,
                RANK_STEP,
                ONE_BLOCK,
                DEPENDENT,
            )
            tl.store(
                out_ptr + token[:, None] * N + n[None, :],
                add_low_rank(
                    to_float32(parts[part]), product, scaling, out_ptr.dtype.element_ty, ROUND
                ),
                mask=(token < T)[:, None] & (n < N)[None, :],
            )
    start_next(DEPENDENT)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
