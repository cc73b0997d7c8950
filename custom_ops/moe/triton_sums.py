"""Device functions of the kernels for few pairs: sums of a row by rows of weights, without matrix units."""

from __future__ import annotations

import triton
import triton.language as tl

from custom_ops.quantization.triton_codes import codes_of, magnitude_bits, scale_of
from custom_ops.triton_math import decode_e4m3, to_float32


@triton.jit
def decoded(w):
    """Weights as float32."""
    if w.dtype == tl.uint8:
        v = decode_e4m3(w)
    elif w.dtype.is_fp8():
        v = w.to(tl.float16).to(tl.float32)
    else:
        v = to_float32(w)
    return v


@triton.jit
def requantized(
    x, min_amax, T: tl.constexpr, GROUPS: tl.constexpr,
    SCALE_MODE: tl.constexpr, CODE_MODE: tl.constexpr, CODE_MAX: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """float32 values [GROUPS, 128] that the codes of so many groups of T stand for: code times scale.

    CODE_MODE "exact": a division, by scales that are all such that the reciprocal and one correction are exact, so that
    nobody has to ask. Of a scale that is not finite all values are NaN either way.
    """
    groups = tl.reshape(x, (GROUPS, 128))
    largest = tl.max(magnitude_bits(groups), axis=1)
    scale = scale_of(largest, min_amax, 0.0, T, CODE_MAX, SCALE_MODE, "float32")
    if CODE_MODE == "exact":
        v = to_float32(groups)
        reciprocal = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
        guess = v * reciprocal
        divisor = tl.broadcast_to(scale[:, None], v.shape)
        residual = tl.fma(guess, divisor, v * -1.0)
        quotient = tl.fma(residual, tl.broadcast_to(reciprocal * -1.0, v.shape), guess)
        values = quotient.to(tl.float8e4nv).to(tl.float16).to(tl.float32)
    else:
        values = decode_e4m3(codes_of(groups, scale, CODE_MAX, False, CODE_MODE, NATIVE_FP8))
    return values * scale[:, None]


@triton.jit
def _factor(
    v, scale_ptr, first, column, in_columns, at, K, ws_row, ws_block,
    BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, SCALED: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """What weights [COLUMNS, BLOCK_K] are multiplied by: the values of a row, and the scales of blocks of 128 x 128."""
    if SCALED:
        block = at // 128 + tl.arange(0, BLOCK_K // 128)
        in_blocks = block * 128 < K
        if UNIFORM:
            scale_ptrs = scale_ptr + first // 128 * ws_row + block * ws_block
            scale = tl.load(scale_ptrs, mask=in_blocks, other=0.0)
            factor = tl.reshape(v * scale[:, None], (BLOCK_K,))[None, :]
        else:
            scale_ptrs = scale_ptr + (column // 128 * ws_row)[:, None] + (block * ws_block)[None, :]
            scale = tl.load(scale_ptrs, mask=in_blocks[None, :] & in_columns[:, None], other=0.0)
            factor = tl.reshape(v[None, :, :] * scale[:, :, None], (COLUMNS, BLOCK_K))
    else:
        factor = v[None, :]
    return factor


@triton.jit
def sums_of(products, LANES: tl.constexpr):
    """[ROWS, K] to [ROWS, K // LANES]: what one thread has loaded at once takes one register then, and not LANES."""
    if LANES > 1:
        ROWS: tl.constexpr = products.shape[0]
        K: tl.constexpr = products.shape[1]
        products = tl.sum(tl.reshape(products, (ROWS, K // LANES, LANES)), axis=2)
    return products


@triton.jit
def row_sums(
    x_ptr, w_ptr, up_ptr, w_scale_ptr, first, second, before_up, in_columns, K, w_row, w_col, ws_row, ws_block,
    min_amax,
    T: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr, HALVES: tl.constexpr, EVEN_K: tl.constexpr,
    SCALED: tl.constexpr, UNIFORM: tl.constexpr, SCALE_MODE: tl.constexpr, CODE_MODE: tl.constexpr,
    CODE_MAX: tl.constexpr, NATIVE_FP8: tl.constexpr, STAGES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """float32 sums [COLUMNS] of a row by rows of a weight from `first` on and, with two HALVES, from `second` on of up.

    Scales have the rows of up from `before_up` on.
    """
    k = tl.arange(0, BLOCK_K)
    lane = tl.arange(0, COLUMNS)
    place = (lane.to(tl.int64) * w_row)[:, None] + (k.to(tl.int64) * w_col)[None, :]
    sum_0 = tl.zeros((COLUMNS, BLOCK_K // LANES), tl.float32)
    sum_1 = tl.zeros((COLUMNS, BLOCK_K // LANES), tl.float32)
    w_0 = w_ptr + first.to(tl.int64) * w_row + place
    w_1 = up_ptr + second.to(tl.int64) * w_row + place
    for at in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        in_k = k < K - at
        if EVEN_K:
            mask = tl.broadcast_to(in_columns[:, None], (COLUMNS, BLOCK_K))
        else:
            mask = in_columns[:, None] & in_k[None, :]
        # The row is small and read by every program: it stays in L1, the weights do not.
        x = tl.load(x_ptr + at + k, mask=in_k, other=0.0)
        tile_0 = tl.load(w_0, mask=mask, other=0.0, eviction_policy="evict_first")
        tile_1 = tile_0
        if HALVES == 2:
            tile_1 = tl.load(w_1, mask=mask, other=0.0, eviction_policy="evict_first")
        if SCALED:
            v = requantized(
                x, min_amax, T, BLOCK_K // 128, SCALE_MODE, CODE_MODE, CODE_MAX, NATIVE_FP8
            )
        else:
            v = to_float32(x)
        products = decoded(tile_0) * _factor(
            v, w_scale_ptr, first, first + lane, in_columns, at, K, ws_row, ws_block,
            BLOCK_K, COLUMNS, SCALED, UNIFORM,
        )  # fmt: skip
        sum_0 += sums_of(products, LANES)
        if HALVES == 2:
            products = decoded(tile_1) * _factor(
                v, w_scale_ptr, before_up + second, before_up + second + lane, in_columns, at, K, ws_row, ws_block,
                BLOCK_K, COLUMNS, SCALED, UNIFORM,
            )  # fmt: skip
            sum_1 += sums_of(products, LANES)
        w_0 += BLOCK_K * w_col
        w_1 += BLOCK_K * w_col
    return tl.sum(sum_0, axis=1), tl.sum(sum_1, axis=1)
