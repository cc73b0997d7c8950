"""Quantization in Triton: of a tensor, or of what a gated activation makes of two.

Three kernels, by what shares a scale: a few neighbouring groups to a program, a token to a program, or a
piece of a row to a program where the scale is of the whole tensor or there is none. Each takes the gated
activation as a constant, so that the fused ops are these kernels too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.activation.triton_gates import produce
from custom_ops.platform import on_device
from custom_ops.quantization import reference
from custom_ops.quantization.triton_codes import (
    code_constants,
    codes_of,
    codes_pointer,
    magnitude_bits,
    scale_of,
    store_scale,
)
from custom_ops.scales import as_rows, quant_spec

# Elements of a program where a token is not one: 8 for each of 128 threads, one 16-byte load.
TILE = 1024
# The longest token that stays in registers between its amax and its codes; a longer one is read twice.
MAX_TILE = 16384


def scale_steps(scale: Tensor, scale_layout: str) -> tuple[int, int]:
    """Elements from a token to the next and from a group to the next, in a scale seen as [M, G]."""
    return (scale.shape[-1] if scale_layout == "row_major" else 1), scale.stride(-1)


@triton.jit
def load_values(gate_ptr, up_ptr, gate_at, up_at, mask, alpha, limit, GATE: tl.constexpr):
    """The tile to quantize or store."""
    gate = tl.load(gate_ptr + gate_at, mask=mask, other=0.0)
    up = gate
    if GATE != "none":
        up = tl.load(up_ptr + up_at, mask=mask, other=0.0)
    return produce(gate, up, alpha, limit, GATE)


@triton.jit
def quantize_groups(
    gate_ptr, up_ptr, q_ptr, scale_ptr, first,
    num_groups, groups_per_row, gate_row, up_row, gate_col, up_col, scale_row, scale_group,
    alpha, limit, min_amax, min_scale,
    GATE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    SCALE_MODE: tl.constexpr, SCALE_FORMAT: tl.constexpr,
    CODE_MAX: tl.constexpr, INT8: tl.constexpr, CODE_MODE: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """Quantize BLOCK neighbouring groups, as far as there are so many, of those that lie row after row."""
    # Groups are counted in 32 bits (2^31 of them and their inputs fit no GPU), elements in 64.
    group = first + tl.arange(0, BLOCK)
    mask = group < num_groups
    row = (group // groups_per_row).to(tl.int64)
    in_row = (group % groups_per_row).to(tl.int64)
    lane = tl.arange(0, GROUP)[None, :]
    column = (in_row * GROUP)[:, None] + lane
    x = load_values(
        gate_ptr, up_ptr, (row * gate_row)[:, None] + column * gate_col,
        (row * up_row)[:, None] + column * up_col, mask[:, None], alpha, limit, GATE,
    )  # fmt: skip
    largest = tl.max(magnitude_bits(x), axis=1)
    scale = scale_of(largest, min_amax, min_scale, x.dtype, CODE_MAX, SCALE_MODE, SCALE_FORMAT)
    codes = codes_of(x, scale, CODE_MAX, INT8, CODE_MODE, NATIVE_FP8)
    tl.store(q_ptr + (group.to(tl.int64) * GROUP)[:, None] + lane, codes, mask=mask[:, None])
    store_scale(
        scale_ptr, row, in_row, groups_per_row, scale_row, scale_group, scale, mask, SCALE_FORMAT
    )


@triton.jit(do_not_specialize=["num_groups", "scale_row", "scale_group"])
def _groups(
    gate_ptr, up_ptr, q_ptr, scale_ptr,
    num_groups, groups_per_row, gate_row, up_row, gate_col, up_col, scale_row, scale_group,
    alpha, limit, min_amax, min_scale,
    GATE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    SCALE_MODE: tl.constexpr, SCALE_FORMAT: tl.constexpr,
    CODE_MAX: tl.constexpr, INT8: tl.constexpr, CODE_MODE: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    quantize_groups(
        gate_ptr, up_ptr, q_ptr, scale_ptr, tl.program_id(0) * BLOCK,
        num_groups, groups_per_row, gate_row, up_row, gate_col, up_col, scale_row, scale_group,
        alpha, limit, min_amax, min_scale,
        GATE, GROUP, BLOCK, SCALE_MODE, SCALE_FORMAT, CODE_MAX, INT8, CODE_MODE, NATIVE_FP8,
    )  # fmt: skip


@triton.jit
def _token(
    gate_ptr, up_ptr, q_ptr, scale_ptr,
    size, gate_row, up_row, gate_col, up_col,
    alpha, limit, min_amax, min_scale,
    GATE: tl.constexpr, TILE: tl.constexpr, ONE_TILE: tl.constexpr,
    SCALE_MODE: tl.constexpr, SCALE_FORMAT: tl.constexpr,
    CODE_MAX: tl.constexpr, INT8: tl.constexpr, CODE_MODE: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    gate_ptr += row * gate_row
    up_ptr += row * up_row
    q_ptr += row * size
    lane = tl.arange(0, TILE)[None, :]
    if ONE_TILE:
        mask = lane < size
        x = load_values(gate_ptr, up_ptr, lane * gate_col, lane * up_col, mask, alpha, limit, GATE)
        # What lies past the end was made of zeros, and is zero.
        largest = tl.max(magnitude_bits(x), axis=1)
        scale = scale_of(largest, min_amax, min_scale, x.dtype, CODE_MAX, SCALE_MODE, SCALE_FORMAT)
        codes = codes_of(x, scale, CODE_MAX, INT8, CODE_MODE, NATIVE_FP8)
        tl.store(q_ptr + lane, codes, mask=mask)
    else:
        bits = tl.zeros((1, TILE), tl.int32)
        for start in range(0, size, TILE):
            at = start + lane
            x = load_values(
                gate_ptr, up_ptr, at * gate_col, at * up_col, at < size, alpha, limit, GATE
            )
            bits = tl.maximum(bits, magnitude_bits(x))
        largest = tl.max(bits, axis=1)
        T: tl.constexpr = gate_ptr.dtype.element_ty
        scale = scale_of(largest, min_amax, min_scale, T, CODE_MAX, SCALE_MODE, SCALE_FORMAT)
        for start in range(0, size, TILE):
            at = start + lane
            x = load_values(
                gate_ptr, up_ptr, at * gate_col, at * up_col, at < size, alpha, limit, GATE
            )
            codes = codes_of(x, scale, CODE_MAX, INT8, CODE_MODE, NATIVE_FP8)
            tl.store(q_ptr + at, codes, mask=at < size)
    tl.store(scale_ptr + row + tl.arange(0, 1), scale)


@triton.jit
def raise_amax(amax_ptr, largest):
    """amax = max(amax, largest) for one number [1], asking first: most programs have nothing to add."""
    at = amax_ptr + tl.arange(0, 1)
    tl.atomic_max(at, largest, mask=largest > tl.load(at))


@triton.jit
def _pieces(
    gate_ptr, up_ptr, out_ptr, scale_ptr, amax_ptr,
    size, tiles, gate_row, up_row, gate_col, up_col,
    alpha, limit, min_amax, min_scale,
    GATE: tl.constexpr, TILE: tl.constexpr, STORE: tl.constexpr, AMAX: tl.constexpr,
    SCALE_MODE: tl.constexpr, SCALE_FORMAT: tl.constexpr,
    CODE_MAX: tl.constexpr, INT8: tl.constexpr, CODE_MODE: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)[None, :]
    mask = column < size
    x = load_values(
        gate_ptr, up_ptr, row * gate_row + column * gate_col, row * up_row + column * up_col,
        mask, alpha, limit, GATE,
    )  # fmt: skip
    if AMAX:
        raise_amax(amax_ptr, tl.max(magnitude_bits(x), axis=1))
    out_ptr += row * size
    if STORE == "values":
        tl.store(out_ptr + column, x, mask=mask)
    elif STORE == "codes of the amax":
        largest = tl.load(amax_ptr + tl.arange(0, 1))
        scale = scale_of(largest, min_amax, min_scale, x.dtype, CODE_MAX, SCALE_MODE, SCALE_FORMAT)
        codes = codes_of(x, scale, CODE_MAX, INT8, CODE_MODE, NATIVE_FP8)
        tl.store(out_ptr + column, codes, mask=mask)
        if tl.program_id(0) == 0:
            tl.store(scale_ptr + tl.arange(0, 1), scale)
    elif STORE == "codes of the scale":
        scale = tl.load(scale_ptr + tl.arange(0, 1))
        codes = codes_of(x, scale, CODE_MAX, INT8, CODE_MODE, NATIVE_FP8, True)
        tl.store(out_ptr + column, codes, mask=mask)


class Inputs:
    """The arguments of an op as the kernels take them: one tensor, or two and up to two numbers.

    gate: "none", or the gated activation. rest: the arguments of the scheme. Any row pitch is read in place,
    and so is every second column (the halves of an interleaved tensor); what is strided otherwise is copied.
    """

    def __init__(self, gate: str, args: tuple[Any, ...]) -> None:
        self.gate = gate
        count = {"none": 1, "clamped_swiglu": 4}.get(gate, 2)
        self.x: Tensor = args[0]
        pair = (self.x, self.x) if gate == "none" else args[:2]
        self.tensors = tuple(as_rows(t, max_step=2) for t in pair)
        self.scalars = args[2:count] or (0.0, 0.0)
        self.rest = args[count:]

    @property
    def strides(self) -> tuple[int, ...]:
        """From a row to the next, and from a column to the next, of each tensor."""
        a, b = self.tensors
        return (a.stride(0), b.stride(0), a.stride(1), b.stride(1))

    def empty(self) -> Tensor:
        """What the gated activation is written to, uninitialised."""
        return torch.empty(self.x.shape, dtype=self.x.dtype, device=self.x.device)


def run_pieces(
    inputs: Inputs,
    store: str,
    out: Tensor,
    *,
    scale: Tensor | None = None,
    amax: Tensor | None = None,
    find_amax: bool = False,
    min_amax: float = 0.0,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: str = "float32",
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
            out if amax is None else amax,
            size,
            tiles,
            *inputs.strides,
            *inputs.scalars,
            min_amax,
            min_scale,
            GATE=inputs.gate,
            TILE=TILE,
            STORE=store,
            AMAX=find_amax,
            SCALE_MODE=scale_mode,
            SCALE_FORMAT=scale_format,
            **code_constants(x, dtype, code_mode, scale_mode),
            num_warps=4,
        )


def plain(gate: str, *args: Any) -> Tensor:
    """The gated activation alone."""
    inputs = Inputs(gate, args)
    out = inputs.empty()
    run_pieces(inputs, "values", out)
    return out


def per_group(
    gate: str,
    *args: Any,
    scale_layout: str,
    min_amax: float,
    dtype: torch.dtype,
    scale_format: str,
    min_scale: float,
    scale_mode: str,
    code_mode: str,
) -> tuple[Tensor, Tensor]:
    """`group_quant` of the gated activation; the last positional argument is the group size."""
    inputs = Inputs(gate, args)
    (group_size,) = inputs.rest
    x = inputs.x
    spec = quant_spec(dtype, (1, group_size), scale_format, scale_layout)
    q, scale = spec.empty(x.shape, x.device)
    num_groups = x.numel() // group_size
    block = TILE // group_size
    with on_device(x):
        _groups[(triton.cdiv(num_groups, block),)](
            *inputs.tensors,
            codes_pointer(q),
            scale,
            num_groups,
            x.shape[-1] // group_size,
            *inputs.strides,
            *scale_steps(scale, scale_layout),
            *inputs.scalars,
            min_amax,
            min_scale,
            GATE=gate,
            GROUP=group_size,
            BLOCK=block,
            SCALE_MODE=scale_mode,
            SCALE_FORMAT=scale_format,
            **code_constants(x, dtype, code_mode, scale_mode),
            num_warps=4,
        )
    return q, scale


def per_token(
    gate: str,
    *args: Any,
    min_amax: float,
    dtype: torch.dtype,
    scale_format: str,
    min_scale: float,
    scale_mode: str,
    code_mode: str,
) -> tuple[Tensor, Tensor]:
    """`token_quant` of the gated activation."""
    inputs = Inputs(gate, args)
    x = inputs.x
    q, scale = quant_spec(dtype, (1, None), scale_format).empty(x.shape, x.device)
    size = x.shape[-1]
    tile = min(triton.next_power_of_2(size), MAX_TILE)
    with on_device(x):
        _token[(scale.numel(),)](
            *inputs.tensors,
            codes_pointer(q),
            scale,
            size,
            *inputs.strides,
            *inputs.scalars,
            min_amax,
            min_scale,
            GATE=gate,
            TILE=tile,
            ONE_TILE=size <= tile,
            SCALE_MODE=scale_mode,
            SCALE_FORMAT=scale_format,
            **code_constants(x, dtype, code_mode, scale_mode),
            num_warps=min(max(tile // 1024, 1), 16),
        )
    return q, scale


def per_tensor(gate: str, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`tensor_quant` of the gated activation: a kernel for its values and their amax, one for the codes."""
    inputs = Inputs(gate, args)
    values = inputs.x if gate == "none" else inputs.empty()
    amax = torch.zeros(1, dtype=torch.int32, device=values.device)
    store = "nothing" if gate == "none" else "values"
    run_pieces(inputs, store, values, amax=amax, find_amax=True)
    return quantize_by_amax(values, amax, **options)


