"""Device side of `gluon_experts`: a persistent kernel whose warps have roles.

One warp loads weights, four gather rows, and twice four multiply 64 rows each: while one of these adds up, the other
keeps the matrix units busy, and loads run ahead while both write out. Stages go around in shared memory; a barrier
says that one is full, another that both have read it.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from custom_ops.moe.triton_products import activate

BLOCK_M = gl.constexpr(128)
ROWS = gl.constexpr(64)  # of a warp group
HALF = gl.constexpr(128)  # columns of one of the two sums of a tile


@gluon.jit
def _place(tile, blocks, column_tiles, BAND: gl.constexpr):
    """The block of pairs and the tile of columns of a tile: BAND blocks run together through all columns."""
    band = tile // (BAND * column_tiles)
    in_band = tile % (BAND * column_tiles)
    height = gl.minimum(blocks - band * BAND, BAND)
    return band * BAND + in_band % height, in_band // height


@gluon.jit
def _load(
    a, w, experts_ptr, padded_ptr, a_0, a_1, w_0, w_1, full, empty, column_tiles, columns, second, rows, K,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, GATHER: gl.constexpr,
):  # fmt: skip
    """What the loading warp does: two tiles of the weight to each stage and, unless they are gathered, the rows."""
    ITEM: gl.constexpr = w.dtype.primitive_bitwidth // 8
    W_BYTES: gl.constexpr = 2 * HALF * BLOCK_K * ITEM
    BYTES: gl.constexpr = W_BYTES if GATHER else W_BYTES + BLOCK_M * BLOCK_K * ITEM
    blocks = gl.load(padded_ptr) // BLOCK_M
    step = 0
    for tile in range(gl.program_id(0), blocks * column_tiles, gl.num_programs(0)):
        block, column_tile = _place(tile, blocks, column_tiles, BAND)
        row_0 = gl.load(experts_ptr + block) * rows + column_tile * columns
        row_1 = row_0 + second
        start = block * BLOCK_M
        for at in range(0, K, BLOCK_K):
            stage = step % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(bar, BYTES)
            tma.async_copy_global_to_shared(w, [row_0, at], bar, w_0.index(stage))
            tma.async_copy_global_to_shared(w, [row_1, at], bar, w_1.index(stage))
            if not GATHER:
                tma.async_copy_global_to_shared(a, [start, at], bar, a_0.index(stage))
                tma.async_copy_global_to_shared(a, [start + ROWS, at], bar, a_1.index(stage))
            step += 1


@gluon.jit
def _gather(
    a, a_row, ids_ptr, padded_ptr, a_0, a_1, full, empty, pairs, top_k, column_tiles, K,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, VECTOR: gl.constexpr,
):  # fmt: skip
    """What the gathering warps do: the rows of the tokens of pairs to each stage, reported LATER steps later.

    The copies of a step have the time of the next ones to arrive before they are fenced for the matrix units. With
    fewer than STAGES steps under way, the step that is waited for, STAGES earlier, has been reported.
    """
    LATER: gl.constexpr = 2 if STAGES > 2 else 1
    layout: gl.constexpr = gl.BlockedLayout([1, VECTOR], [4, 8], [4, 1], [1, 0])
    blocks = gl.load(padded_ptr) // BLOCK_M
    step = 0
    for tile in range(gl.program_id(0), blocks * column_tiles, gl.num_programs(0)):
        block, _ = _place(tile, blocks, column_tiles, BAND)
        start = block * BLOCK_M
        lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
        pair_0 = gl.load(ids_ptr + start + lane)
        pair_1 = gl.load(ids_ptr + start + ROWS + lane)
        # Padding is not read: its rows are zero.
        here_0 = gl.expand_dims(pair_0 < pairs, 1)
        here_1 = gl.expand_dims(pair_1 < pairs, 1)
        ptrs_0 = (
            a + gl.expand_dims((pair_0 // top_k).to(gl.int64) * a_row, 1) + gl.expand_dims(k, 0)
        )
        ptrs_1 = (
            a + gl.expand_dims((pair_1 // top_k).to(gl.int64) * a_row, 1) + gl.expand_dims(k, 0)
        )
        for _ in range(0, K, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            async_copy.async_copy_global_to_shared(a_0.index(stage), ptrs_0, mask=here_0)
            async_copy.async_copy_global_to_shared(a_1.index(stage), ptrs_1, mask=here_1)
            async_copy.commit_group()
            async_copy.wait_group(LATER)
            fence_async_shared()
            if step >= LATER:
                mbarrier.arrive(full.index((step + STAGES - LATER) % STAGES), count=1)
            ptrs_0 += BLOCK_K
            ptrs_1 += BLOCK_K
            step += 1
    async_copy.wait_group(0)
    fence_async_shared()
    for left in gl.static_range(LATER):  # the oldest first
        if step + left >= LATER:
            mbarrier.arrive(full.index((step + STAGES - LATER + left) % STAGES), count=1)


@gluon.jit
def _sums(
    a_tiles, w_0, w_1, full, empty, step, a_scale_ptrs, as_block, ws_ptr_0, ws_ptr_1, ws_block, K,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """float32 sums [ROWS, HALF], twice, of a tile."""
    INSTRUCTION_K: gl.constexpr = 32 if SCALED else 16
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, INSTRUCTION_K]
    )
    sum_0 = gl.zeros([ROWS, HALF], gl.float32, layout=layout)
    sum_1 = gl.zeros([ROWS, HALF], gl.float32, layout=layout)
    if SCALED:
        zero = gl.zeros([ROWS, HALF], gl.float32, layout=layout)
        # Scales are read one step ahead: memory is slower than a step.
        a_scale = gl.load(a_scale_ptrs)
        w_scale_0 = gl.load(ws_ptr_0)
        w_scale_1 = gl.load(ws_ptr_1)
        for at in range(0, K, BLOCK_K):
            more = at + BLOCK_K < K
            a_scale_ptrs += as_block
            ws_ptr_0 += ws_block
            ws_ptr_1 += ws_block
            a_next = gl.load(a_scale_ptrs, mask=more, other=0.0)
            next_0 = gl.load(ws_ptr_0, mask=more, other=0.0)
            next_1 = gl.load(ws_ptr_1, mask=more, other=0.0)
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            tile = a_tiles.index(stage)
            product = warpgroup_mma(
                tile, w_0.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            product = warpgroup_mma_wait(0, deps=(product,))
            sum_0 += product * gl.expand_dims(a_scale * w_scale_0, 1)
            product = warpgroup_mma(
                tile, w_1.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
            )
            product = warpgroup_mma_wait(0, deps=(product,))
            mbarrier.arrive(empty.index(stage), count=1)
            sum_1 += product * gl.expand_dims(a_scale * w_scale_1, 1)
            a_scale = a_next
            w_scale_0 = next_0
            w_scale_1 = next_1
            step += 1
    else:
        for at in range(0, K, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            tile = a_tiles.index(stage)
            sum_0 = warpgroup_mma(tile, w_0.index(stage).permute((1, 0)), sum_0, is_async=True)
            sum_1 = warpgroup_mma(tile, w_1.index(stage).permute((1, 0)), sum_1, is_async=True)
            # The two products of the step before are done, and its stage is free.
            sum_0, sum_1 = warpgroup_mma_wait(2, deps=(sum_0, sum_1))
            if at > 0:
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
            step += 1
        sum_0, sum_1 = warpgroup_mma_wait(0, deps=(sum_0, sum_1))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    return sum_0, sum_1, step


@gluon.jit
def _write_act(
    out, out_ptr, out_scale_ptr, start, column_tile, width, min_amax,
    QUANTIZE: gl.constexpr, CODE_MAX: gl.constexpr,
):  # fmt: skip
    """[ROWS, HALF] of the activation, or its codes and their scales: HALF channels are one group."""
    first = column_tile * HALF
    VECTOR: gl.constexpr = 16 if QUANTIZE else 8
    layout: gl.constexpr = gl.BlockedLayout(
        [1, VECTOR], [4, 8] if QUANTIZE else [2, 16], [4, 1], [1, 0]
    )
    if QUANTIZE:
        v = out.to(gl.float32)
        of_tile: gl.constexpr = v.type.layout
        of_row: gl.constexpr = gl.SliceLayout(1, of_tile)
        largest = gl.max(v.to(gl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
        lowest = gl.full([ROWS], min_amax, gl.float32, layout=of_row)
        amax = gl.maximum(largest, lowest.to(gl.int32, bitcast=True)).to(gl.float32, bitcast=True)
        scale = gl.div_rn(amax, gl.full([ROWS], CODE_MAX, gl.float32, layout=of_row))
        row = start.to(gl.int64) + gl.arange(0, ROWS, layout=of_row)
        gl.store(out_scale_ptr + row * (width // HALF) + column_tile, scale)
        # v / scale, correctly rounded: `unsupported` lets through no bound that makes a scale subnormal.
        one = gl.full([ROWS], 1.0, gl.float32, layout=of_row)
        zero = gl.full([ROWS, HALF], 0.0, gl.float32, layout=of_tile)
        reciprocal = zero + gl.expand_dims(gl.div_rn(one, scale), 1)
        guess = v * reciprocal
        residual = gl.fma(guess, zero + gl.expand_dims(scale, 1), v * -1.0)
        better = gl.fma(residual, reciprocal * -1.0, guess)
        codes = gl.where(residual == residual, better, guess).to(gl.float8e4nv)
        tile = gl.convert_layout(codes.to(gl.uint8, bitcast=True), layout)
    else:
        tile = gl.convert_layout(out, layout)
    row = start.to(gl.int64) + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    column = first + gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))
    place = out_ptr + gl.expand_dims(row * width, 1) + gl.expand_dims(column, 0)
    gl.store(place, tile, mask=gl.expand_dims(column < width, 0))


@gluon.jit
def _write_pairs(out, out_ptr, ids_ptr, start, first, pairs, N):
    """[ROWS, HALF] of the second product, at the places of its pairs."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    tile = gl.convert_layout(out, layout)
    pair = gl.load(ids_ptr + start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)))
    column = first + gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))
    place = out_ptr + gl.expand_dims(pair.to(gl.int64) * N, 1) + gl.expand_dims(column, 0)
    gl.store(place, tile, mask=gl.expand_dims(pair < pairs, 1) & gl.expand_dims(column < N, 0))


