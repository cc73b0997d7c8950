"""Device functions of the expert kernels: tiles of grouped products, and what becomes of their sums.

A tile is [BLOCK_M, COLUMNS]: rows of pairs of one expert by rows of its weight. The weight comes through the
tensor memory accelerator where its pointer and pitches allow (TMA), else by pointers of any strides. SWAP
multiplies the transposed tile, so that few pairs take the narrow side of Hopper's matrix instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

from custom_ops.activation.triton_gates import produce
from custom_ops.triton_math import INTERPRET, decode_e4m3, exp, round_to, to_float32


@triton.jit
def operand(x, T: tl.constexpr, NATIVE_FP8: tl.constexpr):
    """A loaded tile as the matrix units take it."""
    if x.dtype == tl.uint8:
        v = decode_e4m3(x)
        y = v if INTERPRET else v.to(tl.bfloat16)
    elif x.dtype == tl.int8:
        y = x.to(tl.float32) if INTERPRET else x.to(T)
    elif INTERPRET:
        y = to_float32(x)
    else:
        y = x
    return y


@triton.jit
def place(blocks, column_tiles, BAND: tl.constexpr):
    """The block of pairs and the tile of columns of this program: BAND blocks run together through all columns."""
    band = tl.program_id(0) // (BAND * column_tiles)
    in_band = tl.program_id(0) % (BAND * column_tiles)
    height = tl.minimum(blocks - band * BAND, BAND)
    return band * BAND + in_band % height, in_band // height


@triton.jit
def ask_for(
    w_ptr, expert, first, N, K, w_expert, w_row,
    COLUMNS: tl.constexpr, LINES: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Ask for the first cache lines of rows of a weight in L2; LINE: weights to a line.

    Several lines to an instruction: line by line, memory is read in smaller pieces, which costs more than it saves.
    """
    PIECE: tl.constexpr = min(LINES, 4)
    row = first + tl.arange(0, COLUMNS)
    row = tl.where(row < N, row, 0).to(tl.int64)
    at = tl.arange(0, LINES // PIECE) * (PIECE * LINE)
    at = tl.where(at < K, at, 0)
    size = tl.minimum(K - at, PIECE * LINE) * (128 // LINE) // 16 * 16
    ptrs = w_ptr + expert.to(tl.int64) * w_expert + (row * w_row)[:, None] + at[None, :]
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r",
        [ptrs.to(tl.int64), tl.broadcast_to(size[None, :], ptrs.shape)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _weights(
    w, w_ptrs, expert, column, at, in_k,
    COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, N_INNER: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, COLUMNS] of the weight of an expert; zero beyond its end along K."""
    if TMA:
        if N_INNER:
            tile = w.load([expert, at, column]).reshape(BLOCK_K, COLUMNS)
        else:
            tile = w.load([expert, column, at]).reshape(COLUMNS, BLOCK_K).T
    elif EVEN_K:
        tile = tl.load(w_ptrs)
    else:
        tile = tl.load(w_ptrs, mask=in_k[:, None], other=0.0)
    return tile


@triton.jit
def _add_product(
    total, a, b, a_scale, b_scale,
    T: tl.constexpr, SWAP: tl.constexpr, SCALED: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """total + a @ b, transposed under SWAP; with SCALED, a product with its scales."""
    left = operand(a, T, NATIVE_FP8)
    right = operand(b, T, NATIVE_FP8)
    if SCALED:
        if SWAP:
            total += tl.dot(right.T, left.T) * (b_scale[:, None] * a_scale[None, :])
        else:
            total += tl.dot(left, right) * (a_scale[:, None] * b_scale[None, :])
    elif SWAP:
        total = tl.dot(right.T, left.T, total)
    else:
        total = tl.dot(left, right, total)
    return total


@triton.jit
def _block_scale(
    scales, ws_row, first, column,
    COLUMNS: tl.constexpr, SCALED: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """The scales [COLUMNS] of a tile of codes of the weight; None where there are none."""
    scale = None
    if SCALED:
        if UNIFORM:
            scale = tl.full((COLUMNS,), tl.load(scales + first // 128 * ws_row), tl.float32)
        else:
            scale = tl.load(scales + column // 128 * ws_row)
    return scale


@triton.jit
def contract(
    a, start, a_scale_ptrs, a_scale_block,
    w, up, w_expert, w_row, w_col, w_scale_ptr, ws_expert, ws_row, ws_block,
    expert, first, second, before_up, N, K,
    T: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    HALVES: tl.constexpr, SWAP: tl.constexpr, A_TMA: tl.constexpr, TMA: tl.constexpr, N_INNER: tl.constexpr,
    EVEN_K: tl.constexpr, SCALED: tl.constexpr, UNIFORM: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """float32 sums [BLOCK_M, COLUMNS] of the columns from `first` on and, with two HALVES, from `second` on.

    up: what has the latter, in the strides of w, or None where w has both; scales have the columns of up from
    `before_up` on, which is 0 where w has both.
    a: pointers [BLOCK_M, BLOCK_K], the rows at their first channels; or, with A_TMA, a descriptor of rows, of which
    those from `start` on are meant. w: a descriptor of the weights [E, N, K] (or
    [E, K, N] under N_INNER), or their pointer. SCALED: codes with scales of 128 channels; BLOCK_K is 128.
    UNIFORM: each range of columns lies in one block of 128, and has one scale.
    """
    shape_m: tl.constexpr = COLUMNS if SWAP else BLOCK_M
    shape_n: tl.constexpr = BLOCK_M if SWAP else COLUMNS
    sum_0 = tl.zeros((shape_m, shape_n), tl.float32)
    sum_1 = tl.zeros((shape_m, shape_n), tl.float32)
    k = tl.arange(0, BLOCK_K)
    lane = tl.arange(0, COLUMNS)
    # Beyond the end the first column is read, which costs no mask; what comes of it is not stored.
    column_0 = tl.where(first + lane < N, first + lane, 0)
    column_1 = tl.where(second + lane < N, second + lane, 0)
    w_0 = w
    w_1 = w
    if up is not None:
        w_1 = up
    w_ptrs_0 = w_0
    w_ptrs_1 = w_1
    if not TMA:
        base = expert.to(tl.int64) * w_expert + k[:, None].to(tl.int64) * w_col
        w_ptrs_0 = w_0 + base + column_0[None, :].to(tl.int64) * w_row
        w_ptrs_1 = w_1 + base + column_1[None, :].to(tl.int64) * w_row
    a_ptrs = a
    for block in range(tl.cdiv(K, BLOCK_K)):
        at = block * BLOCK_K
        in_k = k < K - at
        if A_TMA:
            left = a.load([start, at])
        elif EVEN_K:
            left = tl.load(a_ptrs)
        else:
            left = tl.load(a_ptrs, mask=in_k[None, :], other=0.0)
        a_scale = None
        scales = None
        if SCALED:
            a_scale = tl.load(a_scale_ptrs)
            a_scale_ptrs += a_scale_block
            scales = w_scale_ptr + expert.to(tl.int64) * ws_expert + block * ws_block
        b = _weights(w_0, w_ptrs_0, expert, first, at, in_k, COLUMNS, BLOCK_K, TMA, N_INNER, EVEN_K)
        b_scale = _block_scale(scales, ws_row, first, column_0, COLUMNS, SCALED, UNIFORM)
        sum_0 = _add_product(sum_0, left, b, a_scale, b_scale, T, SWAP, SCALED, NATIVE_FP8)
        if HALVES == 2:
            b = _weights(
                w_1, w_ptrs_1, expert, second, at, in_k, COLUMNS, BLOCK_K, TMA, N_INNER, EVEN_K
            )
            b_scale = _block_scale(
                scales, ws_row, before_up + second, before_up + column_1, COLUMNS, SCALED, UNIFORM
            )
            sum_1 = _add_product(sum_1, left, b, a_scale, b_scale, T, SWAP, SCALED, NATIVE_FP8)
        if not A_TMA:
            a_ptrs += BLOCK_K
        if not TMA:
            w_ptrs_0 += BLOCK_K * w_col
            w_ptrs_1 += BLOCK_K * w_col
    if SWAP:
        sum_0 = sum_0.T
        sum_1 = sum_1.T
    return sum_0, sum_1


@triton.jit
def finish(
    sums,
    w_scale_ptr,
    bias_ptr,
    column,
    in_columns,
    T: tl.constexpr,
    CHANNEL: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Sums to T as eager has them: the scale of a channel, one rounding, and the bias added in T.

    w_scale_ptr, bias_ptr: of the expert.
    """
    if CHANNEL:
        scale = tl.load(w_scale_ptr + column, mask=in_columns, other=0.0)
        sums = sums * scale[None, :]
    y = round_to(sums, T)
    if BIAS:
        bias = tl.load(bias_ptr + column, mask=in_columns, other=0.0)
        y = round_to(to_float32(y) + to_float32(bias)[None, :], T)
    return y


@triton.jit
def quotient(a, b):
    """a / b, correctly rounded but for a few ties, for b >= 1: without the branch to a slow path that div_rn takes for
    each element, which costs an eighth of a product of 2048 channels.
    """
    if INTERPRET:
        q = tl.div_rn(a, b)
    else:
        # Scaled by powers of two, so that the reciprocal of no finite b is subnormal.
        scale = tl.where(b > 18446744073709551616.0, 2.3283064365386963e-10, 1.0)
        a *= scale
        b *= scale
        reciprocal = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [b], dtype=tl.float32, is_pure=True, pack=1
        )
        guess = a * reciprocal
        # The residual with its sign turned twice, which keeps -0. Of Inf and NaN it is NaN, and the guess is right.
        residual = tl.fma(guess, b, a * -1.0)
        q = tl.where(residual == residual, tl.fma(residual, reciprocal * -1.0, guess), guess)
    return q


@triton.jit
def clamped(x, bound):
    """x between -bound and bound; NaN is not outside, and stays."""
    x = tl.where(x > bound, bound, x)
    return tl.where(x < -bound, -bound, x)


@triton.jit
def activate(gate, up, alpha, limit, GATE: tl.constexpr):
    """The activation of `custom_ops.moe.activation.Activation` by its name, on tiles of T; roundings as in eager."""
    T: tl.constexpr = gate.dtype
    g = to_float32(gate)
    if GATE == "relu2":
        g = tl.where(g < 0, 0.0, g)  # NaN is not below 0, and stays
        out = round_to(g * g, T)
    elif GATE == "silu_mul":
        left = round_to(quotient(g, 1.0 + exp(-g)), T)
        out = round_to(to_float32(left) * to_float32(up), T)
    elif GATE == "clamped_silu_mul":
        bound = to_float32(round_to(tl.full(g.shape, limit, tl.float32), T))
        g = tl.where(g > bound, bound, g)  # NaN is not above the bound, and stays
        u = clamped(to_float32(up), bound)
        left = round_to(quotient(g, 1.0 + exp(-g)), T)
        out = round_to(to_float32(left) * u, T)
    elif GATE == "clamped_swiglu":
        bound = to_float32(round_to(tl.full(g.shape, limit, tl.float32), T))
        g = tl.where(g > bound, bound, g)
        u = clamped(to_float32(up), bound)
        inner = to_float32(round_to(g * alpha, T))
        one = tl.full(g.shape, 1.0, tl.float32)
        sigmoid = to_float32(round_to(quotient(one, one + exp(-inner)), T))
        left = round_to(g * sigmoid, T)
        out = round_to(to_float32(left) * to_float32(round_to(u + 1.0, T)), T)
    else:
        out = produce(gate, up, alpha, limit, GATE)
    return out
