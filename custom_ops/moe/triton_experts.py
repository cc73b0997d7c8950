"""The two grouped products of experts in Triton, on pairs that `moe_align_block_size` has sorted.

`gate_up` gathers the rows of tokens, multiplies them by both halves of the weight, and applies the activation (and
the quantization in groups of 128) in registers; `down` multiplies what `gate_up` wrote, and scatters to the pairs.
Each rounds to the dtype of the activations where eager PyTorch has a tensor of it.
"""

from __future__ import annotations

from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.moe.activation import Activation
from custom_ops.moe.tiles import Aligned, Tile, choose
from custom_ops.moe.triton_operands import (
    GROUP,
    asked_for,
    constants,
    fitting,
    of_both,
    pointer,
    resident,
    rows_by_descriptor,
    rows_operands,
    strides,
    vector,
    weight_operand,
)
from custom_ops.moe.triton_products import activate, ask_for, contract, finish, place
from custom_ops.platform import on_device
from custom_ops.quantization.triton_codes import codes_of, magnitude_bits, scale_of
from custom_ops.scales import as_rows, code_max


@triton.jit
def sorted_pairs(sorted_ids_ptr, start, BLOCK_M: tl.constexpr):
    """The pairs of a block that begins at `start`, and the rows that the first product keeps them in."""
    position = start.to(tl.int64) + tl.arange(0, BLOCK_M)
    return tl.load(sorted_ids_ptr + position), position


