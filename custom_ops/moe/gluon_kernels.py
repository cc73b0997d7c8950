"""Device side of `gluon_experts`: a persistent kernel whose warps have roles.

Four warps load weights, rows and scales, twice four multiply 64 rows each, and four finish: they take the sums of a
tile, activate, quantize and write out. The groups of the multiplying warps take turns at the matrix units where there
are scales: while one adds up, the other multiplies, and both are at the next tile while the last one is finished.
Stages go around in shared memory; a barrier says that one is full, another that both groups have read it. Sums lie
there too, once for each group.

Tiles go to whoever is free, as half blocks take half the time of whole ones: the loading warps count them in device
memory, and tell the others which one is next and which of its halves have a pair. They know it a tile ahead, so that
its indices are there when they turn to it.
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

from custom_ops.moe.gluon_finish import HALF, ROWS, finish_act, finish_pairs, finish_silu

BLOCK_M = gl.constexpr(128)
SLOTS = gl.constexpr(4)  # tiles that were told and are not all taken
LINEAR = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
# Sums take 64 KiB of the 227 that a program may have, and a stage 48.
MOST_STAGES = gl.constexpr(3)
# Of the sixteen barriers of a program, Triton takes one for each group of warps, and one more.
FIRST_FREE = 8
# Triton 3.6 calls it thread_barrier, 3.7 barrier.
_threads_wait = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def _place(tile, blocks, column_tiles, BAND: gl.constexpr):
    """The block of pairs and the tile of columns of a tile: BAND blocks run together through all columns.

    Past the last tile, that of the last one; without any, 0 and 0.
    """
    tile = gl.maximum(gl.minimum(tile, blocks * column_tiles - 1), 0)
    band = tile // (BAND * column_tiles)
    in_band = tile % (BAND * column_tiles)
    height = gl.maximum(gl.minimum(blocks - band * BAND, BAND), 1)
    return band * BAND + in_band % height, in_band // height


@gluon.jit
def _tell(tile, tiles, halves, slots, told, taken, count):
    """Of the loading warps: the count-th tile of this program, with `halves` of `_indices`; -1 past the last."""
    slot = count % SLOTS
    mbarrier.wait(taken.index(slot), (count // SLOTS & 1) ^ 1)
    code = gl.where(tile < tiles, tile * 4 + halves, -1)
    slots.index(slot).store(gl.full([1], code, gl.int32, layout=LINEAR))
    mbarrier.arrive(told.index(slot), count=1)


@gluon.jit
def _told(slots, told, taken, count):
    """Of each other group of warps: 4 * tile + halves, as `_tell` said it, or -1."""
    slot = count % SLOTS
    mbarrier.wait(told.index(slot), count // SLOTS & 1)
    code = gl.max(slots.index(slot).load(LINEAR), axis=0)
    mbarrier.arrive(taken.index(slot), count=1)
    return code


@gluon.jit
def _indices(
    tile, ids_ptr, experts_ptr, pairs, blocks, column_tiles,
    BAND: gl.constexpr, OF_ROW: gl.constexpr,
):  # fmt: skip
    """Of a tile: its block and tile of columns, the expert, the pairs of its halves [ROWS] and of both [BLOCK_M].

    Last, 1 for a pair in the first half, and 2 for one in the second: pairs come first in a block, then padding.
    """
    block, column_tile = _place(tile, blocks, column_tiles, BAND)
    ids = ids_ptr + block * BLOCK_M
    lane = gl.arange(0, ROWS, layout=OF_ROW)
    halves = (gl.load(ids) < pairs).to(gl.int32) + 2 * (gl.load(ids + ROWS) < pairs).to(gl.int32)
    return (
        block,
        column_tile,
        gl.load(experts_ptr + block),
        gl.load(ids + lane),
        gl.load(ids + ROWS + lane),
        gl.load(ids + gl.arange(0, BLOCK_M, layout=LINEAR)),
        halves,
    )


@gluon.jit
def _load(
    a, a_row, a_scale_ptr, w, w_scale_ptr, ids_ptr, experts_ptr, padded_ptr, counter_ptr, slots, told, taken,
    a_0, a_1, w_0, w_1, a_scales, w_scales_0, w_scales_1, full, empty,
    pairs, top_k, column_tiles, columns, second, rows, K, as_row, as_block, ws_expert, ws_row, ws_block,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, GATHER: gl.constexpr, SCALED: gl.constexpr,
):  # fmt: skip
    """What the loading warps do: two tiles of the weight to each stage, the rows, gathered or not, and their scales."""
    ITEM: gl.constexpr = w.dtype.primitive_bitwidth // 8
    VECTOR: gl.constexpr = 16 // ITEM
    W_BYTES: gl.constexpr = 2 * HALF * BLOCK_K * ITEM
    A_BYTES: gl.constexpr = ROWS * BLOCK_K * ITEM
    layout: gl.constexpr = gl.BlockedLayout([1, VECTOR], [4, 8], [4, 1], [1, 0])
    of_row: gl.constexpr = gl.SliceLayout(1, layout)
    k = gl.expand_dims(gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout)), 0)
    blocks = gl.load(padded_ptr) // BLOCK_M
    tiles = blocks * column_tiles
    step = 0
    tile = gl.program_id(0)
    after = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
    block, column_tile, expert, pair_0, pair_1, pair, halves = _indices(
        tile, ids_ptr, experts_ptr, pairs, blocks, column_tiles, BAND, of_row
    )
    _tell(tile, tiles, halves, slots, told, taken, 0)
    count = 1
    while tile < tiles:
        row_0 = expert * rows + column_tile * columns
        row_1 = row_0 + second
        start = block * BLOCK_M
        if GATHER:  # padding is not read: its rows are zero
            here_0 = gl.expand_dims(pair_0 < pairs, 1)
            here_1 = gl.expand_dims(pair_1 < pairs, 1)
            ptrs_0 = a + gl.expand_dims((pair_0 // top_k).to(gl.int64) * a_row, 1) + k
            ptrs_1 = a + gl.expand_dims((pair_1 // top_k).to(gl.int64) * a_row, 1) + k
        else:  # nor is a half that has no pair
            whole = halves >= 2
        if SCALED:
            here = pair < pairs
            row = pair // top_k if GATHER else start + gl.arange(0, BLOCK_M, layout=LINEAR)
            a_scale_ptrs = a_scale_ptr + row.to(gl.int64) * as_row
            first = column_tile * columns
            # Past the last group there is no column that anyone stores.
            other = gl.minimum((first + second) // 128, gl.cdiv(rows, 128) - 1)
            scales = w_scale_ptr + expert.to(gl.int64) * ws_expert
            single = gl.zeros([1], gl.int32, layout=LINEAR)
            w_scale_ptrs_0 = scales + first // 128 * ws_row + single
            w_scale_ptrs_1 = scales + other * ws_row + single
        block, column_tile, expert, pair_0, pair_1, pair, halves = _indices(
            after, ids_ptr, experts_ptr, pairs, blocks, column_tiles, BAND, of_row
        )
        for at in range(0, K, BLOCK_K):
            stage = step % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            if GATHER:
                mbarrier.expect(bar, W_BYTES)
            else:
                mbarrier.expect(bar, W_BYTES + 2 * A_BYTES, pred=whole)
                mbarrier.expect(bar, W_BYTES + A_BYTES, pred=whole == 0)
            tma.async_copy_global_to_shared(w, [row_0, at], bar, w_0.index(stage))
            tma.async_copy_global_to_shared(w, [row_1, at], bar, w_1.index(stage))
            if GATHER:
                async_copy.async_copy_global_to_shared(a_0.index(stage), ptrs_0, mask=here_0)
                async_copy.async_copy_global_to_shared(a_1.index(stage), ptrs_1, mask=here_1)
                ptrs_0 += BLOCK_K
                ptrs_1 += BLOCK_K
            else:
                tma.async_copy_global_to_shared(a, [start, at], bar, a_0.index(stage))
                tma.async_copy_global_to_shared(
                    a, [start + ROWS, at], bar, a_1.index(stage), pred=whole
                )
            if SCALED:
                async_copy.async_copy_global_to_shared(
                    a_scales.index(stage), a_scale_ptrs, mask=here
                )
                async_copy.async_copy_global_to_shared(w_scales_0.index(stage), w_scale_ptrs_0)
                async_copy.async_copy_global_to_shared(w_scales_1.index(stage), w_scale_ptrs_1)
                a_scale_ptrs += as_block
                w_scale_ptrs_0 += ws_block
                w_scale_ptrs_1 += ws_block
            if GATHER or SCALED:
                # The copies report themselves: nobody waits for them here.
                async_copy.mbarrier_arrive(bar, increment_count=False)
            step += 1
        later = gl.num_programs(0) + gl.atomic_add(counter_ptr, 1, sem="relaxed")
        _tell(after, tiles, halves, slots, told, taken, count)
        count += 1
        tile = after
        after = later


@gluon.constexpr_function
def _of_turns(what, group):
    return f"bar.{what} {FIRST_FREE + group}, 256; mov.u32 $0, $1;"


@gluon.jit
def _turns(WHAT: gl.constexpr, GROUP_INDEX: gl.constexpr):
    """Of a multiplying group: "sync" waits for the turn of a group, "arrive" says that it has come.

    Each waits as often as the other says so. When they multiply depends on it, not what.
    """
    asm: gl.constexpr = _of_turns(WHAT, GROUP_INDEX)
    nothing = gl.zeros([128], gl.int32, layout=LINEAR)
    gl.inline_asm_elementwise(asm, "=r,r", [nothing], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _product(rows, weight, zero, GROUP_INDEX: gl.constexpr):
    """rows @ weight.T [ROWS, HALF], in the turn of the group."""
    _turns("sync", GROUP_INDEX)
    product = warpgroup_mma(rows, weight.permute((1, 0)), zero, use_acc=False, is_async=True)
    _turns("arrive", 1 - GROUP_INDEX)
    return warpgroup_mma_wait(0, deps=(product,))


@gluon.jit
def _sums(
    a_tiles, w_0, w_1, a_scales, w_scales_0, w_scales_1, full, empty, step, K,
    GROUP_INDEX: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr,
    SCALED: gl.constexpr,
):  # fmt: skip
    """float32 sums [ROWS, HALF], twice, of a tile."""
    INSTRUCTION_K: gl.constexpr = 32 if SCALED else 16
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, INSTRUCTION_K]
    )
    sum_0 = gl.zeros([ROWS, HALF], gl.float32, layout=layout)
    sum_1 = gl.zeros([ROWS, HALF], gl.float32, layout=layout)
    zero = gl.zeros([ROWS, HALF], gl.float32, layout=layout)
    for at in range(0, K, BLOCK_K):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        if GATHER:  # what threads have copied, for the matrix units
            fence_async_shared()
        tile = a_tiles.index(stage)
        if SCALED:
            rows_of_group = a_scales.index(stage).slice(GROUP_INDEX * ROWS, ROWS)
            a_scale = rows_of_group.load(gl.SliceLayout(1, layout))
            w_scale_0 = gl.max(w_scales_0.index(stage).load(LINEAR), axis=0)
            w_scale_1 = gl.max(w_scales_1.index(stage).load(LINEAR), axis=0)
            product = _product(tile, w_0.index(stage), zero, GROUP_INDEX)
            sum_0 += product * gl.expand_dims(a_scale * w_scale_0, 1)
            product = _product(tile, w_1.index(stage), zero, GROUP_INDEX)
            mbarrier.arrive(empty.index(stage), count=1)
            sum_1 += product * gl.expand_dims(a_scale * w_scale_1, 1)
        else:
            sum_0 = warpgroup_mma(tile, w_0.index(stage).permute((1, 0)), sum_0, is_async=True)
            sum_1 = warpgroup_mma(tile, w_1.index(stage).permute((1, 0)), sum_1, is_async=True)
            # The two products of the step before are done, and its stage is free.
            sum_0, sum_1 = warpgroup_mma_wait(2, deps=(sum_0, sum_1))
            if at > 0:
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        step += 1
    if not SCALED:
        sum_0, sum_1 = warpgroup_mma_wait(0, deps=(sum_0, sum_1))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    return sum_0, sum_1, step


@gluon.jit
def _hand(sum_0, sum_1, sums_0, sums_1, done, free, handed, T: gl.constexpr):
    """Of a multiplying group: its sums, rounded to T, for the finishing warps, which read them in pieces."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    mbarrier.wait(free, (handed & 1) ^ 1)
    sums_0._reinterpret(T, [ROWS, HALF], layout).store(sum_0.to(T))
    sums_1._reinterpret(T, [ROWS, HALF], layout).store(sum_1.to(T))
    _threads_wait()  # as one arrives for all
    mbarrier.arrive(done, count=1)


