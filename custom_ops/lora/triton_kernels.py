"""Shrink and expand in Triton, for one adapter and for a batch of them.

A program works on a run of tokens of one adapter, a tile of `LoRABatch`, so that each adapter is read once for up to
64 tokens and tokens without one take no part. The shrink splits the channels over programs and leaves the partial sums
apart; whoever reads them adds them up in one order, so that no sum depends on timing.

A float32 factor of a product with a 16-bit one is split into two parts that the matrix units take exactly: bfloat16 and
bfloat16 keep 16 of its bits, TF32 (which has the bits of float16, and the range of float32) 22.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda as hopper

from custom_ops.triton_math import INTERPRET, round_to, to_float32

# Of `ROUND`: how the low-rank product is rounded. FLOAT32: once, with the base. EACH: after each step, as a graph of
# 16-bit products.
FLOAT32 = tl.constexpr(0)
EACH = tl.constexpr(1)


@triton.jit
def wait_for_previous(DEPENDENT: tl.constexpr):
    """Until the kernel before this one has finished and what it wrote can be read."""
    if DEPENDENT:
        hopper.gdc_wait()


@triton.jit
def start_next(DEPENDENT: tl.constexpr):
    """From here on the next kernel may start, up to its own wait."""
    if DEPENDENT:
        hopper.gdc_launch_dependents()


@triton.jit
def _leading_bits(v):
    """A float32 cut to the 11 leading bits of TF32; what is cut off is v minus that, exactly."""
    return (v.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def dot(left, right, total):
    """total + left @ right in float32 for 16-bit and float32 tiles, in any combination."""
    if INTERPRET:
        total = tl.dot(to_float32(left), to_float32(right), total, input_precision="ieee")
    elif left.dtype == tl.float32 and right.dtype == tl.float32:
        total = tl.dot(left, right, total, input_precision="tf32x3")
    elif left.dtype == tl.float32 and right.dtype == tl.bfloat16:
        high = left.to(tl.bfloat16)
        total = tl.dot(high, right, total)
        total = tl.dot((left - high.to(tl.float32)).to(tl.bfloat16), right, total)
    elif left.dtype == tl.float32:
        high = _leading_bits(left)
        wide = right.to(tl.float32)
        total = tl.dot(high, wide, total, input_precision="tf32")
        total = tl.dot(left - high, wide, total, input_precision="tf32")
    elif right.dtype == tl.float32:
        high = _leading_bits(right)
        wide = left.to(tl.float32)
        total = tl.dot(wide, high, total, input_precision="tf32")
        total = tl.dot(wide, right - high, total, input_precision="tf32")
    else:
        total = tl.dot(left, right, total)
    return total


@triton.jit
def _tokens_of(
    tile, sorted_ptr, tiles_ptr, ranks_ptr, T, R, BLOCK_M: tl.constexpr, BATCHED: tl.constexpr
):
    """Of a tile: its slot (-1: none), the rank there, its number of tokens, the tokens, and which of them are."""
    place = tl.arange(0, BLOCK_M)
    if BATCHED:
        slot = tl.load(tiles_ptr + tile * 4)
        first = tl.load(tiles_ptr + tile * 4 + 1)
        count = tl.load(tiles_ptr + tile * 4 + 2)
        inside = place < count
        token = tl.load(sorted_ptr + first + place, mask=inside, other=0)
        inside = inside & (token < T)
        rank = tl.load(ranks_ptr + tl.maximum(slot, 0), mask=slot >= 0, other=0)
        rank = tl.minimum(rank, R)
    else:
        slot = 0
        token = tile * BLOCK_M + place
        count = T - tile * BLOCK_M
        inside = token < T
        rank = R
    return slot, rank, count, token.to(tl.int64), inside


@triton.jit
def _shrink_tile(
    x_ptr,
    a_ptr,
    y_ptr,
    token,
    inside,
    rank,
    first_rank,
    k_from,
    k_to,
    H,
    R,
    x_row,
    a_row,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SHARE: tl.constexpr,
):
    """The product of some tokens with some rows of A over channels k_from to k_to."""
    r = first_rank + tl.arange(0, BLOCK_R)
    k = k_from + tl.arange(0, BLOCK_K)
    row = token if SHARE == 1 else token // SHARE
    x_ptrs = x_ptr + row[:, None] * x_row + k[None, :]
    a_ptrs = a_ptr + r.to(tl.int64)[None, :] * a_row + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if first_rank < rank:
        for start in range(k_from, k_to, BLOCK_K):
            if EVEN_K:
                x = tl.load(x_ptrs, mask=inside[:, None], other=0.0)
                a = tl.load(a_ptrs, mask=(r < rank)[None, :], other=0.0)
            else:
                in_k = tl.arange(0, BLOCK_K) < k_to - start
                x = tl.load(x_ptrs, mask=inside[:, None] & in_k[None, :], other=0.0)
                a = tl.load(a_ptrs, mask=(r < rank)[None, :] & in_k[:, None], other=0.0)
            total = dot(x, a, total)
            x_ptrs += BLOCK_K
            a_ptrs += BLOCK_K
    if y_ptr.dtype.element_ty != tl.float32:
        total = round_to(total, y_ptr.dtype.element_ty)
    tl.store(
        y_ptr + token[:, None] * R + r[None, :], total, mask=inside[:, None] & (r < R)[None, :]
    )


@triton.jit
def shrink_kernel(
    x_ptr,
    a_ptrs,
    ranks_ptrs,
    sorted_ptr,
    tiles_ptr,
    y_ptr,
    T,
    H,
    R,
    x_row,
    a_row,
    a_slot,
    y_split,
    y_slice,
    split_channels,
    SLICES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    SHARE: tl.constexpr,
    BATCHED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """y[split, slice, token] = x[token // SHARE, channels of the split] @ A[slice, slot of the token].T

    Programs: (tile, split), block of ranks, slice.
    """
    wait_for_previous(DEPENDENT)
    start_next(DEPENDENT)
    splits = tl.cdiv(H, split_channels)
    tile = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    first_rank = tl.program_id(1) * BLOCK_R
    k_from = split * split_channels
    k_to = tl.minimum(H, k_from + split_channels)
    for index in tl.static_range(SLICES):
        if tl.program_id(2) == index:
            slot, rank, count, token, inside = _tokens_of(
                tile,
                sorted_ptr,
                tiles_ptr,
                ranks_ptrs[index] if BATCHED else None,
                T,
                R,
                BLOCK_M,
                BATCHED,
            )
            if count > 0:
                at = tl.cast(split, tl.int64) * y_split + tl.cast(index, tl.int64) * y_slice
                _shrink_tile(
                    x_ptr,
                    a_ptrs[index] + tl.maximum(slot, 0).to(tl.int64) * a_slot,
                    y_ptr + at,
                    token,
                    inside,
                    rank,
                    first_rank,
                    k_from,
                    k_to,
                    H,
                    R,
                    x_row,
                    a_row,
                    BLOCK_M,
                    BLOCK_R,
                    BLOCK_K,
                    EVEN_K,
                    SHARE,
                )


@triton.jit
def _sum(pointers, mask, step, SPLITS: tl.constexpr):
    """The sum of a tile over its splits, in their order, in float32."""
    total = to_float32(tl.load(pointers, mask=mask, other=0.0))
    for split in tl.static_range(1, SPLITS):
        total += tl.load(pointers + split * step, mask=mask, other=0.0)
    return total


@triton.jit
def round_sums_kernel(
    y_ptr, out_ptr, SIZE, SPLITS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    """out = the sums [SIZE] of y [SPLITS, SIZE], rounded to out's dtype."""
    wait_for_previous(DEPENDENT)
    start_next(DEPENDENT)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = _sum(y_ptr + at, at < SIZE, SIZE, SPLITS)
    tl.store(out_ptr + at, round_to(total, out_ptr.dtype.element_ty), mask=at < SIZE)


@triton.jit
def low_rank(
    y_ptr,
    b_ptr,
    token,
    inside,
    column,
    in_columns,
    rank,
    R,
    b_row,
    split_step,
    dtype: tl.constexpr,
    SPLITS: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """y @ B.T for some tokens and columns, y the sum of its splits. The first of B is read before the wait.

    B is zero from the rank up to a multiple of RANK_STEP, which lets it be read in whole vectors.
    """
    r = tl.arange(0, BLOCK_R)
    in_b = (rank + RANK_STEP - 1) // RANK_STEP * RANK_STEP
    b_ptrs = b_ptr + column.to(tl.int64)[None, :] * b_row + r[:, None]
    y_ptrs = y_ptr + token[:, None] * R + r[None, :]
    b = tl.load(b_ptrs, mask=in_columns[None, :] & (r < in_b)[:, None], other=0.0)
    wait_for_previous(DEPENDENT)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    y = _sum(y_ptrs, inside[:, None] & (r < rank)[None, :], split_step, SPLITS)
    total = dot(round_to(y, dtype) if ROUND == EACH else y, b, total)
    if not ONE_BLOCK:
        for first in range(BLOCK_R, rank, BLOCK_R):
            in_r = first + r < rank
            b_mask = in_columns[None, :] & (first + r < in_b)[:, None]
            b = tl.load(b_ptrs + first, mask=b_mask, other=0.0)
            y = _sum(y_ptrs + first, inside[:, None] & in_r[None, :], split_step, SPLITS)
            total = dot(round_to(y, dtype) if ROUND == EACH else y, b, total)
    return total


@triton.jit
def add_low_rank(base, product, scaling, dtype: tl.constexpr, ROUND: tl.constexpr):
    """base + product * scaling in dtype; base is float32 with values of dtype."""
    if ROUND == EACH:
        product = to_float32(round_to(product, dtype))
        product = to_float32(round_to(product * scaling, dtype))
    else:
        product = product * scaling
    return round_to(base + product, dtype)


@triton.jit
def expand_kernel(
    y_ptr,
    b_ptrs,
    widths,
    base_ptr,
    scaling_ptr,
    scaling,
    ranks_ptr,
    sorted_ptr,
    tiles_ptr,
    out_ptr,
    T,
    N,
    R,
    y_split,
    base_row,
    b_rows,
    b_slots,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_BASE: tl.constexpr,
    EARLY_BASE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEP: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BATCHED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out[token] = base[token] + scaling * y[slice, token] @ B[slice, slot of the token].T, slices side by side.

    Programs: tile, block of columns; a block lies in one slice. EARLY_BASE: the base is there before the kernel before
    this one has ended.
    """
    start_next(DEPENDENT)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    slot, rank, count, token, inside = _tokens_of(
        tl.program_id(0), sorted_ptr, tiles_ptr, ranks_ptr, T, R, BLOCK_M, BATCHED
    )
    idle = count <= 0
    if IN_PLACE:  # the base of these tokens is what comes out
        idle = idle | (rank == 0)
    if idle:
        # a kernel that ends before the one before it would let the next one read what is not written yet
        wait_for_previous(DEPENDENT)
        return
    at = tl.maximum(slot, 0).to(tl.int64)
    if BATCHED:
        scaling = tl.load(scaling_ptr + at, mask=rank > 0, other=0.0)
    block = tl.program_id(1)
    before = 0
    for index in tl.static_range(SLICES):
        blocks = tl.cdiv(widths[index], BLOCK_N)
        if block >= 0 and block < blocks:
            within = block * BLOCK_N + tl.arange(0, BLOCK_N)
            in_columns = within < widths[index]
            column = before + within
            both = inside[:, None] & in_columns[None, :]
            if HAS_BASE and EARLY_BASE:  # on its way while the rest is read
                base_ptrs = base_ptr + token[:, None] * base_row + column[None, :]
                base = tl.load(base_ptrs, mask=both, other=0.0)
            product = low_rank(
                y_ptr + tl.cast(index * R, tl.int64) * T,
                b_ptrs[index] + at * b_slots[index],
                token,
                inside,
                within,
                in_columns,
                rank,
                R,
                b_rows[index],
                tl.cast(y_split, tl.int64),
                dtype,
                SPLITS,
                ROUND,
                BLOCK_M,
                BLOCK_N,
                BLOCK_R,
                RANK_STEP,
                ONE_BLOCK,
                DEPENDENT,
            )
            if HAS_BASE:
                if not EARLY_BASE:
                    base_ptrs = base_ptr + token[:, None] * base_row + column[None, :]
                    base = tl.load(base_ptrs, mask=both, other=0.0)
                wide = to_float32(base)
            else:
                wide = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            tl.store(
                out_ptr + token[:, None] * N + column[None, :],
                add_low_rank(wide, product, scaling, dtype, ROUND),
                mask=both,
            )
        block -= blocks
        before += widths[index]
