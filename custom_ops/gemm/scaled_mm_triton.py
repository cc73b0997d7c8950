"""scaled_mm in Triton: for any shape and any strides, with the scales, the bias and the rounding in the same kernel.

float8 sums are promoted to float32 every 128 channels (`max_num_imprecise_acc`): Hopper's matrix units keep about 14
bits otherwise. int8 sums are exact, and the epilogue is not contracted to fused multiply-adds, so that every tile and
the reference give the same bits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.gemm.scaled_mm_choice import preferred
from custom_ops.gemm.triton_kernels import ROW_TILES, _operand
from custom_ops.platform import on_device
from custom_ops.scales import as_rows
from custom_ops.triton_math import native_fp8, round_to, to_float32


@dataclass(frozen=True)
class Tile:
    """What one program multiplies at a time, and how: rows, columns, channels, warps, stages of the pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    @property
    def name(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    def within(self, shared_bytes: int) -> Tile:
        """With as few stages as the shared memory asks for."""
        stage = (self.m + self.n) * self.k
        return replace(self, stages=max(1, min(self.stages, shared_bytes // stage)))


# Few tokens: 16 rows, and columns few enough that every multiprocessor reads weights. Many: the matrix units' work.
TILES = {
    tile.name: tile
    for tile in (
        Tile(16, 32, 256, 4, 4),
        Tile(16, 32, 512, 4, 3),
        Tile(16, 64, 256, 4, 4),
        Tile(64, 32, 256, 4, 4),
        Tile(64, 64, 128, 4, 5),
        Tile(64, 64, 256, 4, 4),
        Tile(64, 128, 128, 4, 4),
        Tile(128, 64, 128, 4, 4),
        Tile(128, 128, 128, 8, 4),
        Tile(128, 256, 128, 8, 3),
    )
}


@triton.jit
def _finish(
    v,
    a_scale,
    b_scale,
    bias_ptr,
    column,
    in_columns,
    OUT_DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    """float32 sums to the output: scaled, biased, rounded once at the end or after each step."""
    if EPILOGUE != "float32":
        if EPILOGUE == "out_dtype":
            v = to_float32(round_to(v, OUT_DTYPE))
        v = to_float32(round_to(v * a_scale[:, None], OUT_DTYPE))
        v = to_float32(round_to(v * b_scale[None, :], OUT_DTYPE))
    else:
        v = v * a_scale[:, None] * b_scale[None, :]
    if HAS_BIAS:
        v = v + to_float32(tl.load(bias_ptr + column, mask=in_columns, other=0.0))[None, :]
    return round_to(v, OUT_DTYPE)


@triton.jit
def _scaled_mm(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    a_row,
    a_scale_step,
    b_row,
    b_scale_step,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROW_TILES: tl.constexpr,
    EVEN_K: tl.constexpr,
    FEW_ROWS: tl.constexpr,
    INTEGER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // (ROW_TILES * column_tiles)
    in_band = tl.program_id(0) % (ROW_TILES * column_tiles)
    height = tl.minimum(row_tiles - band * ROW_TILES, ROW_TILES)
    row = (band * ROW_TILES + in_band % height).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (in_band // height).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_columns = row < M, column < N
    # Beyond the end the first row and column are read, which costs no mask; what comes of them is not stored. Of a
    # tile that is larger than all rows, that would be the same few bytes for most of it, asked for by every program.
    a_from, b_from = tl.where(in_rows, row, 0), tl.where(in_columns, column, 0)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + a_from[:, None] * a_row + k[None, :]
    b_ptrs = b_ptr + b_from[None, :] * b_row + k[:, None]

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
    for block in range(tl.cdiv(K, BLOCK_K)):
        if EVEN_K and FEW_ROWS:
            a = tl.load(a_ptrs, mask=in_rows[:, None], other=0 if INTEGER else 0.0)
            b = tl.load(b_ptrs)
        elif EVEN_K:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            in_k = k < K - block * BLOCK_K
            a = tl.load(a_ptrs, mask=in_k[None, :], other=0 if INTEGER else 0.0)
            b = tl.load(b_ptrs, mask=in_k[:, None], other=0 if INTEGER else 0.0)
        if INTEGER:
            total = tl.dot(a, b, total, out_dtype=tl.int32)
        else:
            total = tl.dot(
                _operand(a, NATIVE_FP8), _operand(b, NATIVE_FP8), total, max_num_imprecise_acc=128
            )
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K

    a_scale = to_float32(tl.load(a_scale_ptr + a_from * a_scale_step))
    b_scale = to_float32(tl.load(b_scale_ptr + b_from * b_scale_step))
    out = _finish(
        total.to(tl.float32),
        a_scale,
        b_scale,
        bias_ptr,
        column,
        in_columns,
        out_ptr.dtype.element_ty,
        HAS_BIAS,
        EPILOGUE,
    )
    tl.store(
        out_ptr + row[:, None] * N + column[None, :],
        out,
        mask=in_rows[:, None] & in_columns[None, :],
    )


@triton.jit
def _scale_sums(
    sums_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    a_scale_step,
    b_scale_step,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
):
    column_tiles = tl.cdiv(N, BLOCK_N)
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_columns = row < M, column < N
    inside = in_rows[:, None] & in_columns[None, :]
    place = row[:, None] * N + column[None, :]
    sums = tl.load(sums_ptr + place, mask=inside, other=0)
    a_scale = to_float32(tl.load(a_scale_ptr + row * a_scale_step, mask=in_rows, other=0.0))
    b_scale = to_float32(tl.load(b_scale_ptr + column * b_scale_step, mask=in_columns, other=0.0))
    out = _finish(
        sums.to(tl.float32),
        a_scale,
        b_scale,
        bias_ptr,
        column,
        in_columns,
        out_ptr.dtype.element_ty,
        HAS_BIAS,
        EPILOGUE,
    )
    tl.store(out_ptr + place, out, mask=inside)


def scaled_mm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    epilogue: str,
    tile: str | None = None,
) -> Tensor:
    """As `custom_ops.scaled_mm`. Takes any row pitch; codes that are strided along K are copied.

    tile: a name of `TILES`; None takes the one that the tables say is fastest.
    """
    n, k = b.shape
    out = torch.empty((*a.shape[:-1], n), dtype=out_dtype, device=a.device)
    rows, columns = as_rows(a), as_rows(b)
    m = rows.shape[0]
    if out.numel() == 0:
        return out
    integer, fp8 = a.dtype == torch.int8, native_fp8(a)
    if not integer and not fp8:
        rows, columns = rows.view(torch.uint8), columns.view(torch.uint8)
    (left, left_step), (right, right_step) = _stepped(a_scale), _stepped(b_scale)
    chosen = TILES[tile] if tile else _tile(a, a_scale, b, b_scale)
    if a.device.type == "cuda":
        chosen = chosen.within(_shared_bytes(a.device))
    with on_device(a):
        _scaled_mm[(triton.cdiv(m, chosen.m) * triton.cdiv(n, chosen.n),)](
            rows,
            left,
            columns,
            right,
            bias if bias is None else bias.contiguous(),
            out,
            m,
            n,
            k,
            rows.stride(0),
            left_step,
            columns.stride(0),
            right_step,
            BLOCK_M=chosen.m,
            BLOCK_N=chosen.n,
            BLOCK_K=chosen.k,
            ROW_TILES=ROW_TILES,
            EVEN_K=k % chosen.k == 0,
            FEW_ROWS=m < chosen.m,
            INTEGER=integer,
            HAS_BIAS=bias is not None,
            EPILOGUE=epilogue,
            NATIVE_FP8=fp8,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            enable_fp_fusion=False,
        )
    return out


def scale_sums(
    sums: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    epilogue: str,
) -> Tensor:
    """The epilogue of scaled_mm alone, for contiguous int32 sums [M, N] on a GPU or in the interpreter."""
    m, n = sums.shape
    out = torch.empty((m, n), dtype=out_dtype, device=sums.device)
    (left, left_step), (right, right_step) = _stepped(a_scale), _stepped(b_scale)
    block_m, block_n = 4, 512
    with on_device(sums):
        _scale_sums[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
            sums,
            left,
            right,
            bias if bias is None else bias.contiguous(),
            out,
            m,
            n,
            left_step,
            right_step,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            HAS_BIAS=bias is not None,
            EPILOGUE=epilogue,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out


def _stepped(scale: Tensor) -> tuple[Tensor, int]:
    """A scale as a row of numbers, and the distance from one to the next: 0 for the one number of a tensor."""
    if scale.numel() == 1:
        return scale, 0
    row = scale.reshape(-1)
    return row, row.stride(0)


def _tile(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tile:
    best = preferred(a, a_scale, b, b_scale)
    if best is not None and best.tile in TILES:
        return TILES[best.tile]
    return TILES["64x64x128" if a.numel() <= 64 * b.shape[1] else "128x128x128"]


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