@gluon.jit
def _finish_group(
    here, sums_0, sums_1, done, free, handed, out_ptr, out_scale_ptr, ids_ptr, start, column_tile, columns,
    pairs, width, min_amax,
    PIECE: gl.constexpr, GATE: gl.constexpr, QUANTIZE: gl.constexpr, CODE_MAX: gl.constexpr, FAST: gl.constexpr,
):  # fmt: skip
    """What a multiplying group hands over, if its rows have a pair; how often it has handed anything over by then."""
    if here != 0:
        mbarrier.wait(done, handed & 1)
        if GATE == "none":
            finish_pairs(
                sums_0, sums_1, out_ptr, ids_ptr, start, column_tile * columns, pairs, width, PIECE
            )
        elif FAST:
            finish_silu(
                sums_0, sums_1, out_ptr, out_scale_ptr, start, column_tile, width, min_amax, PIECE, CODE_MAX
            )  # fmt: skip
        else:
            finish_act(
                sums_0, sums_1, out_ptr, out_scale_ptr, start, column_tile, width, min_amax,
                PIECE, GATE, QUANTIZE, CODE_MAX,
            )  # fmt: skip
        _threads_wait()  # as one arrives for all
        mbarrier.arrive(free, count=1)
        handed += 1
    return handed


@gluon.jit
def _finish(
    out_ptr, out_scale_ptr, ids_ptr, padded_ptr, slots, told, taken, g0_0, g0_1, g1_0, g1_1, done, free,
    pairs, column_tiles, columns, width, min_amax,
    PIECE: gl.constexpr, GATE: gl.constexpr, QUANTIZE: gl.constexpr, CODE_MAX: gl.constexpr, BAND: gl.constexpr,
    FAST: gl.constexpr,
):  # fmt: skip
    """What the finishing warps do, while the others are at the next tile."""
    blocks = gl.load(padded_ptr) // BLOCK_M
    handed_0 = 0
    handed_1 = 0
    count = 0
    code = _told(slots, told, taken, count)
    while code >= 0:
        block, column_tile = _place(code >> 2, blocks, column_tiles, BAND)
        start = block * BLOCK_M
        handed_0 = _finish_group(
            code & 1, g0_0, g0_1, done.index(0), free.index(0), handed_0, out_ptr, out_scale_ptr, ids_ptr, start,
            column_tile, columns, pairs, width, min_amax, PIECE, GATE, QUANTIZE, CODE_MAX, FAST,
        )  # fmt: skip
        handed_1 = _finish_group(
            code & 2, g1_0, g1_1, done.index(1), free.index(1), handed_1, out_ptr, out_scale_ptr, ids_ptr, start + ROWS,
            column_tile, columns, pairs, width, min_amax, PIECE, GATE, QUANTIZE, CODE_MAX, FAST,
        )  # fmt: skip
        count += 1
        code = _told(slots, told, taken, count)


