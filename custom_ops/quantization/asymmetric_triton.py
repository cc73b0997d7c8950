"""int8 with zero points in Triton, of a tensor or of what a gated activation makes of two.

A program a token, or a piece of a row where scale and zero point are of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.platform import on_device
from custom_ops.quantization import reference
from custom_ops.quantization.triton_codes import (
    divide_by,
    magnitude_bits,
    nearest_integer,
    quotient_of,
)
from custom_ops.quantization.triton_kernels import MAX_TILE, TILE, Inputs, load_values, raise_amax
from custom_ops.scales import quant_spec
from custom_ops.triton_math import round_to, to_float32


@triton.jit
def larger(a, b):
    """The larger of two, or NaN if one is NaN."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def affine_of(high, minus_low, min_scale, T: tl.constexpr, SCALE_MODE: tl.constexpr):
    """Scales, float32, and zero points, int32, of tokens by their largest value and that of their negatives."""
    nothing = tl.zeros_like(high)
    high = larger(high, nothing)
    minus_low = larger(minus_low, nothing)
    extent = high + minus_low
    if SCALE_MODE == "divide_input" or SCALE_MODE == "reciprocal_input":
        extent = to_float32(round_to(extent, T))
    scale = divide_by(extent, 255.0, min_scale, T, SCALE_MODE)
    below = tl.div_rn(minus_low * -1.0, scale)
    if SCALE_MODE == "divide_input" or SCALE_MODE == "reciprocal_input":
        below = to_float32(round_to(below, T))
    zero = -128 - nearest_integer(below)
    return scale, tl.minimum(tl.maximum(zero, -128), 127)


@triton.jit
def affine_codes_of(x, scale, zero, CODE_MODE: tl.constexpr):
    """int8 codes of a tile."""
    codes = nearest_integer(quotient_of(x, scale, CODE_MODE, True)) + zero[:, None]
    return tl.minimum(tl.maximum(codes, -128), 127).to(tl.int8)


@triton.jit
def codes_around(x, scale, zero, CODE_MODE: tl.constexpr):
    """int8 codes of a tile by a given scale and zero point, float32, which may be any number."""
    v = quotient_of(x, scale, CODE_MODE, True)
    size = tl.abs(v)
    # Up to here there are fractions, and a sum with it has none: rounded, ties to even.
    whole = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    whole = tl.where(v < 0.0, whole * -1.0, tl.where(v == v, whole, 0.0))
    return tl.minimum(tl.maximum(whole + zero[:, None], -128.0), 127.0).to(tl.int8)


@triton.jit
def raise_reach(reach_ptr, x):
    """How far a tile [1, N] reaches above and below zero, as the bits of two float32, into two cells."""
    v = to_float32(x)
    bits = magnitude_bits(x)
    raise_amax(reach_ptr, tl.max(tl.where((v > 0.0) | (v != v), bits, 0), axis=1))
    raise_amax(reach_ptr + 1, tl.max(tl.where((v < 0.0) | (v != v), bits, 0), axis=1))


@triton.jit
def _pieces(
    gate_ptr, up_ptr, out_ptr, scale_ptr, zero_ptr, reach_ptr,
    size, tiles, gate_row, up_row, gate_col, up_col, alpha, limit, min_scale,
    GATE: tl.constexpr, TILE: tl.constexpr, STORE: tl.constexpr, FIND: tl.constexpr,
    SCALE_MODE: tl.constexpr, CODE_MODE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)[None, :]
    mask = column < size
    x = load_values(
        gate_ptr, up_ptr, row * gate_row + column * gate_col, row * up_row + column * up_col,
        mask, alpha, limit, GATE,
    )  # fmt: skip
    if FIND:
        raise_reach(reach_ptr, x)
    one = tl.arange(0, 1)
    out_ptr += row * size
    if STORE == "values":
        tl.store(out_ptr + column, x, mask=mask)
    elif STORE == "codes of the reach":
        high = tl.load(reach_ptr + one).to(tl.float32, bitcast=True)
        minus_low = tl.load(reach_ptr + 1 + one).to(tl.float32, bitcast=True)
        scale, zero = affine_of(high, minus_low, min_scale, x.dtype, SCALE_MODE)
        tl.store(out_ptr + column, affine_codes_of(x, scale, zero, CODE_MODE), mask=mask)
        if tl.program_id(0) == 0:
            tl.store(scale_ptr + one, scale)
            tl.store(zero_ptr + one, zero.to(tl.int8))
    elif STORE == "codes of the scale":
        zero = tl.zeros((1,), tl.float32)
        if zero_ptr is not None:
            zero = tl.load(zero_ptr + one).to(tl.float32)
        codes = codes_around(x, tl.load(scale_ptr + one), zero, CODE_MODE)
        tl.store(out_ptr + column, codes, mask=mask)


