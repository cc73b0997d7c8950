"""Several linear layers on one activation in Triton: one shrink for adapters of one rank, then layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from custom_ops.lora import launch
from custom_ops.lora.launch import ShrinkTile, Tokens
from custom_ops.lora.linear import (
    FUSED_TILE,
    chained,
    expand_tile,
    shrink_tile,
    side_stream,
    single_way,
    summed,
)
from custom_ops.platform import on_device
from custom_ops.scales import as_rows


def lora_linears_single(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:
    """As `custom_ops.lora_linears_single`: one shrink for the adapters of one rank, then layer by layer."""
    rows, a, b = as_rows(x), [as_rows(each) for each in a], [as_rows(each) for each in b]
    count, each = rows.shape[0], a[0].dtype == x.dtype
    outs = []
    with on_device(x):
        parts = shrink_together(rows, a, None, chained(x))
        for weight, bias, y, matrix, scaling in zip(
            weights, biases, parts, b, scalings, strict=True
        ):
            if single_way(rows, weight, matrix, each) == "fused":
                out = launch.linear(
                    rows,
                    weight,
                    bias,
                    y,
                    matrix,
                    scaling,
                    FUSED_TILE,
                    each=each,
                    dependent=chained(x),
                )
            else:
                out = torch.nn.functional.linear(rows, weight, bias)
                tile = expand_tile(count, False, y.shape[-1])
                launch.expand(y, (matrix,), out, scaling, None, out, tile, each=each)
            outs.append(out.view(*x.shape[:-1], weight.shape[0]))
    return outs


def shrink_together(
    x: Tensor,
    a: Sequence[Tensor],
    tile: ShrinkTile | None,
    dependent: bool = False,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Of each of several adapters y [splits, 1, T, rank]: one kernel for those of one rank and pitch.

    tile: None for that of a layer alone. dtype: the sums rounded to it, without splits; None for float32, as
    `launch.shrink` returns them, or `summed`.
    """
    alike: dict[tuple[int, int], list[int]] = {}
    for index, each in enumerate(a):
        alike.setdefault((each.shape[0], each.stride(0)), []).append(index)
    parts: dict[int, Tensor] = {}
    for (rank, _), indices in alike.items():
        here = [a[index] for index in indices]
        own = tile or shrink_tile(x.shape[0], False, rank=rank)
        if dtype is None:
            y = launch.shrink(x, here, None, own, dependent)
            y = summed(y, here[0].dtype == x.dtype, x.dtype, dependent)
        else:
            sums = dtype if own.splits == 1 else torch.float32
            y = launch.shrink(x, here, None, own, dependent, sums)
            y = launch.round_sums(y, dtype, dependent)[None]
        parts |= {index: y[:, at : at + 1] for at, index in enumerate(indices)}
    return [parts[index] for index in range(len(a))]


def lora_linears(
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
    """As `custom_ops.lora_linears`: one shrink on a stream of its own, beside the products of all layers."""
    rows = as_rows(x)
    count = rows.shape[0]
    tokens = [Tokens(each, sorted_tokens, tiles) for each in ranks]
    with on_device(x):
        y, run = launch.prepare_shrink(rows, a, tokens[0], shrink_tile(count, True), layers=ranks)
        on_gpu = x.device.type == "cuda"
        if on_gpu:
            main, side = torch.cuda.current_stream(), side_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                run()
        else:
            run()
        layers = zip(weights, biases, strict=True)
        bases = [torch.nn.functional.linear(rows, weight, bias) for weight, bias in layers]
        if on_gpu:
            main.wait_stream(side)
        tile = expand_tile(count, True, y.shape[-1])
        for index, (base, matrix, scaling) in enumerate(zip(bases, b, scalings, strict=True)):
            part = summed(y[:, index : index + 1], False, x.dtype)
            launch.expand(part, (matrix,), base, scaling, tokens[index], base, tile)
    return [base.view(*x.shape[:-1], base.shape[-1]) for base in bases]