@gluon.jit
def _multiply(
    slots, told, taken, sums_0, sums_1, done, free, a_tiles, w_0, w_1, a_scales, w_scales_0, w_scales_1, full, empty, K,
    GROUP_INDEX: gl.constexpr, T: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, GATHER: gl.constexpr,
    SCALED: gl.constexpr,
):  # fmt: skip
    """What the multiplying warps of a group do: 64 rows of each block."""
    step = 0
    count = 0
    handed = 0
    if SCALED and GROUP_INDEX == 1:
        _turns("arrive", 0)  # which is the first
    code = _told(slots, told, taken, count)
    while code >= 0:
        if (code >> GROUP_INDEX) & 1:
            sum_0, sum_1, step = _sums(
                a_tiles, w_0, w_1, a_scales, w_scales_0, w_scales_1, full, empty, step, K,
                GROUP_INDEX, BLOCK_K, STAGES, GATHER, SCALED,
            )  # fmt: skip
            of_done, of_free = done.index(GROUP_INDEX), free.index(GROUP_INDEX)
            _hand(sum_0, sum_1, sums_0, sums_1, of_done, of_free, handed, T)
            handed += 1
        else:
            for _ in range(0, K, BLOCK_K):
                stage = step % STAGES
                mbarrier.wait(full.index(stage), step // STAGES & 1)
                mbarrier.arrive(empty.index(stage), count=1)
                if SCALED:
                    for _ in gl.static_range(2):
                        _turns("sync", GROUP_INDEX)
                        _turns("arrive", 1 - GROUP_INDEX)
                step += 1
        count += 1
        code = _told(slots, told, taken, count)
    if SCALED and GROUP_INDEX == 0:
        _turns("sync", 0)  # that nothing is left of it


@gluon.jit(do_not_specialize=["pairs"])
def grouped(
    a, a_row, a_scale_ptr, w, w_scale_ptr, out_ptr, out_scale_ptr, ids_ptr, experts_ptr, padded_ptr, counter_ptr,
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
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    a_scales = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], plain)
    w_scales_0 = gl.allocate_shared_memory(gl.float32, [STAGES, 1], plain)
    w_scales_1 = gl.allocate_shared_memory(gl.float32, [STAGES, 1], plain)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    slots = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], plain)
    told = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(told.index(slot), count=1)
        mbarrier.init(taken.index(slot), count=3)
    # One arrival tells how many bytes come; each loading thread tells of the rows and scales that it copies.
    ARRIVALS: gl.constexpr = 129 if GATHER or SCALED else 1
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ARRIVALS)
        mbarrier.init(empty.index(stage), count=2)
    # Rows that are finished at a time: finishing warps have few registers, and an activation is more than a copy.
    FAST: gl.constexpr = GATE == "silu_mul" and QUANTIZE and gl.bfloat16 == T
    PIECE: gl.constexpr = 32 if GATE == "none" else (16 if FAST else 8)
    of_sums: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    g0_0 = gl.allocate_shared_memory(T, [ROWS // PIECE, PIECE, HALF], of_sums)
    g0_1 = gl.allocate_shared_memory(T, [ROWS // PIECE, PIECE, HALF], of_sums)
    g1_0 = gl.allocate_shared_memory(T, [ROWS // PIECE, PIECE, HALF], of_sums)
    g1_1 = gl.allocate_shared_memory(T, [ROWS // PIECE, PIECE, HALF], of_sums)
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(2):
        mbarrier.init(done.index(group), count=1)
        mbarrier.init(free.index(group), count=1)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    slots, told, taken, g0_0, g0_1, done, free, a_0, w_0, w_1,
                    a_scales, w_scales_0, w_scales_1, full, empty, K, 0, T, BLOCK_K, STAGES, GATHER, SCALED,
                ),
            ),
            (
                _multiply,
                (
                    slots, told, taken, g1_0, g1_1, done, free, a_1, w_0, w_1,
                    a_scales, w_scales_0, w_scales_1, full, empty, K, 1, T, BLOCK_K, STAGES, GATHER, SCALED,
                ),
            ),
            (
                _load,
                (
                    a, a_row, a_scale_ptr, w, w_scale_ptr, ids_ptr, experts_ptr, padded_ptr, counter_ptr,
                    slots, told, taken, a_0, a_1, w_0, w_1, a_scales, w_scales_0, w_scales_1, full, empty,
                    pairs, top_k, column_tiles, columns, second, rows, K,
                    as_row, as_block, ws_expert, ws_row, ws_block, BLOCK_K, STAGES, BAND, GATHER, SCALED,
                ),
            ),
            (
                _finish,
                (
                    out_ptr, out_scale_ptr, ids_ptr, padded_ptr, slots, told, taken,
                    g0_0, g0_1, g1_0, g1_1, done, free, pairs, column_tiles, columns, width, min_amax,
                    PIECE, GATE, QUANTIZE, CODE_MAX, BAND, FAST,
                ),
            ),
        ],
        [4, 4, 4],
        [208, 48, 48],  # registers, of which the first group has what these leave
    )  # fmt: skip