def quantize_by_amax(x: Tensor, amax: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """`tensor_quant` of x, the bits of whose amax are known, int32 [1]."""
    if x.numel() == 0:  # no program would store the scale
        return reference.tensor_quant(x, **options)
    spec = quant_spec(options["dtype"], (None, None), options["scale_format"])
    q, scale = spec.empty(x.shape, x.device)
    inputs, codes = Inputs("none", (x,)), codes_pointer(q)
    run_pieces(inputs, "codes of the amax", codes, scale=scale, amax=amax, **options)
    return q, scale


def per_tensor_static(gate: str, *args: Any, **options: Any) -> Tensor:
    """`tensor_quant_static` of the gated activation; the last positional argument is the scale."""
    inputs = Inputs(gate, args)
    (scale,) = inputs.rest
    q = torch.empty(inputs.x.shape, dtype=options["dtype"], device=inputs.x.device)
    run_pieces(inputs, "codes of the scale", codes_pointer(q), scale=scale, **options)
    return q


def implementations_of(gate: str) -> tuple[Callable[..., Any], ...]:
    """The gated activation followed by group_quant, token_quant, tensor_quant, tensor_quant_static."""
    kinds = (per_group, per_token, per_tensor, per_tensor_static)
    return tuple(partial(kind, gate) for kind in kinds)


group_quant, token_quant, tensor_quant, tensor_quant_static = implementations_of("none")
