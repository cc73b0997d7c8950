"""A batch beside the BLAS in CUDA C++ for Hopper: the way "tiled" of `ways`, and several layers on one activation.

The kernels are of `csrc/lora_batch.cu`: shrink and expand of 16 tokens of one adapter, a warp by itself. They take
bfloat16, adapters of 16, 32 or 64 ranks at most, slices of multiples of 64 columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from custom_ops.lora import ways

if TYPE_CHECKING:  # it imports Triton
    from custom_ops.lora.launch import Tokens

MAX_SLICES = 4
RANKS = (16, 32, 64)
SLICE_COLUMNS = 64
SHRINK_CHANNELS = 256  # a block of the shrink takes a multiple of them
SPLIT_CHANNELS = 1024  # below which a block finds too little to do
SHRINK_BLOCKS = 512  # that there should be, if the channels can be split so often
TILE_TOKENS = 16


def takes(x: Tensor, b: Sequence[Tensor], tiles: Tensor) -> bool:
    """Whether the kernels take such a batch."""
    widths = [each.shape[-2] for each in b]
    if type(tiles) is Tensor and tiles.data_ptr() % 16 != 0:  # a fake one has no address
        return False
    return (
        x.dtype == torch.bfloat16
        and b[0].shape[-1] in RANKS
        and len(b) <= MAX_SLICES
        and all(width % SLICE_COLUMNS == 0 for width in widths[:-1])
    )


def split_channels(tiles: int, channels: int) -> int:
    """Channels of a block of the shrink, for so many tiles of tokens at most: as many parts as make enough blocks."""
    parts = max(1, min(SHRINK_BLOCKS // max(tiles, 1), channels // SPLIT_CHANNELS))
    return SHRINK_CHANNELS * -(-channels // (SHRINK_CHANNELS * parts))


def shrink(
    op: Any, x: Tensor, a: Sequence[Tensor], ranks: Sequence[Tensor], tokens: Tokens
) -> Tensor:
    """Partial sums [splits, slices, T, R], each slice in one piece; ranks: of the slots, for each slice."""
    (count, channels), rank = x.shape, a[0].shape[1]
    most = tokens.bound(count, TILE_TOKENS)
    each = split_channels(most, channels)
    shape = len(a), -(-channels // each), count, rank
    y = torch.empty(shape, dtype=torch.float32, device=x.device).transpose(0, 1)
    batch = tokens.sorted_tokens, tokens.of_size(TILE_TOKENS), most
    op(x, *_four(a), *_four(ranks), *batch, each, y, True)
    return y


def expand(
    op: Any, out: Tensor, y: Tensor, b: Sequence[Tensor], scaling: Tensor, tokens: Tokens
) -> None:
    """out += the low-rank product. The kernel before it is the shrink, or an expand behind that, of what is there."""
    batch = (
        tokens.sorted_tokens,
        tokens.of_size(TILE_TOKENS),
        tokens.bound(out.shape[0], TILE_TOKENS),
    )
    op(out, y, *_four(b), scaling, tokens.ranks, *batch, True, True)


def _four(tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    return *tensors, *[None] * (MAX_SLICES - len(tensors))


def load_linears() -> Any:
    """`custom_ops.lora_linears`: one shrink, and then what is left of each layer."""
    from custom_ops.lora import hopper, launch
    from custom_ops.lora.linear import shrink_tile

    decode, of_shrink, of_expand = (
        hopper._op(name) for name in ("lora_decode", "lora_batch_shrink", "lora_batch_expand")
    )

    def run(
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        scalings: Sequence[Tensor],
        ranks: Sequence[Tensor],
        token_slots: Tensor,
        sorted_tokens: Tensor,
        tiles: Tensor,
    ) -> list[Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        count = rows.shape[0]
        taken = [
            hopper.way_of("batch", rows, w, (i,), (j,), tiles) for w, i, j in zip(weights, a, b)
        ]
        tokens = [launch.Tokens(each, sorted_tokens, tiles) for each in ranks]
        layers = list(zip(weights, biases, b, scalings, tokens, strict=True))
        with hopper.on_device(x):
            if ways.TILED in taken:
                outs = [
                    torch.nn.functional.linear(rows, weight, bias) for weight, bias, *_ in layers
                ]
                y = shrink(of_shrink, rows, a, ranks, tokens[0])
                for index, (out, (_, _, matrix, scaling, batch)) in enumerate(zip(outs, layers)):
                    expand(of_expand, out, y[:, index : index + 1], (matrix,), scaling, batch)
            else:
                tile, outs = shrink_tile(count, True), []
                y = launch.shrink(rows, a, tokens[0], tile, dependent=True, layers=ranks)
                for index, (weight, bias, matrix, scaling, batch) in enumerate(layers):
                    more = (1.0, scaling, token_slots, batch.ranks, False)
                    part = y[:, index : index + 1]
                    operands = rows, weight, bias, None, part, *_four((matrix,))
                    outs.append(decode(*operands, *more, *hopper.tile_of(taken[index])))
        return [out.view(*x.shape[:-1], out.shape[-1]) for out in outs]

    return run