@triton.jit
def _token(
    gate_ptr, up_ptr, q_ptr, scale_ptr, zero_ptr,
    size, gate_row, up_row, gate_col, up_col, alpha, limit, min_scale,
    GATE: tl.constexpr, TILE: tl.constexpr, ONE_TILE: tl.constexpr,
    SCALE_MODE: tl.constexpr, CODE_MODE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    gate_ptr += row * gate_row
    up_ptr += row * up_row
    q_ptr += row * size
    T: tl.constexpr = gate_ptr.dtype.element_ty
    lane = tl.arange(0, TILE)[None, :]
    # All of the token with ONE_TILE. What lies past the end was made of zeros, and is zero.
    x = load_values(
        gate_ptr, up_ptr, lane * gate_col, lane * up_col, lane < size, alpha, limit, GATE
    )
    high = tl.reduce(to_float32(x), 1, larger)
    minus_low = tl.reduce(to_float32(x) * -1.0, 1, larger)
    if not ONE_TILE:
        for start in range(TILE, size, TILE):
            at = start + lane
            v = to_float32(
                load_values(
                    gate_ptr, up_ptr, at * gate_col, at * up_col, at < size, alpha, limit, GATE
                )
            )
            high = larger(high, tl.reduce(v, 1, larger))
            minus_low = larger(minus_low, tl.reduce(v * -1.0, 1, larger))
    scale, zero = affine_of(high, minus_low, min_scale, T, SCALE_MODE)
    end = TILE if ONE_TILE else size
    for start in range(0, end, TILE):
        at = start + lane
        if not ONE_TILE:
            x = load_values(
                gate_ptr, up_ptr, at * gate_col, at * up_col, at < size, alpha, limit, GATE
            )
        tl.store(q_ptr + at, affine_codes_of(x, scale, zero, CODE_MODE), mask=at < size)
    tl.store(scale_ptr + row + tl.arange(0, 1), scale)
    tl.store(zero_ptr + row + tl.arange(0, 1), zero.to(tl.int8))


def empty_affine(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero point of x."""
    q, scale = quant_spec(torch.int8, (1, None)).empty(x.shape, x.device)
    return q, scale, torch.empty(scale.shape, dtype=torch.int8, device=x.device)


def per_token_asymmetric(
    gate: str, *args: Any, min_scale: float, scale_mode: str, code_mode: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`token_quant_asymmetric` of the gated activation; which inputs are copied, `Inputs` says."""
    inputs = Inputs(gate, args)
    q, scale, zero_point = empty_affine(inputs.x)
    size = inputs.x.shape[-1]
    tile = min(triton.next_power_of_2(size), MAX_TILE)
    with on_device(inputs.x):
        _token[(scale.numel(),)](
            *inputs.tensors,
            q,
            scale,
            zero_point,
            size,
            *inputs.strides,
            *inputs.scalars,
            min_scale,
            GATE=gate,
            TILE=tile,
            ONE_TILE=size <= tile,
            SCALE_MODE=scale_mode,
            CODE_MODE=code_mode,
            num_warps=min(max(tile // 1024, 1), 16),
        )
    return q, scale, zero_point


def _run_pieces(
    inputs: Inputs,
    store: str,
    out: Tensor,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    reach: Tensor | None = None,
    find: bool = False,
    min_scale: float = 0.0,
    scale_mode: str = "divide",
    code_mode: str = "divide",
) -> None:
    """Run `_pieces` over all rows, if there are any."""
    x = inputs.x
    if x.numel() == 0:
        return
    size = x.shape[-1]
    tiles = triton.cdiv(size, TILE)
    with on_device(x):
        _pieces[(inputs.tensors[0].shape[0] * tiles,)](
            *inputs.tensors,
            out,
            out if scale is None else scale,
            zero_point,
            out if reach is None else reach,
            size,
            tiles,
            *inputs.strides,
            *inputs.scalars,
            min_scale,
            GATE=inputs.gate,
            TILE=TILE,
            STORE=store,
            FIND=find,
            SCALE_MODE=scale_mode,
            CODE_MODE=code_mode,
            num_warps=4,
        )


def per_tensor_asymmetric(gate: str, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`tensor_quant_asymmetric` of the gated activation: a kernel for its values and their reach, one for the codes."""
    inputs = Inputs(gate, args)
    values = inputs.x if gate == "none" else inputs.empty()
    reach = empty_reach(values)
    store = "nothing" if gate == "none" else "values"
    _run_pieces(inputs, store, values, reach=reach, find=True)
    return quantize_by_reach(values, reach, **options)


def empty_reach(x: Tensor) -> Tensor:
    """Of nothing: 0 to either side."""
    return torch.zeros(2, dtype=torch.int32, device=x.device)


def quantize_by_reach(x: Tensor, reach: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`tensor_quant_asymmetric` of x, the bits of whose reach are known, int32 [2]."""
    if x.numel() == 0:  # no program would store the scale
        return reference.tensor_quant_asymmetric(x, **options)
    q, scale = quant_spec(torch.int8, (None, None)).empty(x.shape, x.device)
    zero_point = torch.empty(1, dtype=torch.int8, device=x.device)
    of: dict[str, Any] = {"scale": scale, "zero_point": zero_point, "reach": reach}
    _run_pieces(Inputs("none", (x,)), "codes of the reach", q, **of, **options)
    return q, scale, zero_point


def per_tensor_static_asymmetric(gate: str, *args: Any, code_mode: str) -> Tensor:
    """`tensor_quant_static_asymmetric` of the gated activation; the last arguments are scale and zero point."""
    inputs = Inputs(gate, args)
    scale, zero_point = inputs.rest
    q = torch.empty(inputs.x.shape, dtype=torch.int8, device=inputs.x.device)
    _run_pieces(
        inputs, "codes of the scale", q, scale=scale, zero_point=zero_point, code_mode=code_mode
    )
    return q


def implementations_of(gate: str) -> tuple[Callable[..., Any], ...]:
    """The gated activation followed by each scheme with zero points: per token, per tensor, and static."""
    kinds = (per_token_asymmetric, per_tensor_asymmetric, per_tensor_static_asymmetric)
    return tuple(partial(kind, gate) for kind in kinds)


token_quant_asymmetric, tensor_quant_asymmetric, tensor_quant_static_asymmetric = (
    implementations_of("none")
)
