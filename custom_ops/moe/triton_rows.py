"""The activation between two grouped products of a library, with its bias and quantization, in Triton.

A contiguous layout has rows for the worst routing; most of what is beyond the tokens is skipped here, where an op on
the whole tensor would read and write it. A program takes some columns of a row, if the row is somebody's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.moe.activation import Activation
from custom_ops.moe.triton_products import activate
from custom_ops.platform import on_device
from custom_ops.quantization.triton_codes import (
    code_constants,
    codes_of,
    codes_pointer,
    magnitude_bits,
    scale_of,
)
from custom_ops.scales import quant_spec
from custom_ops.triton_math import round_to, to_float32

GROUP = 128


@triton.jit(do_not_specialize=["width"])
def _activate_rows(
    x_ptr, bias_ptr, out_ptr, scale_ptr, row_experts_ptr,
    width, x_row, bias_expert, bias_column, scale_row, scale_group, alpha, limit, min_amax,
    GATE: tl.constexpr, INTERLEAVED: tl.constexpr, BIAS: tl.constexpr, QUANTIZE: tl.constexpr,
    SCALE_MODE: tl.constexpr, CODE_MODE: tl.constexpr, CODE_MAX: tl.constexpr, INT8: tl.constexpr,
    NATIVE_FP8: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    expert = tl.load(row_experts_ptr + row).to(tl.int64)
    if expert < 0:
        return
    T: tl.constexpr = x_ptr.dtype.element_ty
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = column < width
    GATED: tl.constexpr = GATE != "relu2"
    STEP: tl.constexpr = 2 if INTERLEAVED else 1
    other = 1 if INTERLEAVED else width
    gate = tl.load(x_ptr + row * x_row + column * STEP, mask=inside, other=0.0)
    up = gate
    if GATED:
        up = tl.load(x_ptr + row * x_row + column * STEP + other, mask=inside, other=0.0)
    if BIAS:
        biases = bias_ptr + expert * bias_expert
        b = tl.load(biases + column * STEP * bias_column, mask=inside, other=0.0)
        gate = round_to(to_float32(gate) + to_float32(b), T)
        if GATED:
            b = tl.load(biases + (column * STEP + other) * bias_column, mask=inside, other=0.0)
            up = round_to(to_float32(up) + to_float32(b), T)
    out = activate(gate, up, alpha, limit, GATE)
    out_ptrs = out_ptr + row * width + column
    if QUANTIZE:
        scale = scale_of(magnitude_max(out), min_amax, 0.0, T, CODE_MAX, SCALE_MODE, "float32")
        codes = codes_of(out, scale, CODE_MAX, INT8, CODE_MODE, NATIVE_FP8)
        tl.store(out_ptrs, codes, mask=inside)
        tl.store(scale_ptr + row * scale_row + group * scale_group, scale, mask=group * 128 < width)
    else:
        tl.store(out_ptrs, out, mask=inside)


@triton.jit
def magnitude_max(x):
    """The largest magnitude of each group, as bits."""
    return tl.max(magnitude_bits(x), axis=1)


def activate_rows(
    x: Tensor,
    row_experts: Tensor,
    activation: Activation,
    *,
    bias: Tensor | None = None,
    quantize: bool = False,
    min_amax: float = 1e-10,
    scale_mode: str = "divide",
    code_mode: str = "divide",
) -> tuple[Tensor, Tensor | None]:
    """activation(x + bias[expert]) of the rows that are somebody's, in the dtype T of x; the sum is rounded to T.

    x: bfloat16 or float16, [rows, 2 * I] or, for "relu2", [rows, I], contiguous rows. row_experts: int32 [rows],
    -1 for a row that is nobody's, of which nothing is read or written. bias: of the dtype of x, [E, 2 * I] or [E, I].
    quantize: returns float8_e4m3fn codes and their scales in the layout "column_major_tma", with the bits of
    `group_quant` by the last three keywords; I is a multiple of 128 then. Returns ([rows, I], scale or None).
    """
    rows, width = x.shape
    columns = activation.width(width)
    scale: Tensor | None = None
    if quantize:
        if columns % GROUP:
            raise ValueError(
                f"activate_rows: I is {columns}; accepted with quantize: multiples of {GROUP}"
            )
        spec = quant_spec(torch.float8_e4m3fn, (1, GROUP), "float32", "column_major_tma")
        out, scale = spec.empty((rows, columns), x.device)
    else:
        out = x.new_empty(rows, columns)
    groups = 8 if columns % 1024 == 0 else 2
    with on_device(x):
        _activate_rows[(rows, triton.cdiv(columns, groups * GROUP))](
            x,
            bias,
            codes_pointer(out) if quantize else out,
            scale,
            row_experts,
            columns,
            x.stride(0),
            *((0, 0) if bias is None else bias.stride()),
            *((0, 0) if scale is None else scale.stride()),
            activation.alpha,
            activation.limit,
            min_amax,
            GATE=activation.name,
            INTERLEAVED=activation.interleaved,
            BIAS=bias is not None,
            QUANTIZE=quantize,
            SCALE_MODE=scale_mode,
            GROUPS=groups,
            **code_constants(x, torch.float8_e4m3fn, code_mode),
            num_warps=max(1, groups * GROUP // 256),
        )
    return out, scale
