"""The two grouped products of experts for many pairs, on Hopper, in Gluon: for what `triton_experts` says is faster so.

What `triton_experts` says of rows, rounding and layout holds here, to the bit; its kernels serve all that these refuse.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from custom_ops.moe.activation import Activation
from custom_ops.moe.gluon_finish import HALF, ROWS
from custom_ops.moe.gluon_kernels import BLOCK_M, MOST_STAGES, grouped
from custom_ops.moe.tiles import Aligned
from custom_ops.moe.triton_operands import GROUP, strides
from custom_ops.platform import cuda_capability, on_device
from custom_ops.scales import as_rows, code_max

WARPS = 4
LEAST_AMAX = 2.0**-60
GATES = ("silu_mul", "gelu_tanh_mul")


def unsupported(
    rows: Tensor,
    weight: Tensor,
    aligned: Aligned,
    *,
    gate: str = "none",
    bias: Tensor | None,
    w_scale: Tensor | None,
    modes: tuple[str, str] = ("divide", "divide"),
    min_amax: float = LEAST_AMAX,
) -> str | None:
    """Why these kernels cannot take a product, or None. gate: the activation, or "none" for the second product."""
    if rows.device.type != "cuda" or cuda_capability(rows.device) != (9, 0):
        return "needs compute capability 9.0"
    if aligned.block_size != BLOCK_M.value:
        return f"takes blocks of {BLOCK_M.value} pairs, these are of {aligned.block_size}"
    usual = modes == ("divide", "divide") and min_amax >= LEAST_AMAX
    if bias is not None or gate not in ("none", *GATES) or not usual:
        return "takes no bias, no other activation and no other way to quantize"
    fp8 = weight.dtype == torch.float8_e4m3fn
    if rows.dtype != weight.dtype or (w_scale is not None) != fp8:
        return "takes 16-bit weights, or FP8 with scales of blocks"
    experts, outputs, channels = weight.shape
    width = outputs if gate == "none" else outputs // 2
    if fp8 and gate != "none" and width % GROUP:
        return f"needs an intermediate size of a multiple of {GROUP} for FP8, here is {width}"
    pitch = weight.stride(1) * weight.element_size()
    packed = experts == 1 or weight.stride(0) == outputs * weight.stride(1)
    if weight.stride(2) != 1 or not packed or pitch % 16 or weight.data_ptr() % 16:
        return "needs packed weights whose rows lie in one piece, 16-byte aligned"
    if rows.stride(0) * rows.element_size() % 16 or rows.data_ptr() % 16 or rows.stride(1) != 1:
        return "needs rows that are 16-byte aligned"
    if channels * weight.element_size() % 128:
        return "needs channels that fill steps of 128 bytes"
    if experts * outputs >= 2**31:
        return "counts rows of weights in 32 bits"
    return None


def gate_up(
    x: Tensor,
    weight: Tensor,
    aligned: Aligned,
    top_k: int,
    *,
    activation: Activation,
    x_scale: Tensor | None,
    w_scale: Tensor | None,
    quantize: bool,
    dtype: torch.dtype,
    min_amax: float,
    stages: int,
    band: int,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `triton_experts.gate_up`, for what `unsupported` lets through."""
    rows = as_rows(x)
    outputs = weight.shape[1]
    width, padded = outputs // 2, aligned.sorted_ids.shape[0]
    out = x.new_empty((padded, width), dtype=torch.float8_e4m3fn if quantize else dtype)
    scale = (
        x.new_empty((padded, triton.cdiv(width, GROUP)), dtype=torch.float32) if quantize else None
    )
    if out.numel():
        _launch(
            rows, rows.stride(0), x_scale, weight, w_scale, out.view(torch.uint8) if quantize else out, scale,
            aligned, x.shape[0] * top_k, top_k, triton.cdiv(width, HALF.value), HALF.value, width, width, min_amax,
            T=dtype, GATE=activation.name, QUANTIZE=quantize, stages=stages, BAND=band,
        )  # fmt: skip
    return out if scale is None else (out, scale)


def down(
    act: Tensor,
    weight: Tensor,
    aligned: Aligned,
    num_pairs: int,
    *,
    act_scale: Tensor | None,
    w_scale: Tensor | None,
    dtype: torch.dtype,
    stages: int,
    band: int,
) -> Tensor:
    """As `triton_experts.down`, for what `unsupported` lets through."""
    rows = as_rows(act)
    _, hidden, _ = weight.shape
    out = act.new_empty((num_pairs, hidden), dtype=dtype)
    if out.numel():
        shared = gl.NVMMASharedLayout(128, 8 * rows.element_size(), 2)
        block = [ROWS.value, 128 // rows.element_size()]
        tiles = TensorDescriptor(rows, list(rows.shape), list(rows.stride()), block, shared)
        _launch(
            tiles, 0, act_scale, weight, w_scale, out, None,
            aligned, num_pairs, 1, triton.cdiv(hidden, 2 * HALF.value), 2 * HALF.value, HALF.value, hidden, 0.0,
            T=dtype, GATE="none", QUANTIZE=False, stages=stages, BAND=band,
        )  # fmt: skip
    return out


def _launch(
    a: Any,
    a_row: int,
    a_scale: Tensor | None,
    weight: Tensor,
    w_scale: Tensor | None,
    out: Tensor,
    out_scale: Tensor | None,
    aligned: Aligned,
    pairs: int,
    top_k: int,
    column_tiles: int,
    columns: int,
    second: int,
    width: int,
    min_amax: float,
    *,
    T: torch.dtype,
    stages: int,
    **constants: Any,
) -> None:
    """columns: from a tile to the next. second: from the first columns of a tile to its others.

    stages: of which it takes as many as there is shared memory for.
    """
    experts, outputs, channels = weight.shape
    block_k = 128 // weight.element_size()
    flat = weight.as_strided((experts * outputs, channels), (weight.stride(1), 1))
    shared = gl.NVMMASharedLayout(128, 8 * weight.element_size(), 2)
    w = TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [HALF.value, block_k], shared)
    most = aligned.block_experts.shape[0] * column_tiles
    grid = (min(_multiprocessors(out.device), most),)
    with on_device(out), _named():
        grouped[grid](
            a, a_row, a_scale, w, w_scale, out, out_scale,
            aligned.sorted_ids, aligned.block_experts, aligned.num_padded, aligned.num_padded.new_zeros(1),
            pairs, top_k, column_tiles, columns, second, outputs, width, channels,
            *strides(a_scale, 2), *strides(w_scale, 3), min_amax,
            T={torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[T],
            CODE_MAX=code_max(torch.float8_e4m3fn), BLOCK_K=block_k, SCALED=w_scale is not None,
            STAGES=min(stages, MOST_STAGES.value),
            num_warps=WARPS, **constants,
        )  # fmt: skip


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """A launch that a warm-up cannot write down, as it is of a language that Triton still changes, it says so."""
    from custom_ops.jit import tracing

    try:
        yield
    except ValueError as error:
        if (trace := tracing.current()) is None:
            raise
        trace.uncovered(f"Gluon's kernels: {error}"[:200])


def _multiprocessors(device: torch.device) -> int:
    from custom_ops.jit import tracing

    if (trace := tracing.current()) is not None:  # which may be of a GPU that is not here
        return max(1, trace.target.multiprocessors)
    return _of_device(device)


@functools.cache
def _of_device(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
