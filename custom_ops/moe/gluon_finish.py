"""How the finishing warps of `gluon_kernels` finish sums, which lie in shared memory in pieces of some rows."""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from custom_ops.moe.triton_products import activate

ROWS = gl.constexpr(64)  # of a warp group
HALF = gl.constexpr(128)  # columns of one of the two sums of a tile


@gluon.jit
def finish_act(
    sums_0, sums_1, out_ptr, out_scale_ptr, start, column_tile, width, min_amax,
    PIECE: gl.constexpr, GATE: gl.constexpr, QUANTIZE: gl.constexpr, CODE_MAX: gl.constexpr,
):  # fmt: skip
    """[ROWS, HALF] of the activation, or its codes and their scales: HALF channels are one group.

    A warp has whole rows, so that their largest value is found within it.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    of_row: gl.constexpr = gl.SliceLayout(1, layout)
    for piece in range(ROWS // PIECE):
        out = activate(
            sums_0.index(piece).load(layout), sums_1.index(piece).load(layout), 0.0, 0.0, GATE
        )
        row = start.to(gl.int64) + piece * PIECE + gl.arange(0, PIECE, layout=of_row)
        column = column_tile * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))
        place = out_ptr + gl.expand_dims(row * width, 1) + gl.expand_dims(column, 0)
        if QUANTIZE:
            v = out.to(gl.float32)
            largest = gl.max(v.to(gl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
            lowest = gl.full([PIECE], min_amax, gl.float32, layout=of_row)
            amax = gl.maximum(largest, lowest.to(gl.int32, bitcast=True)).to(
                gl.float32, bitcast=True
            )
            scale = gl.div_rn(amax, gl.full([PIECE], CODE_MAX, gl.float32, layout=of_row))
            gl.store(out_scale_ptr + row * (width // HALF) + column_tile, scale)
            # v / scale, correctly rounded: `unsupported` lets through no bound that makes a scale subnormal.
            one = gl.full([PIECE], 1.0, gl.float32, layout=of_row)
            zero = gl.full([PIECE, HALF], 0.0, gl.float32, layout=layout)
            reciprocal = zero + gl.expand_dims(gl.div_rn(one, scale), 1)
            guess = v * reciprocal
            residual = gl.fma(guess, zero + gl.expand_dims(scale, 1), v * -1.0)
            better = gl.fma(residual, reciprocal * -1.0, guess)
            codes = gl.where(residual == residual, better, guess).to(gl.float8e4nv)
            gl.store(place, codes.to(gl.uint8, bitcast=True))
        else:
            gl.store(place, out, mask=gl.expand_dims(column < width, 0))


@gluon.constexpr_function
def _of_silus():
    """PTX of two bfloat16 in a word: silu(gate) * up, rounded as in eager, from the words of gates and of ups.

    A quarter of 1 + exp(-gate) is inverted, so that no inverse is subnormal, which the fast one would make zero; a
    sum beyond float32 makes it zero in eager too. The factor is log2(e), one bit less: with it, as with seven beside
    it, none of all bfloat16 comes out other than by exact steps, once it is rounded.
    """
    silus = "".join(
        f"mul.f32 t, {x}, 0fBFB8AA3A; ex2.approx.ftz.f32 t, t; fma.rn.f32 t, t, 0f3E800000, 0f3E800000;"
        f"rcp.approx.ftz.f32 t, t; mul.f32 {x}, {x}, 0f3E800000; mul.f32 {x}, {x}, t;"
        for x in ("low", "high")
    )
    return (
        "{ .reg .f32 low, high, t; .reg .b32 both; shl.b32 both, $1, 16; mov.b32 low, both;"
        "and.b32 both, $1, 0xffff0000; mov.b32 high, both;"
        f"{silus} cvt.rn.bf16x2.f32 both, high, low; mul.rn.bf16x2 $0, both, $2; }}"
    )


@gluon.jit
def silus(gates, ups):
    asm: gl.constexpr = _of_silus()
    return gl.inline_asm_elementwise(
        asm, "=r,r,r", [gates, ups], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def finish_silu(
    sums_0, sums_1, out_ptr, out_scale_ptr, start, column_tile, width, min_amax,
    PIECE: gl.constexpr, CODE_MAX: gl.constexpr,
):  # fmt: skip
    """What `finish_act` does with SiLU to bfloat16 that become codes, in fewer instructions.

    The multiplying warps wait for each of them. So two numbers are a word, eight threads share a row, and a scale and
    its inverse come from products and a fast inverse, corrected: no bound that `unsupported` lets through makes them
    subnormal, where these would differ.
    """
    WORDS: gl.constexpr = HALF // 2
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    of_words: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    of_row: gl.constexpr = gl.SliceLayout(1, layout)
    row = start.to(gl.int64) + gl.arange(0, PIECE, layout=of_row)
    word = column_tile * WORDS + gl.arange(0, WORDS, layout=gl.SliceLayout(0, layout))
    place = out_ptr.to(gl.pointer_type(gl.int16), bitcast=True)
    place += gl.expand_dims(row * (width // 2), 1) + gl.expand_dims(word, 0)
    place_of_scale = out_scale_ptr + row * (width // HALF) + column_tile
    nothing = gl.zeros([PIECE], gl.float32, layout=of_row)
    zero = gl.zeros([PIECE, WORDS], gl.float32, layout=layout)
    for piece in range(ROWS // PIECE):
        gates = sums_0.index(piece)._reinterpret(gl.int32, [PIECE, WORDS], of_words).load(layout)
        ups = sums_1.index(piece)._reinterpret(gl.int32, [PIECE, WORDS], of_words).load(layout)
        both = silus(gates, ups)
        low = (both << 16).to(gl.float32, bitcast=True)
        high = (both & -65536).to(gl.float32, bitcast=True)
        larger = gl.maximum(gl.abs(low), gl.abs(high), propagate_nan=tl.PropagateNan.ALL)
        largest = gl.max(larger.to(gl.int32, bitcast=True), axis=1)
        lowest = (nothing + min_amax).to(gl.int32, bitcast=True)
        amax = gl.maximum(largest, lowest).to(gl.float32, bitcast=True)
        # amax / CODE_MAX and its inverse, correctly rounded; without end and 0 where there is no end to amax.
        endless = largest == 0x7F800000
        guess = amax * (1.0 / CODE_MAX)
        scale = gl.fma(gl.fma(guess, nothing - CODE_MAX, amax), nothing + 1.0 / CODE_MAX, guess)
        inverse = gl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [scale], dtype=gl.float32, is_pure=True, pack=1
        )
        inverse = gl.fma(gl.fma(scale * -1.0, inverse, nothing + 1.0), inverse, inverse)
        gl.store(place_of_scale, gl.where(endless, amax, scale))
        # Times 0, a number is 0, and others are none, as if divided by a scale without end.
        scale = zero + gl.expand_dims(gl.where(endless, 0.0, scale), 1)
        inverse = zero + gl.expand_dims(gl.where(endless, 0.0, inverse), 1)
        codes = gl.inline_asm_elementwise(
            "cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;", "=h,f,f",
            [_divided(high, scale, inverse), _divided(low, scale, inverse)],
            dtype=gl.int16, is_pure=True, pack=1,
        )  # fmt: skip
        gl.store(place, codes)
        place += PIECE * (width // 2)
        place_of_scale += PIECE * (width // HALF)


@gluon.jit
def _divided(v, scale, inverse):
    """v / scale, correctly rounded, by the correctly rounded inverse."""
    guess = v * inverse
    return gl.fma(gl.fma(guess, scale, v * -1.0), inverse * -1.0, guess)


@gluon.jit
def finish_pairs(sums_0, sums_1, out_ptr, ids_ptr, start, first, pairs, N, PIECE: gl.constexpr):
    """[ROWS, HALF], twice, of the second product, at the places of its pairs."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    column = first + gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))
    for piece in gl.static_range(ROWS // PIECE):
        row = start + piece * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(1, layout))
        pair = gl.load(ids_ptr + row)
        tile_0 = sums_0.index(piece).load(layout)
        tile_1 = sums_1.index(piece).load(layout)
        place = out_ptr + gl.expand_dims(pair.to(gl.int64) * N, 1) + gl.expand_dims(column, 0)
        here = gl.expand_dims(pair < pairs, 1)
        gl.store(place, tile_0, mask=here & gl.expand_dims(column < N, 0))
        gl.store(place + HALF, tile_1, mask=here & gl.expand_dims(column + HALF < N, 0))
