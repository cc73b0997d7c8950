"""The product of a router in Triton: 16-bit operands on the matrix units, and sums as good as float32 has them.

The matrix units cut off what they add up, where float32 rounds. So they add up BLOCK_K channels at a time, and those
sums are added up with what each addition has lost. Few tokens are few tiles: the channels of each go to several
programs then, and another kernel adds up what they have. One to four tokens are no work for matrix units: their
products are made in float32, in one kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.moe.triton_operands import hopper
from custom_ops.moe.triton_products import operand
from custom_ops.platform import on_device
from custom_ops.scales import as_rows
from custom_ops.triton_math import to_float32

SUM_BLOCK = 512


class Tile(NamedTuple):
    """Tokens, experts and channels at a time, warps, stages of the pipeline, and parts of the channels.

    m = 1: without matrix units, and in one part.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    splits: int


# By the largest number of tokens that they are for, the fastest of those that are well within eager's distance from
# float64. With 128 channels at a time the matrix units lose about twice as much as with 64, which is up to all of that
# distance to 512 tokens; beyond, eager's own product is less precise (ours has 0.2 to 0.8 of its error).
TILES = {
    1: Tile(1, 1, 2048, 8, 1, 1),
    4: Tile(1, 2, 1024, 4, 1, 1),
    16: Tile(16, 32, 64, 4, 6, 16),
    64: Tile(64, 16, 64, 4, 6, 8),
    256: Tile(64, 64, 64, 4, 5, 8),
    512: Tile(64, 64, 64, 4, 5, 8),
    1024: Tile(64, 64, 128, 4, 3, 2),
    2**62: Tile(128, 64, 128, 8, 3, 1),
}
SHORT = 4096
"""Channels below which 64 at a time are added up however many tokens there are: short sums are precise in eager too."""


@triton.jit
def _add(total, lost, term):
    """The sum so far and what its additions have lost, with one more term."""
    term = term - lost
    longer = total + term
    lost = (longer - total) - term
    return longer, tl.where(
        lost == lost, lost, 0.0
    )  # beyond a sum that is infinite nothing is lost


@triton.jit
def _logits(
    x_ptr, w_ptr, out_ptr, M, N, K, x_row, w_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    EVEN_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of the sums over one part of the channels."""
    T: tl.constexpr = x_ptr.dtype.element_ty
    tiles = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLITS)
    first = tl.program_id(1) * steps
    k = first * BLOCK_K + tl.arange(0, BLOCK_K)
    here = (row < M)[:, None]
    x_ptrs = x_ptr + (row.to(tl.int64) * x_row)[:, None] + k[None, :]
    w_ptrs = w_ptr + (tl.where(column < N, column, 0).to(tl.int64) * w_row)[None, :] + k[:, None]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    lost = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(first, tl.minimum(first + steps, tl.cdiv(K, BLOCK_K))):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=here, other=0.0)
            w = tl.load(w_ptrs)
        else:
            inside = tl.arange(0, BLOCK_K) < K - step * BLOCK_K
            x = tl.load(x_ptrs, mask=here & inside[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=inside[:, None], other=0.0)
        total, lost = _add(total, lost, tl.dot(operand(x, T, True), operand(w, T, True)))
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    out_ptrs = out_ptr + tl.program_id(1).to(tl.int64) * M * N
    out_ptrs += (row.to(tl.int64) * N)[:, None] + column[None, :]
    tl.store(out_ptrs, total, mask=here & (column < N)[None, :])


@triton.jit
def _logits_of_one(
    x_ptr, w_ptr, out_ptr, N, K, x_row, w_row,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N logits of one token: each lane adds up its few channels, and then the lanes are added up in float64.

    In float32, 2048 lanes alone were as far from float64 as eager's float32 (0.999 of it, 128 experts of 4096).
    """
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    w_ptrs = w_ptr + (tl.where(column < N, column, 0).to(tl.int64) * w_row)[:, None]
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = to_float32(tl.load(x_ptr + token * x_row + k, mask=k < K, other=0.0))
        w = to_float32(tl.load(w_ptrs + k[None, :], mask=(k < K)[None, :], other=0.0))
        total += x[None, :] * w
    tl.store(out_ptr + token * N + column, tl.sum(total.to(tl.float64), 1), mask=column < N)


@triton.jit
def _sum_parts(
    parts_ptr, out_ptr, count, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """BLOCK of the sums of SPLITS parts, [SPLITS, count], in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros((BLOCK,), tl.float32)
    lost = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.static_range(SPLITS):
        total, lost = _add(total, lost, tl.load(parts_ptr + at, mask=at < count, other=0.0))
        parts_ptr += count
    tl.store(out_ptr + at, total, mask=at < count)


def router_logits(x: Tensor, weight: Tensor, tile: Tile | None = None) -> Tensor:
    """As the op of that name. tile: None takes that of TILES."""
    rows, weight = as_rows(x), as_rows(weight)
    (tokens, channels), experts = rows.shape, weight.shape[0]
    out = torch.empty((*x.shape[:-1], experts), dtype=torch.float32, device=x.device)
    if not out.numel():
        return out
    if tile is None:
        tile = next(tile for most, tile in TILES.items() if tokens <= most)
        if tile.m > 1 and channels < SHORT:
            tile = tile._replace(k=64)
    pdl = hopper(rows)
    launch = {"launch_pdl": True} if pdl else {}
    if tile.m == 1:
        with on_device(x):
            _logits_of_one[(triton.cdiv(experts, tile.n), tokens)](
                rows, weight, out, experts, channels, rows.stride(0), weight.stride(0),
                BLOCK_N=tile.n, BLOCK_K=tile.k, PDL=pdl, num_warps=tile.warps, **launch,
            )  # fmt: skip
        return out
    parts = out if tile.splits == 1 else out.new_empty((tile.splits, tokens, experts))
    tiles = triton.cdiv(tokens, tile.m) * triton.cdiv(experts, tile.n)
    with on_device(x):
        _logits[(tiles, tile.splits)](
            rows, weight, parts, tokens, experts, channels, rows.stride(0), weight.stride(0),
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, SPLITS=tile.splits,
            EVEN_K=channels % tile.k == 0, PDL=pdl, num_warps=tile.warps, num_stages=tile.stages, **launch,
        )  # fmt: skip
        if tile.splits > 1:
            _sum_parts[(triton.cdiv(out.numel(), SUM_BLOCK),)](
                parts, out, out.numel(),
                SPLITS=tile.splits, BLOCK=SUM_BLOCK, PDL=pdl, num_warps=4, **launch,
            )  # fmt: skip
    return out