@gluon.jit
def _multiply(
    a_scale_ptr, w_scale_ptr, out_ptr, out_scale_ptr, ids_ptr, experts_ptr, padded_ptr,
    a_tiles, w_0, w_1, full, empty, pairs, top_k, column_tiles, columns, second, width, K,
    as_row, as_block, ws_expert, ws_row, ws_block, min_amax,
    GROUP_INDEX: gl.constexpr, T: gl.constexpr, GATE: gl.constexpr, QUANTIZE: gl.constexpr, CODE_MAX: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, GATHER: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """What the multiplying warps of a group do: 64 rows of each block."""
    blocks = gl.load(padded_ptr) // BLOCK_M
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32 if SCALED else 16]
    )
    step = 0
    for tile in range(gl.program_id(0), blocks * column_tiles, gl.num_programs(0)):
        block, column_tile = _place(tile, blocks, column_tiles, BAND)
        expert = gl.load(experts_ptr + block)
        start = block * BLOCK_M + GROUP_INDEX * ROWS
        first = column_tile * columns
        # Pairs come first in a block, then padding: of a block that is half full, the second half is nothing.
        if gl.load(ids_ptr + start) < pairs:
            a_scale_ptrs = a_scale_ptr
            ws_ptr_0 = w_scale_ptr
            ws_ptr_1 = w_scale_ptr
            if SCALED:
                lane = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
                if GATHER:
                    pair = gl.load(ids_ptr + lane)
                    token = gl.where(pair < pairs, pair // top_k, 0)
                    a_scale_ptrs = a_scale_ptr + token.to(gl.int64) * as_row
                else:
                    a_scale_ptrs = a_scale_ptr + lane.to(gl.int64) * as_row
                scales = w_scale_ptr + expert.to(gl.int64) * ws_expert
                ws_ptr_0 = scales + first // 128 * ws_row
                # Past the last block there is no column that anyone stores.
                most = gl.cdiv(width if GATE == "none" else 2 * width, 128) - 1
                ws_ptr_1 = scales + gl.minimum((first + second) // 128, most) * ws_row
            sum_0, sum_1, step = _sums(
                a_tiles, w_0, w_1, full, empty, step, a_scale_ptrs, as_block, ws_ptr_0, ws_ptr_1, ws_block, K,
                BLOCK_K, STAGES, SCALED,
            )  # fmt: skip
            if GATE == "none":
                _write_pairs(sum_0.to(T), out_ptr, ids_ptr, start, first, pairs, width)
                _write_pairs(sum_1.to(T), out_ptr, ids_ptr, start, first + second, pairs, width)
            else:
                out = activate(sum_0.to(T), sum_1.to(T), 0.0, 0.0, GATE)
                _write_act(
                    out, out_ptr, out_scale_ptr, start, column_tile, width, min_amax, QUANTIZE, CODE_MAX
                )  # fmt: skip
        else:
            for _ in range(0, K, BLOCK_K):
                stage = step % STAGES
                mbarrier.wait(full.index(stage), step // STAGES & 1)
                mbarrier.arrive(empty.index(stage), count=1)
                step += 1


@gluon.jit(do_not_specialize=["pairs"])
def grouped(
    a, a_row, a_scale_ptr, w, w_scale_ptr, out_ptr, out_scale_ptr, ids_ptr, experts_ptr, padded_ptr,
    pairs, top_k, column_tiles, columns, second, rows, width, K,
    as_row, as_block, ws_expert, ws_row, ws_block, min_amax,
    T: gl.constexpr, GATE: gl.constexpr, QUANTIZE: gl.constexpr, CODE_MAX: gl.constexpr,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, SCALED: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """GATE "none": the second product of experts, of 2 * HALF columns a tile; else the first, of HALF and HALF."""
    GATHER: gl.constexpr = GATE != "none"
    ITEM: gl.constexpr = w.dtype.primitive_bitwidth
    shared: gl.constexpr = gl.NVMMASharedLayout(128, ITEM, 2)
    a_0 = gl.allocate_shared_memory(w.dtype, [STAGES, ROWS, BLOCK_K], shared)
    a_1 = gl.allocate_shared_memory(w.dtype, [STAGES, ROWS, BLOCK_K], shared)
    w_0 = gl.allocate_shared_memory(w.dtype, [STAGES, HALF, BLOCK_K], shared)
    w_1 = gl.allocate_shared_memory(w.dtype, [STAGES, HALF, BLOCK_K], shared)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # One arrival tells how many bytes come, one that gathered rows are there.
    ARRIVALS: gl.constexpr = 2 if GATHER else 1
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ARRIVALS)
        mbarrier.init(empty.index(stage), count=2)
    if GATHER:
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (
                        a_scale_ptr, w_scale_ptr, out_ptr, out_scale_ptr, ids_ptr, experts_ptr, padded_ptr,
                        a_0, w_0, w_1, full, empty, pairs, top_k, column_tiles, columns, second, width, K,
                        as_row, as_block, ws_expert, ws_row, ws_block, min_amax,
                        0, T, GATE, QUANTIZE, CODE_MAX, BLOCK_K, STAGES, BAND, GATHER, SCALED,
                    ),
                ),
                (
                    _multiply,
                    (
                        a_scale_ptr, w_scale_ptr, out_ptr, out_scale_ptr, ids_ptr, experts_ptr, padded_ptr,
                        a_1, w_0, w_1, full, empty, pairs, top_k, column_tiles, columns, second, width, K,
                        as_row, as_block, ws_expert, ws_row, ws_block, min_amax,
                        1, T, GATE, QUANTIZE, CODE_MAX, BLOCK_K, STAGES, BAND, GATHER, SCALED,
                    ),
                ),
                (
                    _load,
                    (
                        a, w, experts_ptr, padded_ptr, a_0, a_1, w_0, w_1, full, empty,
                        column_tiles, columns, second, rows, K, BLOCK_K, STAGES, BAND, GATHER,
                    ),
                ),
                (
                    _gather,
                    (
                        a, a_row, ids_ptr, padded_ptr, a_0, a_1, full, empty, pairs, top_k, column_tiles, K,
                        BLOCK_K, STAGES, BAND, 128 // ITEM,
                    ),
                ),
            ],
            [4, 1, 4],
            [216, 24, 56],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _multiply,
                    (
                        a_scale_ptr, w_scale_ptr, out_ptr, out_scale_ptr, ids_ptr, experts_ptr, padded_ptr,
                        a_0, w_0, w_1, full, empty, pairs, top_k, column_tiles, columns, second, width, K,
                        as_row, as_block, ws_expert, ws_row, ws_block, min_amax,
                        0, T, GATE, QUANTIZE, CODE_MAX, BLOCK_K, STAGES, BAND, GATHER, SCALED,
                    ),
                ),
                (
                    _multiply,
                    (
                        a_scale_ptr, w_scale_ptr, out_ptr, out_scale_ptr, ids_ptr, experts_ptr, padded_ptr,
                        a_1, w_0, w_1, full, empty, pairs, top_k, column_tiles, columns, second, width, K,
                        as_row, as_block, ws_expert, ws_row, ws_block, min_amax,
                        1, T, GATE, QUANTIZE, CODE_MAX, BLOCK_K, STAGES, BAND, GATHER, SCALED,
                    ),
                ),
                (
                    _load,
                    (
                        a, w, experts_ptr, padded_ptr, a_0, a_1, w_0, w_1, full, empty,
                        column_tiles, columns, second, rows, K, BLOCK_K, STAGES, BAND, GATHER,
                    ),
                ),
            ],
            [4, 1],
            [232, 40],
        )  # fmt: skip
