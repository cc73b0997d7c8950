"""Launches the Triton kernels of this folder: shapes, strides, workspaces, and the sizes of their tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from custom_ops.lora.triton_kernels import (
    EACH,
    FLOAT32,
    expand_kernel,
    round_sums_kernel,
    shrink_kernel,
)
from custom_ops.lora.triton_linear import linear_kernel

ROW_TILES = 8  # tiles of rows that run together, so that a tile of W is read from L2 by all of them


@dataclass(frozen=True)
class ShrinkTile:
    """Tokens, ranks and channels of a tile of the shrink; splits of the channels; warps; stages of the pipeline."""

    m: int
    k: int
    splits: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ExpandTile:
    """Tokens and columns of a tile of the expand; warps."""

    m: int
    n: int
    warps: int


@dataclass(frozen=True)
class LinearTile:
    """Rows, columns and channels of a tile of the base product; warps; stages.

    programs share the tiles, one each if 0, and then `flatten` makes one loop of both. parts: in which the columns of
    a tile are finished, for fewer registers: 1, 2 or 4.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int = 0
    flatten: bool = False
    parts: int = 1


@dataclass(frozen=True)
class Tokens:
    """Which adapter each token has: the tensors of a LoRABatch and the ranks of the slots; None: all have the one."""

    ranks: Tensor
    sorted_tokens: Tensor
    tiles: Tensor

    @property
    def most_active(self) -> int:
        """Adapters in one batch, at most; and those without one count as one more."""
        return self.tiles.shape[1] - -(-self.sorted_tokens.shape[0] // 16)

    def bound(self, tokens: int, m: int) -> int:
        """Tiles of m tokens that so many tokens can be in, at most."""
        return min(tokens, -(-tokens // m) + self.most_active)

    def of_size(self, m: int) -> Tensor:
        return self.tiles[0 if m == 16 else 1]


def shrink(
    x: Tensor,
    a: Sequence[Tensor],
    tokens: Tokens | None,
    tile: ShrinkTile,
    dependent: bool = False,
    dtype: torch.dtype = torch.float32,
    share: int = 1,
    layers: Sequence[Tensor] | None = None,
) -> Tensor:
    """Partial sums [splits, slices, T, R] of x [T, H] by a, each [slots, R, H], or [R, H] without tokens.

    dtype: of the sums, each rounded to it. share: tokens, one after the other, that are one row of x [T / share, H].
    layers: the ranks of the slots for each of a, where each is of a layer of its own; each has its sums in one piece
    then, y[:, i : i + 1].
    """
    y, run = prepare_shrink(x, a, tokens, tile, dependent, dtype, share, layers)
    run()
    return y


def prepare_shrink(
    x: Tensor,
    a: Sequence[Tensor],
    tokens: Tokens | None,
    tile: ShrinkTile,
    dependent: bool = False,
    dtype: torch.dtype = torch.float32,
    share: int = 1,
    layers: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Callable[[], object]]:
    """What `shrink` returns, not yet written, and the launch that writes it: on whichever stream is current then."""
    count, channels = x.shape[0] * share, x.shape[1]
    rank = a[0].shape[-2]
    step = triton.cdiv(triton.cdiv(channels, tile.splits), tile.k) * tile.k
    splits = triton.cdiv(channels, step)
    if layers is None:
        y = torch.empty((splits, len(a), count, rank), dtype=dtype, device=x.device)
    else:
        y = torch.empty((len(a), splits, count, rank), dtype=dtype, device=x.device).transpose(0, 1)
    tiles = tokens.bound(count, tile.m) if tokens else triton.cdiv(count, tile.m)
    block_r = rank_block(rank)
    run = partial(
        shrink_kernel[(tiles * splits, triton.cdiv(rank, block_r), len(a))],
        x,
        tuple(a),
        tokens and (tuple(layers) if layers else (tokens.ranks,) * len(a)),
        tokens and tokens.sorted_tokens,
        tokens and tokens.of_size(tile.m),
        y,
        count,
        channels,
        rank,
        x.stride(0),
        a[0].stride(-2),
        a[0].stride(0) if tokens else 0,
        y.stride(0),
        y.stride(1),
        step,
        SLICES=len(a),
        BLOCK_M=tile.m,
        BLOCK_R=block_r,
        BLOCK_K=tile.k,
        EVEN_K=channels % tile.k == 0,
        SHARE=share,
        BATCHED=tokens is not None,
        DEPENDENT=dependent,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **_pdl(dependent),
    )
    return y, run


def round_sums(y: Tensor, dtype: torch.dtype, dependent: bool = False) -> Tensor:
    """The sum of y over its first dimension, rounded to dtype. y: as `shrink` returns it, all of it."""
    if y.shape[0] == 1 and y.dtype == dtype:
        return y[0]
    out = torch.empty(y.shape[1:], dtype=dtype, device=y.device)
    # few numbers in many small blocks: each sum waits for all of its splits
    block, warps = (1024, 4) if out.numel() >= 1 << 17 else (128, 1)
    round_sums_kernel[(triton.cdiv(out.numel(), block),)](
        y,
        out,
        out.numel(),
        SPLITS=y.shape[0],
        BLOCK=block,
        DEPENDENT=dependent,
        num_warps=warps,
        **_pdl(dependent),
    )
    return out


def expand(
    y: Tensor,
    b: Sequence[Tensor],
    base: Tensor | None,
    scaling: Tensor | float,
    tokens: Tokens | None,
    out: Tensor,
    tile: ExpandTile,
    *,
    each: bool = False,
    dependent: bool = False,
    after_shrink: bool = False,
) -> Tensor:
    """Writes base + scaling * y @ b.T to out [T, N], contiguous. y: as `shrink` returns it, or some slices of it.

    base: [T, N] of out's dtype and any row pitch, perhaps out itself; or None. after_shrink: the kernel before this one
    is the shrink, which lets it start only when the base is there.
    """
    count, columns = out.shape
    rank = y.shape[-1]
    tiles = tokens.bound(count, tile.m) if tokens else triton.cdiv(count, tile.m)
    widths = tuple(each_b.shape[-2] for each_b in b)
    blocks = sum(triton.cdiv(width, tile.n) for width in widths)
    block_r = rank_block(rank)
    expand_kernel[(tiles, blocks)](
        y,
        tuple(b),
        widths,
        base,
        scaling if isinstance(scaling, Tensor) else None,
        1.0 if isinstance(scaling, Tensor) else scaling,
        tokens and tokens.ranks,
        tokens and tokens.sorted_tokens,
        tokens and tokens.of_size(tile.m),
        out,
        count,
        columns,
        rank,
        y.stride(0),
        0 if base is None else base.stride(-2),
        tuple(each_b.stride(-2) for each_b in b),
        tuple(each_b.stride(0) if tokens else 0 for each_b in b),
        SLICES=len(b),
        SPLITS=y.shape[0],
        HAS_BASE=base is not None,
        EARLY_BASE=after_shrink or not dependent,
        IN_PLACE=base is not None and base.data_ptr() == out.data_ptr(),
        ROUND=(EACH if each else FLOAT32).value,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_R=block_r,
        RANK_STEP=math.gcd(rank, 16),
        ONE_BLOCK=rank <= block_r,
        BATCHED=tokens is not None,
        DEPENDENT=dependent,
        num_warps=tile.warps,
        enable_fp_fusion=False,
        **_pdl(dependent),
    )
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    b: Tensor,
    scaling: float,
    tile: LinearTile,
    *,
    each: bool = False,
    dependent: bool = False,
) -> Tensor:
    """x @ weight.T + bias + scaling * y @ b.T for one adapter, in one kernel. y: one slice of what `shrink` returns."""
    (count, channels), columns = x.shape, weight.shape[0]
    out = torch.empty((count, columns), dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(count, tile.m) * triton.cdiv(columns, tile.n)
    programs = min(tiles, tile.programs) if tile.programs else tiles
    rank = y.shape[-1]
    block_r = rank_block(rank)
    linear_kernel[(programs,)](
        _descriptor(x, tile.m, tile.k),
        _descriptor(weight, tile.n, tile.k),
        bias,
        y,
        b,
        scaling,
        out,
        count,
        columns,
        channels,
        rank,
        y.stride(0),
        b.stride(0),
        ROW_TILES=ROW_TILES,
        SPLITS=y.shape[0],
        HAS_BIAS=bias is not None,
        ROUND=(EACH if each else FLOAT32).value,
        PROGRAMS=programs,
        FLATTEN=tile.flatten,
        PARTS=tile.parts,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BLOCK_R=block_r,
        RANK_STEP=math.gcd(rank, 16),
        ONE_BLOCK=rank <= block_r,
        DEPENDENT=dependent,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
        **_pdl(dependent),
    )
    return out


def rank_block(rank: int) -> int:
    """Ranks that are multiplied at a time: what the matrix units take at least, up to 64."""
    return min(64, max(16, triton.next_power_of_2(rank)))


def _descriptor(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, [rows, columns])


def _pdl(dependent: bool) -> dict[str, bool]:
    return {"launch_pdl": True} if dependent else {}
