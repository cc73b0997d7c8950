"""A mixture of experts for few pairs, in two Triton kernels: nothing is sorted, and each program reads weights once.

One program of the first kernel makes a few channels of the activation of one pair; one of the second makes a few
channels of a token, going through its experts in order. Both stream weights at the speed of memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.moe.activation import Activation
from custom_ops.moe.tiles import FEW_PAIRS, Strip, choose
from custom_ops.moe.triton_operands import hopper, n_inner, pointer, strides, vector
from custom_ops.moe.triton_products import activate
from custom_ops.moe.triton_sums import decoded, requantized, row_sums, sums_of
from custom_ops.platform import on_device
from custom_ops.scales import as_rows, code_max
from custom_ops.triton_math import native_fp8, round_to, to_float32

# From here on a scale of 16-bit floats is normal, and so are its reciprocal and the residual of a quotient.
LEAST_AMAX = 2.0**-60


@triton.jit
def local_expert(ids_ptr, pair, here, map_ptr, mapped, experts, MAPPED: tl.constexpr):
    """The local expert of a pair (or of a tile of them, where `here`); -1 where it is elsewhere."""
    expert = tl.load(ids_ptr + pair, mask=here, other=-1).to(tl.int64)
    if MAPPED:
        inside = (expert >= 0) & (expert < mapped)
        expert = tl.load(map_ptr + tl.where(inside, expert, 0), mask=inside, other=-1).to(tl.int64)
    return tl.where((expert >= 0) & (expert < experts), expert, -1)


@triton.jit
def _finish(
    sums, scale_ptrs, bias_ptrs, mask, T: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr
):
    """Sums to T as eager has them."""
    if CHANNEL:
        sums = sums * tl.load(scale_ptrs, mask=mask, other=0.0)
    y = round_to(sums, T)
    if BIAS:
        y = round_to(to_float32(y) + to_float32(tl.load(bias_ptrs, mask=mask, other=0.0)), T)
    return y


@triton.jit
def _place(FIRST: tl.constexpr):
    """Which pair or token, and which tile of columns. FIRST: a tile of all pairs at once, which share weights in L2."""
    if FIRST:
        row, tile = tl.program_id(0), tl.program_id(1)
    else:
        row, tile = tl.program_id(1), tl.program_id(0)
    return row, tile


@triton.jit
def _decode_gate_up(
    x_ptr, w_ptr, up_ptr, w_scale_ptr, bias_ptr, out_ptr, ids_ptr, map_ptr, mapped, experts, top_k, width, K,
    x_row, w_expert, w_row, w_col, ws_expert, ws_row, ws_block, bias_expert, alpha, limit, min_amax,
    GATE: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, SCALED: tl.constexpr, UNIFORM: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr,
    MAPPED: tl.constexpr, SCALE_MODE: tl.constexpr, CODE_MODE: tl.constexpr, CODE_MAX: tl.constexpr,
    NATIVE_FP8: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr, LANES: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    T: tl.constexpr = x_ptr.dtype.element_ty
    pair, column_tile = _place(FIRST)
    expert = local_expert(ids_ptr, pair, True, map_ptr, mapped, experts, MAPPED)
    if expert < 0:
        return
    GATED: tl.constexpr = GATE != "relu2"
    HALVES: tl.constexpr = 2 if GATED and not INTERLEAVED else 1
    COLUMNS: tl.constexpr = 2 * BLOCK_N if INTERLEAVED else BLOCK_N
    first = column_tile * COLUMNS
    lane = first + tl.arange(0, COLUMNS)
    inside = lane < (2 * width if INTERLEAVED else width)
    scales = w_scale_ptr
    channels = w_scale_ptr
    if SCALED:
        scales = w_scale_ptr + expert * ws_expert
    if CHANNEL:
        channels = w_scale_ptr + expert * ws_expert + lane
    biases = bias_ptr
    if BIAS:
        biases = bias_ptr + expert * bias_expert + lane
    second = width + first
    before_up = 0
    w_up = w_ptr
    if up_ptr is not None:
        second = first
        before_up = width
        w_up = up_ptr
    sum_0, sum_1 = row_sums(
        x_ptr + (pair // top_k).to(tl.int64) * x_row, w_ptr + expert * w_expert, w_up + expert * w_expert, scales,
        first, second, before_up, inside, K, w_row, w_col, ws_row, ws_block, min_amax, T, BLOCK_K, COLUMNS, HALVES,
        EVEN_K, SCALED, UNIFORM, SCALE_MODE, CODE_MODE, CODE_MAX, NATIVE_FP8, STAGES, LANES,
    )  # fmt: skip
    gate = _finish(sum_0, channels, biases, inside, T, CHANNEL, BIAS)
    up = gate
    if INTERLEAVED:
        gate, up = tl.split(tl.reshape(gate, (BLOCK_N, 2)))
    elif GATED:
        if CHANNEL:
            channels += width
        if BIAS:
            biases += width
        up = _finish(sum_1, channels, biases, inside, T, CHANNEL, BIAS)
    out = activate(gate, up, alpha, limit, GATE)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(out_ptr + pair.to(tl.int64) * width + column, out, mask=column < width)


@triton.jit
def _weighted(
    act_ptr, w_ptr, w_scale_ptr, bias_ptr, weights_ptr, pair, expert, first, lane,
    N, K, w_expert, w_row, w_col, ws_expert, ws_row, ws_block, bias_expert, min_amax,
    T: tl.constexpr, CHOICES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr,
    SCALE_MODE: tl.constexpr, CODE_MODE: tl.constexpr, CODE_MAX: tl.constexpr, NATIVE_FP8: tl.constexpr,
    STAGES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """[CHOICES, BLOCK_N] of what some pairs add to their token, as float32; experts that are not here are -1."""
    here = expert >= 0
    expert = tl.where(here, expert, 0)
    inside = here[:, None] & (lane < N)[None, :]
    k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + (expert * w_expert)[:, None, None] + (lane.to(tl.int64) * w_row)[None, :, None]
    w_ptrs = w_ptrs + (k.to(tl.int64) * w_col)[None, None, :]
    a_ptrs = act_ptr + (pair.to(tl.int64) * K)[:, None] + k[None, :]
    if LANES > 1:
        sums = tl.zeros((CHOICES * BLOCK_N, BLOCK_K // LANES), tl.float32)
    else:
        sums = tl.zeros((CHOICES, BLOCK_N, BLOCK_K), tl.float32)
    for at in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        in_k = k < K - at
        mask = inside[:, :, None] & in_k[None, None, :]
        tile = tl.load(w_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(a_ptrs, mask=here[:, None] & in_k[None, :], other=0.0)
        if SCALED:
            GROUPS: tl.constexpr = BLOCK_K // 128
            v = requantized(
                x, min_amax, T, CHOICES * GROUPS, SCALE_MODE, CODE_MODE, CODE_MAX, NATIVE_FP8
            )
            block = at // 128 + tl.arange(0, GROUPS)
            scale_ptrs = w_scale_ptr + first // 128 * ws_row + (expert * ws_expert)[:, None]
            in_blocks = here[:, None] & (block * 128 < K)[None, :]
            scale = tl.load(scale_ptrs + (block * ws_block)[None, :], mask=in_blocks, other=0.0)
            v = tl.reshape(v * tl.reshape(scale, (CHOICES * GROUPS,))[:, None], (CHOICES, BLOCK_K))
        else:
            v = to_float32(x)
        products = decoded(tile) * v[:, None, :]
        if LANES > 1:
            products = sums_of(tl.reshape(products, (CHOICES * BLOCK_N, BLOCK_K)), LANES)
        sums += products
        w_ptrs += BLOCK_K * w_col
        a_ptrs += BLOCK_K
    channels = w_scale_ptr
    if CHANNEL:
        channels = w_scale_ptr + (expert * ws_expert)[:, None] + lane[None, :]
    biases = bias_ptr
    if BIAS:
        biases = bias_ptr + (expert * bias_expert)[:, None] + lane[None, :]
    total = tl.sum(sums, axis=1 if LANES > 1 else 2)
    total = tl.reshape(total, (CHOICES, BLOCK_N))
    y = to_float32(_finish(total, channels, biases, inside, T, CHANNEL, BIAS))
    products = y * to_float32(tl.load(weights_ptr + pair, mask=here, other=0.0))[:, None]
    if weights_ptr.dtype.element_ty != tl.float32:
        products = to_float32(round_to(products, T))
    return products


@triton.jit
def _ask_for(w_ptrs, K, LINE: tl.constexpr, LINES: tl.constexpr):
    """Ask for rows of weights in L2; LINE: weights to a cache line."""
    at = tl.arange(0, LINES) * LINE
    place = w_ptrs[:, :, None] + tl.where(at < K, at, 0)[None, None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [place.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _decode_down(
    act_ptr, w_ptr, w_scale_ptr, bias_ptr, weights_ptr, out_ptr, ids_ptr, map_ptr, mapped, experts, N, K,
    w_expert, w_row, w_col, ws_expert, ws_row, ws_block, bias_expert, min_amax,
    TOP_K: tl.constexpr, CHOICES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr, CHANNEL: tl.constexpr, BIAS: tl.constexpr, MAPPED: tl.constexpr,
    SCALE_MODE: tl.constexpr, CODE_MODE: tl.constexpr, CODE_MAX: tl.constexpr, NATIVE_FP8: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr, LANES: tl.constexpr, LINE: tl.constexpr, LINES: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """BLOCK_N channels of a token: tiles [CHOICES, BLOCK_N, BLOCK_K], of so many of its experts at once."""
    T: tl.constexpr = out_ptr.dtype.element_ty
    token, column_tile = _place(FIRST)
    first = column_tile * BLOCK_N
    lane = first + tl.arange(0, BLOCK_N)
    if PDL:
        if LINES > 0:
            # The first kernel has waited for whoever wrote the ids, or this one would not run yet.
            choice = tl.arange(0, CHOICES)
            expert = local_expert(
                ids_ptr, token * TOP_K + choice, choice < TOP_K, map_ptr, mapped, experts, MAPPED
            )
            inside = (expert >= 0)[:, None] & (lane < N)[None, :]
            w_rows = w_ptr + (expert * w_expert)[:, None] + (lane.to(tl.int64) * w_row)[None, :]
            _ask_for(tl.where(inside, w_rows, w_ptr), K, LINE, LINES)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, TOP_K, CHOICES):
        choice = start + tl.arange(0, CHOICES)
        expert = local_expert(
            ids_ptr, token * TOP_K + choice, choice < TOP_K, map_ptr, mapped, experts, MAPPED
        )
        # Experts elsewhere are common: a tile of nothing else is passed over.
        if tl.max(expert, axis=0) >= 0:
            products = _weighted(
                act_ptr, w_ptr, w_scale_ptr, bias_ptr, weights_ptr, token * TOP_K + choice, expert, first, lane,
                N, K, w_expert, w_row, w_col, ws_expert, ws_row, ws_block, bias_expert, min_amax,
                T, CHOICES, BLOCK_N, BLOCK_K, SCALED, CHANNEL, BIAS, SCALE_MODE, CODE_MODE, CODE_MAX,
                NATIVE_FP8, STAGES, LANES,
            )  # fmt: skip
            for k_th in tl.static_range(CHOICES):  # in this order, whatever a sum over an axis has
                only = (expert >= 0) & (choice == start + k_th)
                # not a product with 0, which keeps a NaN
                total += tl.sum(tl.where(only[:, None], products, 0.0), axis=0)
    tl.store(out_ptr + token.to(tl.int64) * N + lane, round_to(total, T), mask=lane < N)


def fits(num_tokens: int, top_k: int, gate_up: Tensor, down: Tensor) -> bool:
    """Whether so few pairs, judged by sizes alone, are what `moe_decode` is for."""
    experts, hidden, width = down.shape
    pairs = num_tokens * top_k
    choice = choose(gate_up, (experts, hidden, width), pairs)
    return choice.strips is not None and (choice.pairs >= pairs or pairs <= FEW_PAIRS)


def _lanes(weight: Tensor, scaled: bool) -> int:
    """How many products a thread adds up at once. Rows of FP8 in one piece: as many as it loads at once, which halves
    the registers; weights of 16 bits lose by it.
    """
    return 16 // weight.element_size() if scaled and weight.stride(2) == 1 else 1


def moe_decode(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: Activation,
    up: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    expert_map: Tensor | None = None,
    min_amax: float = 1e-10,
    scale_mode: str = "divide",
    code_mode: str = "divide",
    strips: tuple[Strip, Strip] | None = None,
) -> Tensor:
    """As `custom_ops.fused_moe`: [T, H] for [T, H] activations in 16 bits, whatever the weights are.

    With float8_e4m3fn weights the activations, of both products, are quantized inside, with the bits of `group_quant`.
    int8 weights have scales of channels, [E, rows]. Weights are read once for each pair, so it is for few of them.
    strips: of the two kernels; None takes what the tables say.
    """
    tokens, hidden = x.shape
    top_k = topk_ids.shape[1]
    experts, outputs, _ = gate_up.shape
    if up is not None:
        outputs *= 2
    width = activation.width(outputs)
    rows = as_rows(x)
    gate_up_scale, down_scale = vector(gate_up_scale), vector(down_scale)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    if not experts:
        return out.zero_()
    if strips is None:
        strips = choose(gate_up, (experts, hidden, width), tokens * top_k, few=True).strips
        assert strips is not None
    first, second = strips
    act = x.new_empty((tokens * top_k, width))
    ids, weights = topk_ids.contiguous(), topk_weights.contiguous()
    mapped = 0 if expert_map is None else expert_map.shape[0]
    table = None if expert_map is None else expert_map.contiguous()
    scaled = gate_up_scale is not None and gate_up_scale.dim() == 3
    pdl = hopper(x)
    native = native_fp8(x)
    if native and (scale_mode, code_mode) == ("divide", "divide") and min_amax >= LEAST_AMAX:
        code_mode = "exact"
    columns = 2 * first.n if activation.interleaved else first.n
    halved = activation.gated and not activation.interleaved
    lines = 0
    if second.prefetch and not n_inner(down):
        lines = triton.next_power_of_2(triton.cdiv(width * down.element_size(), 128))
    common = {
        "SCALED": scaled,
        "CHANNEL": gate_up_scale is not None and not scaled,
        "MAPPED": expert_map is not None,
        "SCALE_MODE": scale_mode,
        "CODE_MODE": code_mode,
        "CODE_MAX": code_max(torch.float8_e4m3fn),
        "NATIVE_FP8": native,
        "PDL": pdl,
        "FIRST": tokens > 1,
        **({"launch_pdl": True} if pdl else {}),
    }
    columns_of, rows_of = triton.cdiv(width, first.n), tokens * top_k
    with on_device(x):
        _decode_gate_up[(rows_of, columns_of) if tokens > 1 else (columns_of, rows_of)](
            rows, pointer(gate_up), None if up is None else pointer(up), gate_up_scale, vector(gate_up_bias), act, ids,
            table, mapped, experts,
            top_k, width, hidden, rows.stride(0), *gate_up.stride(), *strides(gate_up_scale, 3), outputs,
            activation.alpha, activation.limit, min_amax,
            GATE=activation.name, INTERLEAVED=activation.interleaved, BIAS=gate_up_bias is not None,
            EVEN_K=hidden % first.k == 0,
            UNIFORM=128 % columns == 0 and (width % columns == 0 or not halved),
            BLOCK_N=first.n, BLOCK_K=first.k, STAGES=first.stages, LANES=_lanes(gate_up, scaled), num_warps=first.warps,
            **common,
        )  # fmt: skip
        columns_of = triton.cdiv(hidden, second.n)
        _decode_down[(tokens, columns_of) if tokens > 1 else (columns_of, tokens)](
            act, pointer(down), down_scale, vector(down_bias), weights, out, ids, table, mapped, experts,
            hidden, width, *down.stride(), *strides(down_scale, 3), hidden, min_amax,
            TOP_K=top_k, CHOICES=second.choices or triton.next_power_of_2(top_k), BIAS=down_bias is not None,
            LINE=128 // down.element_size(), LINES=lines, LANES=_lanes(down, scaled),
            BLOCK_N=second.n, BLOCK_K=second.k, STAGES=second.stages, num_warps=second.warps, **common,
        )  # fmt: skip
    return out