@triton.jit
def gate_up_tile(
    x_ptr, x_scale_ptr, w, up_w, w_scale_ptr, bias_ptr, out_ptr, out_scale_ptr,
    pair, position, expert, column_tile, pairs, top_k, width, K,
    x_row, xs_row, xs_block, w_expert, w_row, w_col, ws_expert, ws_row, ws_block, bias_expert,
    alpha, limit, min_amax,
    T: tl.constexpr, GATE: tl.constexpr, INTERLEAVED: tl.constexpr, QUANTIZE: tl.constexpr,
    SCALE_MODE: tl.constexpr, CODE_MODE: tl.constexpr, CODE_MAX: tl.constexpr, NATIVE_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    TMA: tl.constexpr, N_INNER: tl.constexpr, EVEN_K: tl.constexpr, SCALED: tl.constexpr,
    UNIFORM: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of the activation, of these pairs to the rows at `position`; a pair from `pairs` on is none.

    PADDED: there are rows for those, too.
    """
    # Padding reads the row of the first token; what comes of it lies where nobody reads.
    token = tl.where(pair < pairs, pair // top_k, 0).to(tl.int64)
    x_ptrs = x_ptr + (token * x_row)[:, None] + tl.arange(0, BLOCK_K)[None, :]
    x_scale_ptrs = x_scale_ptr
    if SCALED:
        x_scale_ptrs = x_scale_ptr + token * xs_row
    GATED: tl.constexpr = GATE != "relu2"
    COLUMNS: tl.constexpr = 2 * BLOCK_N if INTERLEAVED else BLOCK_N
    HALVES: tl.constexpr = 2 if GATED and not INTERLEAVED else 1
    first = column_tile * COLUMNS
    rows = 2 * width if GATED else width
    second = width + first
    before_up = 0
    rows_of_w = rows
    if up_w is not None:
        second = first
        before_up = width
        rows_of_w = width
    sum_0, sum_1 = contract(
        x_ptrs, 0, x_scale_ptrs, xs_block,
        w, up_w, w_expert, w_row, w_col, w_scale_ptr, ws_expert, ws_row, ws_block,
        expert, first, second, before_up, rows_of_w, K,
        T, BLOCK_M, COLUMNS, BLOCK_K, HALVES, SWAP, False, TMA, N_INNER, EVEN_K, SCALED, UNIFORM, NATIVE_FP8,
    )  # fmt: skip
    scales = w_scale_ptr
    if CHANNEL:
        scales = w_scale_ptr + expert.to(tl.int64) * ws_expert
    biases = bias_ptr
    if BIAS:
        biases = bias_ptr + expert.to(tl.int64) * bias_expert
    lane = first + tl.arange(0, COLUMNS)
    gate = finish(sum_0, scales, biases, lane, lane < rows, T, CHANNEL, BIAS)
    up = gate
    if INTERLEAVED:
        gate, up = tl.split(tl.reshape(gate, (BLOCK_M, BLOCK_N, 2)))
    elif GATED:
        up = finish(sum_1, scales, biases, width + lane, lane < width, T, CHANNEL, BIAS)
    out = activate(gate, up, alpha, limit, GATE)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    out_ptrs = out_ptr + (position * width)[:, None] + column[None, :]
    inside = tl.broadcast_to((column < width)[None, :], (BLOCK_M, BLOCK_N))
    if not PADDED:
        inside &= (pair < pairs)[:, None]
    if QUANTIZE:
        GROUPS: tl.constexpr = BLOCK_N // 128
        out = tl.where(
            inside, out, tl.zeros_like(out)
        )  # what is past the end has no part in a maximum
        out = tl.reshape(out, (BLOCK_M * GROUPS, 128))
        largest = tl.max(magnitude_bits(out), axis=1)
        scale = scale_of(largest, min_amax, 0.0, T, CODE_MAX, SCALE_MODE, "float32")
        codes = codes_of(out, scale, CODE_MAX, False, CODE_MODE, NATIVE_FP8)
        codes = tl.reshape(codes, (BLOCK_M, BLOCK_N))
        tl.store(out_ptrs, codes, mask=inside, eviction_policy="evict_last" if KEEP else "")
        groups = tl.cdiv(width, 128)
        group = column_tile * GROUPS + tl.arange(0, GROUPS)
        scale_ptrs = out_scale_ptr + (position * groups)[:, None] + group[None, :]
        in_groups = (group < groups)[None, :]
        if not PADDED:
            in_groups = in_groups & (pair < pairs)[:, None]
        tl.store(scale_ptrs, tl.reshape(scale, (BLOCK_M, GROUPS)), mask=in_groups)
    else:
        tl.store(out_ptrs, out, mask=inside, eviction_policy="evict_last" if KEEP else "")


@triton.jit(do_not_specialize=["blocks", "pairs", "resident"])
def _gate_up(
    x_ptr, x_scale_ptr, w, up_w, w_scale_ptr, bias_ptr, out_ptr, out_scale_ptr, sorted_ids_ptr, experts_ptr,
    ahead_ptr, up_ahead_ptr,
    blocks, pairs, top_k, width, K, experts, resident,
    x_row, xs_row, xs_block, w_expert, w_row, w_col, ws_expert, ws_row, ws_block, bias_expert,
    alpha, limit, min_amax,
    T: tl.constexpr, GATE: tl.constexpr, INTERLEAVED: tl.constexpr, QUANTIZE: tl.constexpr,
    SCALE_MODE: tl.constexpr, CODE_MODE: tl.constexpr, CODE_MAX: tl.constexpr, NATIVE_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    TMA: tl.constexpr, N_INNER: tl.constexpr, EVEN_K: tl.constexpr, SCALED: tl.constexpr,
    UNIFORM: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
    BAND: tl.constexpr, HALVE: tl.constexpr, PDL: tl.constexpr,
    AHEAD: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    block, column_tile = place(blocks, tl.cdiv(width, BLOCK_N), BAND)
    COLUMNS: tl.constexpr = 2 * BLOCK_N if INTERLEAVED else BLOCK_N
    HALVES: tl.constexpr = 2 if GATE != "relu2" and not INTERLEAVED else 1
    rows = 2 * width if GATE != "relu2" and up_w is None else width
    if PDL:
        if AHEAD > 0:  # noqa: SIM102 (one is known when the kernel is compiled, the other is not)
            # The index is not there yet. Where most experts have a block, that of this one is about its number, and
            # what is asked for too early here is what a neighbour needs. Later programs do not run that early.
            if tl.program_id(0) < resident:
                likely, first = tl.minimum(block, experts - 1), column_tile * COLUMNS
                ask_for(ahead_ptr, likely, first, rows, K, w_expert, w_row, COLUMNS, AHEAD, LINE)
                if HALVES == 2:
                    if up_w is None:
                        first += width
                    ask_for(
                        up_ahead_ptr, likely, first, rows, K, w_expert, w_row, COLUMNS, AHEAD, LINE
                    )
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.load(experts_ptr + block)
    if expert < 0:
        return
    start = block * BLOCK_M
    full = True
    if HALVE:
        ids = tl.load(sorted_ids_ptr + start + BLOCK_M // 2)
        full = ids < pairs
    if full:
        pair, position = sorted_pairs(sorted_ids_ptr, start, BLOCK_M)
        gate_up_tile(
            x_ptr, x_scale_ptr, w, up_w, w_scale_ptr, bias_ptr, out_ptr, out_scale_ptr,
            pair, position, expert, column_tile, pairs, top_k, width, K,
            x_row, xs_row, xs_block, w_expert, w_row, w_col, ws_expert, ws_row, ws_block, bias_expert,
            alpha, limit, min_amax, T, GATE, INTERLEAVED, QUANTIZE, SCALE_MODE, CODE_MODE, CODE_MAX,
            NATIVE_FP8, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, TMA, N_INNER, EVEN_K, SCALED, UNIFORM, CHANNEL, BIAS, KEEP,
            True,
        )  # fmt: skip
    elif HALVE:
        # Names of their own: Triton merges those of both branches, and these have another size.
        pair_half, position_half = sorted_pairs(sorted_ids_ptr, start, BLOCK_M // 2)
        gate_up_tile(
            x_ptr, x_scale_ptr, w, up_w, w_scale_ptr, bias_ptr, out_ptr, out_scale_ptr,
            pair_half, position_half, expert, column_tile, pairs, top_k, width, K,
            x_row, xs_row, xs_block, w_expert, w_row, w_col, ws_expert, ws_row, ws_block, bias_expert,
            alpha, limit, min_amax, T, GATE, INTERLEAVED, QUANTIZE, SCALE_MODE, CODE_MODE, CODE_MAX,
            NATIVE_FP8, BLOCK_M // 2, BLOCK_N, BLOCK_K, SWAP,
            TMA, N_INNER, EVEN_K, SCALED, UNIFORM, CHANNEL, BIAS, KEEP, True,
        )  # fmt: skip


@triton.jit
def down_tile(
    a, a_scale_ptr, w, w_scale_ptr, bias_ptr, out_ptr,
    pair, position, start, expert, column_tile, pairs, N, K,
    a_row, as_row, as_block, w_expert, w_row, w_col, ws_expert, ws_row, ws_block, bias_expert,
    T: tl.constexpr, NATIVE_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    A_TMA: tl.constexpr, TMA: tl.constexpr, N_INNER: tl.constexpr, EVEN_K: tl.constexpr, SCALED: tl.constexpr,
    UNIFORM: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of the second product, of these pairs, whose rows of the first are at `position`.

    With A_TMA those are the rows from `start` on.
    """
    a_ptrs = a
    if not A_TMA:
        a_ptrs = a + (position * a_row)[:, None] + tl.arange(0, BLOCK_K)[None, :]
    a_scale_ptrs = a_scale_ptr
    if SCALED:
        a_scale_ptrs = a_scale_ptr + position * as_row
    first = column_tile * BLOCK_N
    sums, _ = contract(
        a_ptrs, start, a_scale_ptrs, as_block,
        w, None, w_expert, w_row, w_col, w_scale_ptr, ws_expert, ws_row, ws_block,
        expert, first, first, 0, N, K,
        T, BLOCK_M, BLOCK_N, BLOCK_K, 1, SWAP, A_TMA, TMA, N_INNER, EVEN_K, SCALED, UNIFORM, NATIVE_FP8,
    )  # fmt: skip
    scales = w_scale_ptr
    if CHANNEL:
        scales = w_scale_ptr + expert.to(tl.int64) * ws_expert
    biases = bias_ptr
    if BIAS:
        biases = bias_ptr + expert.to(tl.int64) * bias_expert
    column = first + tl.arange(0, BLOCK_N)
    out = finish(sums, scales, biases, column, column < N, T, CHANNEL, BIAS)
    out_ptrs = out_ptr + (pair.to(tl.int64) * N)[:, None] + column[None, :]
    inside = (pair < pairs)[:, None] & (column < N)[None, :]
    tl.store(out_ptrs, out, mask=inside, eviction_policy="evict_last" if KEEP else "")


@triton.jit(do_not_specialize=["blocks", "pairs", "resident"])
def _down(
    a, a_half, a_scale_ptr, w, w_scale_ptr, bias_ptr, out_ptr, sorted_ids_ptr, experts_ptr, ahead_ptr,
    blocks, pairs, N, K, experts, resident,
    a_row, as_row, as_block, w_expert, w_row, w_col, ws_expert, ws_row, ws_block, bias_expert,
    T: tl.constexpr, NATIVE_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    A_TMA: tl.constexpr, TMA: tl.constexpr, N_INNER: tl.constexpr, EVEN_K: tl.constexpr, SCALED: tl.constexpr,
    UNIFORM: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
    BAND: tl.constexpr, HALVE: tl.constexpr, PDL: tl.constexpr,
    AHEAD: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    block, column_tile = place(blocks, tl.cdiv(N, BLOCK_N), BAND)
    if PDL:
        if AHEAD > 0:  # noqa: SIM102 (one is known when the kernel is compiled, the other is not)
            if tl.program_id(0) < resident:
                # The index is there: the first product has waited for it, or this kernel would not run yet.
                known = tl.minimum(tl.maximum(tl.load(experts_ptr + block), 0), experts - 1)
                first = column_tile * BLOCK_N
                ask_for(ahead_ptr, known, first, N, K, w_expert, w_row, BLOCK_N, AHEAD, LINE)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.load(experts_ptr + block)
    if expert < 0:
        return
    start = block * BLOCK_M
    full = True
    if HALVE:
        ids = tl.load(sorted_ids_ptr + start + BLOCK_M // 2)
        full = ids < pairs
    if full:
        pair, position = sorted_pairs(sorted_ids_ptr, start, BLOCK_M)
        down_tile(
            a, a_scale_ptr, w, w_scale_ptr, bias_ptr, out_ptr, pair, position,
            start, expert, column_tile, pairs, N, K,
            a_row, as_row, as_block, w_expert, w_row, w_col, ws_expert, ws_row, ws_block, bias_expert,
            T, NATIVE_FP8, BLOCK_M, BLOCK_N, BLOCK_K, SWAP,
            A_TMA, TMA, N_INNER, EVEN_K, SCALED, UNIFORM, CHANNEL, BIAS, KEEP,
        )  # fmt: skip
    elif HALVE:
        # Names of their own: Triton merges those of both branches, and these have another size.
        pair_half, position_half = sorted_pairs(sorted_ids_ptr, start, BLOCK_M // 2)
        down_tile(
            a_half, a_scale_ptr, w, w_scale_ptr, bias_ptr, out_ptr, pair_half, position_half,
            start, expert, column_tile, pairs, N, K,
            a_row, as_row, as_block, w_expert, w_row, w_col, ws_expert, ws_row, ws_block, bias_expert,
            T, NATIVE_FP8, BLOCK_M // 2, BLOCK_N, BLOCK_K, SWAP,
            A_TMA, TMA, N_INNER, EVEN_K, SCALED, UNIFORM, CHANNEL, BIAS, KEEP,
        )  # fmt: skip


def block_size(
    num_tokens: int, top_k: int, gate_up: Tensor, down: Tensor, all_experts: int | None = None
) -> int:
    """How many pairs `gate_up` and `down` take at a time, from sizes alone: what `moe_align_block_size` is given.

    all_experts: how many experts topk_ids may name, where some are elsewhere.
    """
    experts, hidden, width = down.shape
    pairs = num_tokens * top_k * experts // max(all_experts or experts, 1)
    return choose(gate_up, (experts, hidden, width), pairs).block_size


def gate_up(
    x: Tensor,
    weight: Tensor,
    aligned: Aligned,
    top_k: int,
    *,
    activation: Activation,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    quantize: bool = False,
    dtype: torch.dtype | None = None,
    min_amax: float = 1e-10,
    scale_mode: str = "divide",
    code_mode: str = "divide",
    tile: Tile | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """activation(x[token] @ weight[expert].T + bias) of every sorted pair: [P, I], row i of the pair sorted_ids[i].

    x: [T, H] bfloat16 or float16, or float8_e4m3fn codes with x_scale [T, ceil(H / 128)]. weight: [E, 2 * I, H], or
    [E, I, H] for "relu2", in any strides; or with up the first half of it, and that the second, in the same strides,
    bias and w_scale still of both; float8_e4m3fn with w_scale [E, ceil(rows / 128), ceil(H / 128)], or int8 with
    w_scale [E, rows] beside x in 16 bits. dtype: that of the roundings; that of x where x is no codes. quantize:
    returns float8_e4m3fn codes [P, I] and their float32 scales [P, ceil(I / 128)] as `group_quant` with the last
    three keywords gives them. Rows of padding and of blocks without an expert hold nothing.
    """
    rows, dtype = as_rows(x), dtype or x.dtype
    bias, w_scale = vector(bias), vector(w_scale)
    experts, outputs, hidden = weight.shape
    width = activation.width(outputs) if up is None else outputs
    if tile is None:
        pairs = x.shape[0] * top_k
        tile = choose(
            weight, (experts, hidden, width), pairs, block_size=aligned.block_size
        ).gate_up
    if tile.roles:
        specialized = _with_roles()
        gate = "other" if activation.interleaved else activation.name
        modes = (scale_mode, code_mode)
        whole = up is None and quantize == (x_scale is not None)
        if whole and not specialized.unsupported(
            rows,
            weight,
            aligned,
            gate=gate,
            bias=bias,
            w_scale=w_scale,
            modes=modes,
            min_amax=min_amax,
        ):
            return specialized.gate_up(
                rows,
                weight,
                aligned,
                top_k,
                activation=activation,
                x_scale=x_scale,
                w_scale=w_scale,
                quantize=quantize,
                dtype=dtype,
                min_amax=min_amax,
                stages=tile.stages,
                band=tile.band,
            )
        tile = tile.without_roles(weight.element_size())
    tile = of_both(tile, up)
    columns = 2 * tile.n if activation.interleaved else tile.n
    halves = 2 if activation.gated else 1
    tile = fitting(tile, aligned.block_size + halves * tile.n, rows, weight)
    padded = aligned.sorted_ids.shape[0]
    out = x.new_empty((padded, width), dtype=torch.float8_e4m3fn if quantize else dtype)
    scale = None
    if quantize:
        scale = x.new_empty((padded, triton.cdiv(width, GROUP)), dtype=torch.float32)
        if tile.n % GROUP:
            raise ValueError(
                f"gate_up: tile.n is {tile.n}; accepted with quantize: multiples of {GROUP}"
            )
    blocks = aligned.block_experts.shape[0]
    if out.numel() and experts:
        with on_device(x):
            _gate_up[(blocks * triton.cdiv(width, tile.n),)](
                pointer(rows), x_scale, weight_operand(weight, columns, tile),
                None if up is None else weight_operand(up, columns, tile), w_scale, bias,
                out.view(torch.uint8) if quantize else out, scale,
                aligned.sorted_ids, aligned.block_experts, asked_for(rows, weight, tile),
                asked_for(rows, weight if up is None else up, tile),
                blocks, x.shape[0] * top_k, top_k, width, hidden, experts,
                resident(tile, aligned.block_size + halves * tile.n, rows, weight),
                rows.stride(0), *strides(x_scale, 2), *weight.stride(), *strides(w_scale, 3), strides(bias, 2)[0],
                activation.alpha, activation.limit, min_amax,
                GATE=activation.name, INTERLEAVED=activation.interleaved, QUANTIZE=quantize,
                SCALE_MODE=scale_mode, CODE_MODE=code_mode, CODE_MAX=code_max(torch.float8_e4m3fn),
                BLOCK_M=aligned.block_size,
                UNIFORM=GROUP % columns == 0 and (width % GROUP == 0 or activation.interleaved or not activation.gated),
                **constants(rows, weight, bias, w_scale, dtype, tile),
            )  # fmt: skip
    return out if scale is None else (out, scale)


def down(
    act: Tensor,
    weight: Tensor,
    aligned: Aligned,
    num_pairs: int,
    *,
    bias: Tensor | None = None,
    act_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """act[i] @ weight[expert].T + bias of every sorted pair, at the place of the pair: [num_pairs, H].

    act, act_scale: what `gate_up` returned. weight: [E, H, I]; the scales, dtype: as there. A pair that is in no block
    has no row: what lies there is not written.
    """
    rows, dtype = as_rows(act), dtype or act.dtype
    bias, w_scale = vector(bias), vector(w_scale)
    experts, hidden, width = weight.shape
    if tile is None:
        sizes = (experts, hidden, width)
        tile = choose(weight, sizes, num_pairs, block_size=aligned.block_size).down
    if tile.roles:
        specialized = _with_roles()
        if not specialized.unsupported(rows, weight, aligned, bias=bias, w_scale=w_scale):
            return specialized.down(
                rows,
                weight,
                aligned,
                num_pairs,
                act_scale=act_scale,
                w_scale=w_scale,
                dtype=dtype,
                stages=tile.stages,
                band=tile.band,
            )
        tile = tile.without_roles(weight.element_size())
    tile = fitting(tile, aligned.block_size + tile.n, rows, weight)
    out = act.new_empty((num_pairs, hidden), dtype=dtype)
    blocks = aligned.block_experts.shape[0]
    if out.numel() and experts:
        with on_device(act):
            _down[(blocks * triton.cdiv(hidden, tile.n),)](
                *rows_operands(rows, aligned.block_size, tile), act_scale,
                weight_operand(weight, tile.n, tile), w_scale, bias, out,
                aligned.sorted_ids, aligned.block_experts, asked_for(rows, weight, tile),
                blocks, num_pairs, hidden, width, experts,
                resident(tile, aligned.block_size + tile.n, rows, weight),
                rows.stride(0), *strides(act_scale, 2), *weight.stride(), *strides(w_scale, 3), strides(bias, 2)[0],
                BLOCK_M=aligned.block_size, UNIFORM=GROUP % tile.n == 0, A_TMA=rows_by_descriptor(rows, tile),
                **constants(rows, weight, bias, w_scale, dtype, tile),
            )  # fmt: skip
    return out


def _with_roles() -> ModuleType:
    """The kernels with roles, whose language is imported only where they are chosen."""
    from custom_ops.moe import gluon_experts

    return gluon_experts
