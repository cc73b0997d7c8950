"""The two grouped products of experts in Triton for so few pairs that nobody sorts them.

Each program has an expert and some columns, reads the ids of all pairs, and takes those of its expert, in their order:
some hundred ids cost it less than a kernel that sorts them costs everybody, who would wait for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.moe.activation import Activation
from custom_ops.moe.tiles import Choice
from custom_ops.moe.triton_decode import local_expert
from custom_ops.moe.triton_experts import down_tile, gate_up_tile
from custom_ops.moe.triton_operands import (
    GROUP,
    asked_for,
    constants,
    fitting,
    of_both,
    pointer,
    resident,
    strides,
    vector,
    weight_operand,
)
from custom_ops.moe.triton_products import ask_for
from custom_ops.platform import on_device
from custom_ops.scales import as_rows, code_max

MOST_PAIRS = 512


@triton.jit
def _members(
    ids_ptr, map_ptr, expert, pairs, mapped, experts, PAIRS: tl.constexpr, MAPPED: tl.constexpr
):
    """Of all pairs, which are of an expert, and the how manieth each of these is."""
    pair = tl.arange(0, PAIRS)
    here = pair < pairs
    mine = local_expert(ids_ptr, pair, here, map_ptr, mapped, experts, MAPPED) == expert
    return mine, tl.cumsum(mine.to(tl.int32), axis=0) - 1


@triton.jit
def _pairs_from(mine, order, first, pairs, BLOCK_M: tl.constexpr, PAIRS: tl.constexpr):
    """BLOCK_M pairs of an expert, from the first-th on; a number that is no pair where it has no more."""
    wanted = first + tl.arange(0, BLOCK_M)
    chosen = mine[None, :] & (order[None, :] == wanted[:, None])
    number = tl.where(chosen, tl.arange(0, PAIRS)[None, :] + 1, 0)
    found = tl.sum(number, axis=1)
    return tl.where(found > 0, found - 1, pairs)


@triton.jit(do_not_specialize=["pairs", "resident"])
def _gate_up(
    x_ptr, x_scale_ptr, w, up_w, w_scale_ptr, bias_ptr, out_ptr, out_scale_ptr, ids_ptr, map_ptr,
    ahead_ptr, up_ahead_ptr,
    mapped, pairs, top_k, width, K, experts, resident,
    x_row, xs_row, xs_block, w_expert, w_row, w_col, ws_expert, ws_row, ws_block, bias_expert,
    alpha, limit, min_amax,
    T: tl.constexpr, GATE: tl.constexpr, INTERLEAVED: tl.constexpr, QUANTIZE: tl.constexpr,
    SCALE_MODE: tl.constexpr, CODE_MODE: tl.constexpr, CODE_MAX: tl.constexpr, NATIVE_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    TMA: tl.constexpr, N_INNER: tl.constexpr, EVEN_K: tl.constexpr, SCALED: tl.constexpr,
    UNIFORM: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
    PDL: tl.constexpr, AHEAD: tl.constexpr, LINE: tl.constexpr,
    PAIRS: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(width, BLOCK_N)
    expert, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    COLUMNS: tl.constexpr = 2 * BLOCK_N if INTERLEAVED else BLOCK_N
    HALVES: tl.constexpr = 2 if GATE != "relu2" and not INTERLEAVED else 1
    rows = 2 * width if GATE != "relu2" and up_w is None else width
    if PDL:
        if AHEAD > 0:  # noqa: SIM102 (one is known when the kernel is compiled, the other is not)
            # The ids are not there yet: an expert that nobody names is asked for in vain.
            if tl.program_id(0) < resident:
                first = column_tile * COLUMNS
                ask_for(ahead_ptr, expert, first, rows, K, w_expert, w_row, COLUMNS, AHEAD, LINE)
                if HALVES == 2:
                    if up_w is None:
                        first += width
                    ask_for(
                        up_ahead_ptr, expert, first, rows, K, w_expert, w_row, COLUMNS, AHEAD, LINE
                    )
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    mine, order = _members(ids_ptr, map_ptr, expert, pairs, mapped, experts, PAIRS, MAPPED)
    for at in range(0, tl.sum(mine.to(tl.int32), axis=0), BLOCK_M):
        pair = _pairs_from(mine, order, at, pairs, BLOCK_M, PAIRS)
        gate_up_tile(
            x_ptr, x_scale_ptr, w, up_w, w_scale_ptr, bias_ptr, out_ptr, out_scale_ptr,
            pair, pair.to(tl.int64), expert, column_tile, pairs, top_k, width, K,
            x_row, xs_row, xs_block, w_expert, w_row, w_col, ws_expert, ws_row, ws_block, bias_expert,
            alpha, limit, min_amax, T, GATE, INTERLEAVED, QUANTIZE, SCALE_MODE, CODE_MODE, CODE_MAX,
            NATIVE_FP8, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, TMA, N_INNER, EVEN_K, SCALED, UNIFORM, CHANNEL, BIAS, KEEP,
            False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["pairs", "resident"])
def _down(
    a, a_scale_ptr, w, w_scale_ptr, bias_ptr, out_ptr, ids_ptr, map_ptr, ahead_ptr,
    mapped, pairs, N, K, experts, resident,
    a_row, as_row, as_block, w_expert, w_row, w_col, ws_expert, ws_row, ws_block, bias_expert,
    T: tl.constexpr, NATIVE_FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    TMA: tl.constexpr, N_INNER: tl.constexpr, EVEN_K: tl.constexpr, SCALED: tl.constexpr,
    UNIFORM: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, KEEP: tl.constexpr,
    PDL: tl.constexpr, AHEAD: tl.constexpr, LINE: tl.constexpr,
    PAIRS: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(N, BLOCK_N)
    expert, column_tile = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    # The ids are there: the first product has waited for who wrote them, or this kernel would not run yet.
    mine, order = _members(ids_ptr, map_ptr, expert, pairs, mapped, experts, PAIRS, MAPPED)
    count = tl.sum(mine.to(tl.int32), axis=0)
    if PDL:
        if AHEAD > 0:  # noqa: SIM102 (one is known when the kernel is compiled, the other is not)
            if (tl.program_id(0) < resident) & (count > 0):
                first = column_tile * BLOCK_N
                ask_for(ahead_ptr, expert, first, N, K, w_expert, w_row, BLOCK_N, AHEAD, LINE)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for at in range(0, count, BLOCK_M):
        pair = _pairs_from(mine, order, at, pairs, BLOCK_M, PAIRS)
        row = tl.where(pair < pairs, pair, 0).to(tl.int64)
        down_tile(
            a, a_scale_ptr, w, w_scale_ptr, bias_ptr, out_ptr, pair, row,
            at, expert, column_tile, pairs, N, K,
            a_row, as_row, as_block, w_expert, w_row, w_col, ws_expert, ws_row, ws_block, bias_expert,
            T, NATIVE_FP8, BLOCK_M, BLOCK_N, BLOCK_K, SWAP,
            False, TMA, N_INNER, EVEN_K, SCALED, UNIFORM, CHANNEL, BIAS, KEEP,
        )  # fmt: skip


def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    choice: Choice,
    *,
    activation: Activation,
    up: Tensor | None = None,
    x_scale: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    expert_map: Tensor | None = None,
    dtype: torch.dtype | None = None,
    min_amax: float = 1e-10,
    scale_mode: str = "divide",
    code_mode: str = "divide",
) -> Tensor:
    """The experts' result of every pair, [T * K, H] in their order; none for a pair whose expert is elsewhere.

    x, gate_up, up, down, and what belongs to them: as `triton_experts.gate_up` and `down` have them; tokens in codes
    make the activation codes too. topk_ids: [T, K], of at most MOST_PAIRS pairs. choice: the block size and both tiles.
    """
    quantize, dtype = x_scale is not None, dtype or x.dtype
    rows, top_k, pairs = as_rows(x), topk_ids.shape[1], topk_ids.numel()
    if pairs > MOST_PAIRS:
        raise ValueError(f"experts: topk_ids has {pairs} pairs; accepted: {MOST_PAIRS} or fewer")
    count, outputs, hidden = gate_up.shape
    width = activation.width(outputs) if up is None else outputs
    act = x.new_empty((pairs, width), dtype=torch.float8_e4m3fn if quantize else dtype)
    act_scale = None
    if quantize:
        act_scale = x.new_empty((pairs, triton.cdiv(width, GROUP)), dtype=torch.float32)
        if choice.gate_up.n % GROUP:
            raise ValueError(
                f"experts: tile.n is {choice.gate_up.n}; accepted with codes: multiples of {GROUP}"
            )
    out = x.new_empty((pairs, hidden), dtype=dtype)
    if not out.numel() or not count:
        return out
    bias, scale = vector(gate_up_bias), vector(gate_up_scale)
    table = None if expert_map is None else expert_map.contiguous()
    indices = (topk_ids.contiguous(), table)
    common = {
        "BLOCK_M": choice.block_size,
        "PAIRS": max(16, triton.next_power_of_2(pairs)),
        "MAPPED": expert_map is not None,
    }
    mapped = 0 if expert_map is None else expert_map.shape[0]
    halves = 2 if activation.gated else 1
    tile = fitting(choice.gate_up, choice.block_size + halves * choice.gate_up.n, rows, gate_up)
    tile = of_both(tile, up)
    columns = 2 * tile.n if activation.interleaved else tile.n
    with on_device(x):
        _gate_up[(count * triton.cdiv(width, tile.n),)](
            pointer(rows), x_scale, weight_operand(gate_up, columns, tile),
            None if up is None else weight_operand(up, columns, tile), scale, bias,
            act.view(torch.uint8) if quantize else act, act_scale, *indices, asked_for(rows, gate_up, tile),
            asked_for(rows, gate_up if up is None else up, tile),
            mapped, pairs, top_k, width, hidden, count,
            resident(tile, choice.block_size + halves * tile.n, rows, gate_up),
            rows.stride(0), *strides(x_scale, 2), *gate_up.stride(), *strides(scale, 3), strides(bias, 2)[0],
            activation.alpha, activation.limit, min_amax,
            GATE=activation.name, INTERLEAVED=activation.interleaved, QUANTIZE=quantize,
            SCALE_MODE=scale_mode, CODE_MODE=code_mode, CODE_MAX=code_max(torch.float8_e4m3fn),
            UNIFORM=GROUP % columns == 0 and (width % GROUP == 0 or activation.interleaved or not activation.gated),
            **common, **_constants(rows, gate_up, bias, scale, dtype, tile),
        )  # fmt: skip
        bias, scale = vector(down_bias), vector(down_scale)
        tile = fitting(choice.down, choice.block_size + choice.down.n, act, down)
        _down[(count * triton.cdiv(hidden, tile.n),)](
            pointer(act), act_scale, weight_operand(down, tile.n, tile), scale, bias, out, *indices,
            asked_for(act, down, tile), mapped, pairs, hidden, width, count,
            resident(tile, choice.block_size + tile.n, act, down),
            act.stride(0), *strides(act_scale, 2), *down.stride(), *strides(scale, 3), strides(bias, 2)[0],
            UNIFORM=GROUP % tile.n == 0, **common, **_constants(act, down, bias, scale, dtype, tile),
        )  # fmt: skip
    return out


def _constants(*args: object) -> dict[str, object]:
    """As the kernels behind an index have them, less what a block of sorted pairs is."""
    found = constants(*args)  # type: ignore[arg-type]
    return {name: value for name, value in found.items() if name not in ("BAND", "HALVE")}
