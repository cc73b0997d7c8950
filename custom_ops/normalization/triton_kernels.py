"""The RMSNorm family in Triton: one kernel, one program per row.

The row is a tile [groups, GROUP], so that the norm and the quantization share it. The order of the sum
depends on the hidden size and the group size alone: a row gives the same bits in any batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.platform import on_device
from custom_ops.quantization.asymmetric_triton import (
    affine_codes_of,
    affine_of,
    codes_around,
    empty_affine,
    empty_reach,
    larger,
    quantize_by_reach,
    raise_reach,
)
from custom_ops.quantization.triton_codes import (
    code_constants,
    codes_of,
    codes_pointer,
    magnitude_bits,
    scale_of,
    store_scale,
)
from custom_ops.quantization.triton_kernels import quantize_by_amax, raise_amax, scale_steps
from custom_ops.scales import as_rows, quant_spec
from custom_ops.triton_math import round_to, to_float32

# The longest row that stays in registers between the two passes; a longer one is read twice.
MAX_TILE = 16384
# Groups of the tile when nothing is quantized in groups.
GROUP = 128


@triton.jit
def _load(x_ptr, residual_ptr, offsets, mask, ADD: tl.constexpr):
    """The values that are normalized, in their own dtype: x, or the rounded sum with the residual."""
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
        x = round_to(to_float32(x) + to_float32(residual), x_ptr.dtype.element_ty)
    return x


@triton.jit
def _normalize(x, rstd, weight_ptr, offsets, mask, WEIGHT_MODE: tl.constexpr):
    """The norm of one tile of a row, rounded to its dtype."""
    weight = to_float32(tl.load(weight_ptr + offsets, mask=mask, other=0.0))
    y = to_float32(x) * rstd
    if WEIGHT_MODE == "rounded":
        y = to_float32(round_to(y, x.dtype)) * weight
    elif WEIGHT_MODE == "float32":
        y = y * weight
    else:
        y = y * (1.0 + weight)
    return round_to(y, x.dtype)


@triton.jit
def _magnitudes(out, mask):
    """The bits of |out|; 0 past the end of the row, where a norm by rstd = Inf would be NaN."""
    return tl.where(mask, magnitude_bits(out), 0)


@triton.jit
def _largest(bits, GROUPS: tl.constexpr):
    """The largest of a tile of bits, once for each of its groups [GROUPS]."""
    return tl.zeros((GROUPS,), tl.int32) + tl.max(tl.max(bits, axis=1), axis=0)


@triton.jit
def _highest(v, GROUPS: tl.constexpr):
    """The largest of a tile of values, or NaN, once for each of its groups [GROUPS]."""
    return tl.zeros((GROUPS,), tl.float32) + tl.reduce(tl.reduce(v, 1, larger), 0, larger)


@triton.jit(do_not_specialize=["scale_row", "scale_group"])
def _rms_norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, residual_out_ptr, scale_ptr, amax_ptr, zero_ptr, kept_ptr,
    size, x_row, residual_row, scale_row, scale_group, eps, min_amax, min_scale,
    WEIGHT_MODE: tl.constexpr, ADD: tl.constexpr, KEEP: tl.constexpr, SCHEME: tl.constexpr,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, ONE_TILE: tl.constexpr,
    SCALE_MODE: tl.constexpr, SCALE_FORMAT: tl.constexpr,
    CODE_MAX: tl.constexpr, INT8: tl.constexpr, CODE_MODE: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_row
    residual_ptr += row * residual_row
    out_ptr += row * size
    residual_out_ptr += row * size
    kept_ptr += row * size
    T: tl.constexpr = x_ptr.dtype.element_ty
    tile_group = tl.arange(0, GROUPS)
    tile = tile_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = _load(x_ptr, residual_ptr, tile, tile < size, ADD)  # all of the row with ONE_TILE
    if ONE_TILE:
        v = to_float32(x)
        total = tl.sum(tl.sum(v * v, axis=1), axis=0)
    else:
        squares = tl.zeros((GROUPS, GROUP), tl.float32)
        for start in range(0, size, GROUPS * GROUP):
            offsets = start + tile
            v = to_float32(_load(x_ptr, residual_ptr, offsets, offsets < size, ADD))
            squares += v * v
        total = tl.sum(tl.sum(squares, axis=1), axis=0)
    # Scalars as float32 whatever type they come in: an eps in float64 would make the sum float64.
    mean = tl.div_rn(total, tl.full((), size, tl.float32))
    rstd = tl.rsqrt(mean + tl.full((), eps, tl.float32))

    scale = tl.zeros((GROUPS,), tl.float32)
    given_zero = tl.zeros((GROUPS,), tl.float32)
    if SCHEME == "static" or SCHEME == "static asymmetric":
        scale += tl.load(scale_ptr)
    if SCHEME == "static asymmetric" and zero_ptr is not None:
        given_zero += tl.load(zero_ptr).to(tl.float32)
    if SCHEME == "token" and not ONE_TILE:
        bits = tl.zeros((GROUPS, GROUP), tl.int32)
        for start in range(0, size, GROUPS * GROUP):
            offsets = start + tile
            mask = offsets < size
            x = _load(x_ptr, residual_ptr, offsets, mask, ADD)
            out = _normalize(x, rstd, weight_ptr, offsets, mask, WEIGHT_MODE)
            bits = tl.maximum(bits, _magnitudes(out, mask))
        largest = _largest(bits, GROUPS)
        scale = scale_of(largest, min_amax, min_scale, T, CODE_MAX, SCALE_MODE, SCALE_FORMAT)

    zero = tl.zeros((GROUPS,), tl.int32)
    if SCHEME == "asymmetric" and not ONE_TILE:
        high = tl.zeros((GROUPS, GROUP), tl.float32)
        minus_low = tl.zeros((GROUPS, GROUP), tl.float32)
        for start in range(0, size, GROUPS * GROUP):
            offsets = start + tile
            mask = offsets < size
            x = _load(x_ptr, residual_ptr, offsets, mask, ADD)
            v = to_float32(_normalize(x, rstd, weight_ptr, offsets, mask, WEIGHT_MODE))
            v = tl.where(mask, v, 0.0)
            high = larger(high, v)
            minus_low = larger(minus_low, v * -1.0)
        scale, zero = affine_of(
            _highest(high, GROUPS), _highest(minus_low, GROUPS), min_scale, T, SCALE_MODE
        )

    end = GROUPS * GROUP if ONE_TILE else size  # a constant, for which no loop remains
    for start in range(0, end, GROUPS * GROUP):
        offsets = start + tile
        mask = offsets < size
        if not ONE_TILE:
            x = _load(x_ptr, residual_ptr, offsets, mask, ADD)
        if ADD:
            tl.store(residual_out_ptr + offsets, x, mask=mask)
        out = _normalize(x, rstd, weight_ptr, offsets, mask, WEIGHT_MODE)
        if KEEP:
            tl.store(kept_ptr + offsets, out, mask=mask)
        if SCHEME == "plain" or SCHEME == "amax" or SCHEME == "reach":
            tl.store(out_ptr + offsets, out, mask=mask)
            if SCHEME == "reach":
                raise_reach(amax_ptr, tl.where(mask, out, 0.0).reshape(1, GROUPS * GROUP))
            if SCHEME == "amax":
                raise_amax(
                    amax_ptr, tl.max(_magnitudes(out, mask).reshape(1, GROUPS * GROUP), axis=1)
                )
        else:
            if SCHEME == "group":
                largest = tl.max(_magnitudes(out, mask), axis=1)
                scale = scale_of(
                    largest, min_amax, min_scale, T, CODE_MAX, SCALE_MODE, SCALE_FORMAT
                )
                group = start // GROUP + tile_group
                store_scale(
                    scale_ptr, row, group, size // GROUP, scale_row, scale_group, scale,
                    group * GROUP < size, SCALE_FORMAT,
                )  # fmt: skip
            elif SCHEME == "token" and ONE_TILE:
                largest = _largest(_magnitudes(out, mask), GROUPS)
                scale = scale_of(
                    largest, min_amax, min_scale, T, CODE_MAX, SCALE_MODE, SCALE_FORMAT
                )
            elif SCHEME == "asymmetric" and ONE_TILE:
                v = tl.where(mask, to_float32(out), 0.0)
                scale, zero = affine_of(
                    _highest(v, GROUPS), _highest(v * -1.0, GROUPS), min_scale, T, SCALE_MODE
                )
            if SCHEME == "asymmetric":
                codes = affine_codes_of(out, scale, zero, CODE_MODE)
            elif SCHEME == "static asymmetric":
                codes = codes_around(out, scale, given_zero, CODE_MODE)
            else:
                codes = codes_of(
                    out, scale, CODE_MAX, INT8, CODE_MODE, NATIVE_FP8, SCHEME == "static"
                )
            tl.store(out_ptr + offsets, codes, mask=mask)
    if SCHEME == "token" or SCHEME == "asymmetric":
        tl.store(scale_ptr + row + tile_group, scale, mask=tile_group == 0)
    if SCHEME == "asymmetric":
        tl.store(zero_ptr + row + tile_group, zero.to(tl.int8), mask=tile_group == 0)


def _launch(
    scheme: str,
    adds: bool,
    args: tuple[Any, ...],
    out: Tensor,
    *,
    weight_mode: str,
    scale: Tensor | None = None,
    steps: tuple[int, int] = (0, 0),
    amax: Tensor | None = None,
    zero_point: Tensor | None = None,
    keep: bool = False,
    group_size: int = GROUP,
    min_amax: float = 0.0,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: str = "float32",
    min_scale: float = 0.0,
    scale_mode: str = "divide",
    code_mode: str = "divide",
) -> tuple[Tensor, ...]:
    """Run the kernel over all rows, if there are any; returns the norm, with `keep`, and the sum, where there is one.

    args: those of the op, x first. Takes any row pitch; an input strided along hidden_size is copied.
    """
    x: Tensor = args[0]
    weight, eps = args[1 + adds : 3 + adds]
    rows = as_rows(x)
    residuals = as_rows(args[1]) if adds else rows
    kept: tuple[Tensor, ...] = (_empty(args),) if keep else ()
    sums: tuple[Tensor, ...] = (_empty(args),) if adds else ()
    if x.numel() == 0:
        return kept + sums
    size = x.shape[-1]
    tile = max(group_size, min(triton.next_power_of_2(size), MAX_TILE))
    with on_device(x):
        _rms_norm[(rows.shape[0],)](
            rows,
            residuals,
            weight.contiguous(),
            out,
            sums[0] if adds else out,
            out if scale is None else scale,
            out if amax is None else amax,
            zero_point,
            kept[0] if keep else out,
            size,
            rows.stride(0),
            residuals.stride(0),
            *steps,
            eps,
            min_amax,
            min_scale,
            WEIGHT_MODE=weight_mode,
            ADD=adds,
            KEEP=keep,
            SCHEME=scheme,
            GROUP=group_size,
            GROUPS=tile // group_size,
            ONE_TILE=size <= tile,
            SCALE_MODE=scale_mode,
            SCALE_FORMAT=scale_format,
            **code_constants(x, dtype, code_mode, scale_mode),
            num_warps=min(max(tile // 1024, 1), 16),
        )
    return kept + sums


def _empty(args: tuple[Any, ...]) -> Tensor:
    return torch.empty(args[0].shape, dtype=args[0].dtype, device=args[0].device)


def _plain(adds: bool, *args: Any, weight_mode: str) -> Tensor | tuple[Tensor, ...]:
    out = _empty(args)
    sums = _launch("plain", adds, args, out, weight_mode=weight_mode)
    return (out, *sums) if adds else out


def _per_group(adds: bool, *args: Any, scale_layout: str, **options: Any) -> tuple[Tensor, ...]:
    group_size = args[-1]
    spec = quant_spec(options["dtype"], (1, group_size), options["scale_format"], scale_layout)
    q, scale = spec.empty(args[0].shape, args[0].device)
    options |= {"steps": scale_steps(scale, scale_layout), "group_size": group_size}
    return q, scale, *_launch("group", adds, args, codes_pointer(q), scale=scale, **options)


def _per_token(adds: bool, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    spec = quant_spec(options["dtype"], (1, None), options["scale_format"])
    q, scale = spec.empty(args[0].shape, args[0].device)
    return q, scale, *_launch("token", adds, args, codes_pointer(q), scale=scale, **options)


def _per_token_asymmetric(adds: bool, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    q, scale, zero_point = empty_affine(args[0])
    options |= {"scale": scale, "zero_point": zero_point, "dtype": torch.int8}
    return q, scale, zero_point, *_launch("asymmetric", adds, args, q, **options)


def _per_tensor(adds: bool, *args: Any, weight_mode: str, **options: Any) -> tuple[Tensor, ...]:
    out = _empty(args)
    amax = torch.zeros(1, dtype=torch.int32, device=out.device)
    sums = _launch("amax", adds, args, out, weight_mode=weight_mode, amax=amax)
    return *quantize_by_amax(out, amax, **options), *sums


def _per_tensor_static(adds: bool, *args: Any, **options: Any) -> Tensor | tuple[Tensor, ...]:
    q = torch.empty(args[0].shape, dtype=options["dtype"], device=args[0].device)
    sums = _launch("static", adds, args, codes_pointer(q), scale=args[-1], **options)
    return (q, *sums) if adds else q


def _per_tensor_asymmetric(
    adds: bool, *args: Any, weight_mode: str, **options: Any
) -> tuple[Tensor, ...]:
    out = _empty(args)
    reach = empty_reach(out)
    sums = _launch("reach", adds, args, out, weight_mode=weight_mode, amax=reach)
    return *quantize_by_reach(out, reach, **options), *sums


def _per_tensor_static_asymmetric(
    adds: bool, *args: Any, **options: Any
) -> Tensor | tuple[Tensor, ...]:
    q = torch.empty(args[0].shape, dtype=torch.int8, device=args[0].device)
    options |= {"scale": args[-2], "zero_point": args[-1], "dtype": torch.int8}
    sums = _launch("static asymmetric", adds, args, q, **options)
    return (q, *sums) if adds else q


rms_norm = partial(_plain, False)
rms_norm_group_quant = partial(_per_group, False)
rms_norm_token_quant = partial(_per_token, False)
rms_norm_token_quant_asymmetric = partial(_per_token_asymmetric, False)
rms_norm_tensor_quant = partial(_per_tensor, False)
rms_norm_tensor_quant_static = partial(_per_tensor_static, False)
rms_norm_tensor_quant_asymmetric = partial(_per_tensor_asymmetric, False)
rms_norm_tensor_quant_static_asymmetric = partial(_per_tensor_static_asymmetric, False)
rms_norm_and_group_quant = partial(_per_group, False, keep=True)
rms_norm_and_token_quant = partial(_per_token, False, keep=True)
add_rms_norm = partial(_plain, True)
add_rms_norm_group_quant = partial(_per_group, True)
add_rms_norm_token_quant = partial(_per_token, True)
add_rms_norm_token_quant_asymmetric = partial(_per_token_asymmetric, True)
add_rms_norm_tensor_quant = partial(_per_tensor, True)
add_rms_norm_tensor_quant_static = partial(_per_tensor_static, True)
add_rms_norm_tensor_quant_asymmetric = partial(_per_tensor_asymmetric, True)
add_rms_norm_tensor_quant_static_asymmetric = partial(_per_tensor_static_asymmetric, True)
add_rms_norm_and_group_quant = partial(_per_group, True, keep=True)
add_rms_norm_and_token_quant = partial(_per_token, True, keep=True)
