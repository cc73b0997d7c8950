"""lora_linear, lora_linear_single and several of either in CUDA C++ for Hopper: the ways of `ways.CUDA`.

The kernels read x and W by TMA, from rows that begin on 16 bytes. The shrink that goes before them, where the kernel
has none of its own, is the Triton one; the two overlap (programmatic dependent launch).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops import platform
from custom_ops.implementation import _no_cuda, _no_triton
from custom_ops.lora import hopper_batch, ways
from custom_ops.platform import on_device

MAX_DECODE_TOKENS = 128
MAX_OWN_RANK = 64  # of the shrink in the decode kernel
MAX_DECODE_RANK = 128  # whose y has room in shared memory
MAX_PREFILL_OWN_RANK = 32  # of the shrink in the prefill kernel
MAX_SLICES = 4
SLICE_COLUMNS = 128
SPLIT_TOKENS = 4096  # from here on the shrink before the prefill kernel splits the channels
_MULTIPLE = 8  # elements of 16 bits on 16 bytes


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None."""
    if reason := _no_cuda(device) or _no_triton(device):
        return reason
    capability = platform.cuda_capability(device)
    return None if capability == (9, 0) else f"needs compute capability 9.0, here is {capability}"


def unsupported_single(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> str | None:
    """Why lora_linear_single cannot be done here, or is left to Triton; None otherwise."""
    return _unsupported("single", x, weight, (a,), (b,))


def unsupported_batch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> str | None:
    """The same of lora_linear."""
    return _unsupported("batch", x, weight, a, b, tiles)


def _unsupported(
    kind: str,
    x: Tensor,
    weight: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    tiles: Tensor | None = None,
) -> str | None:
    columns, channels = weight.shape
    rank = a[0].shape[-2]
    tokens = x.numel() // channels if isinstance(channels, int) and channels else 0
    if not all(isinstance(size, int) for size in (x.numel(), columns, channels, rank)):
        return "a size is not known yet"
    if tokens == 0 or columns == 0:
        return "there is nothing to multiply"
    if any(size % _MULTIPLE for size in (columns, channels, rank)):
        return (
            f"needs N, H and rank to be multiples of {_MULTIPLE}, they are {columns}, {channels} "
            f"and {rank}"
        )
    way = way_of(kind, x, weight, a, b, tiles)
    if way not in ways.CUDA:
        return f"the table has Triton for {tokens} tokens, N = {columns}, H = {channels} (custom_ops/tables)"
    for name, tensor in (("x", x), ("weight", weight), ("a", a[0]), *(("b", each) for each in b)):
        if not _on_16_bytes(tensor, 1 if name == "x" else tensor.dim() - 1):
            return f"needs contiguous rows on 16 bytes; {name} has strides {tensor.stride()}"
    return None


def way_of(
    kind: str,
    x: Tensor,
    weight: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    tiles: Tensor | None = None,
) -> str:
    """The fastest of the ways that take these sizes, Triton's included. tiles: of a batch."""
    among = [*ways.WITH_BLAS]
    tokens = x.numel() // x.shape[-1]
    rank = a[0].shape[-2]
    single = kind == "single"
    if single and a[0].dtype == torch.float32:
        kind = "single float32"
    slices_fit = len(b) == 1 or (
        len(b) <= MAX_SLICES and all(each.shape[-2] % SLICE_COLUMNS == 0 for each in b)
    )
    if tokens <= MAX_DECODE_TOKENS and rank <= MAX_DECODE_RANK and slices_fit:
        among += ways.DECODES
    if tiles is not None and hopper_batch.takes(x, b, tiles):
        among.append(ways.TILED)
    if single:
        if rank <= ways.MAX_FUSED_RANK:
            among.append("fused")
        if a[0].dtype == weight.dtype:
            among += ["prefill", "prefill own"] if rank <= MAX_PREFILL_OWN_RANK else ["prefill"]
    columns, channels = weight.shape
    return ways.best(kind, tokens, columns, channels, rank, tuple(among))


def _on_16_bytes(tensor: Tensor, rows: int) -> bool:
    """Whether a tensor's rows, of `rows` dimensions of it, are contiguous and begin on 16 bytes."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        return False
    strides = tensor.stride()[:-1]
    aligned = all(stride * tensor.element_size() % 16 == 0 for stride in strides)
    if type(tensor) is not Tensor and not isinstance(tensor, torch.nn.Parameter):
        return aligned  # a fake one has no address
    return aligned and tensor.data_ptr() % 16 == 0


def _op(name: str) -> Any:
    from custom_ops import library

    library.load_cuda()
    return getattr(torch.ops.custom_ops_cuda, name).default


def load_single() -> Any:
    """`custom_ops.lora_linear_single`, with the CUDA library loaded; `way` for a way other than the table's."""
    from custom_ops.lora import launch
    from custom_ops.lora.linear import shrink_tile

    decode, prefill = _op("lora_decode"), _op("lora_prefill")

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        way: str | None = None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        tokens, rank = rows.shape[0], a.shape[0]
        each = a.dtype == x.dtype
        shape = (*x.shape[:-1], weight.shape[0])
        way = way or way_of("single", rows, weight, (a,), (b,))
        own = way in ways.DECODES and each and rank <= MAX_OWN_RANK
        with on_device(x):
            if own:
                none = None, None, None
                out = decode(
                    *(rows, weight, bias, a, None, b, *none, scaling, *none, each, *tile_of(way))
                )
                return out.view(shape)
            if way == "prefill own":
                return prefill(rows, weight, bias, a, None, b, scaling, each).view(shape)
            if way == "prefill":
                tile = shrink_tile(tokens, False, whole=tokens < SPLIT_TOKENS)
                dtype = x.dtype if tile.splits == 1 else torch.float32
                y = launch.shrink(rows, (a,), None, tile, dependent=True, dtype=dtype)
                y = launch.round_sums(y, x.dtype, dependent=True)
                return prefill(rows, weight, bias, None, y[0], b, scaling, each).view(shape)
            y = launch.shrink(rows, (a,), None, shrink_tile(tokens, False), dependent=True)
            none = None, None, None
            out = decode(
                *(rows, weight, bias, None, y, b, *none, scaling, *none, each, *tile_of(way))
            )
            return out.view(shape)

    return run


def unsupported_together(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
) -> str | None:
    """The same of lora_linears_single: every one of its layers is done here, or none."""
    return _unsupported_layers("single", x, weights, a, b)


def _unsupported_layers(
    kind: str,
    x: Tensor,
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    tiles: Tensor | None = None,
) -> str | None:
    layers = enumerate(zip(weights, a, b, strict=True))
    reasons = (
        (index, _unsupported(kind, x, weight, (of_a,), (of_b,), tiles))
        for index, (weight, of_a, of_b) in layers
    )
    return next((f"layer {index}: {reason}" for index, reason in reasons if reason), None)


def load_together() -> Any:
    """`custom_ops.lora_linears_single`: those of many tokens share a shrink, those of few have one of their own."""
    from custom_ops.lora.linear import shrink_tile
    from custom_ops.lora.linears import shrink_together

    single, prefill = load_single(), _op("lora_prefill")

    def run(
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        scalings: Sequence[float],
    ) -> list[Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        tokens = rows.shape[0]
        layers = list(zip(weights, biases, a, b, scalings, strict=True))
        taken = [way_of("single", rows, w, (of_a,), (of_b,)) for w, _, of_a, of_b, _ in layers]
        many = [index for index, way in enumerate(taken) if way == "prefill"]
        outs: dict[int, Tensor] = {
            index: single(x, *layers[index], way=way)
            for index, way in enumerate(taken)
            if index not in many
        }
        if many:
            tile = shrink_tile(tokens, False, whole=tokens < SPLIT_TOKENS)
            with on_device(x):
                shrunk = shrink_together(rows, [a[index] for index in many], tile, True, x.dtype)
                for index, y in zip(many, shrunk, strict=True):
                    weight, bias, _, of_b, scaling = layers[index]
                    out = prefill(rows, weight, bias, None, y[0, 0], of_b, scaling, True)
                    outs[index] = out.view(*x.shape[:-1], weight.shape[0])
        return [outs[index] for index in range(len(layers))]

    return run


def tile_of(way: str) -> tuple[int, int]:
    """The columns and the blocks in the name of a way "decode CxB"."""
    columns, blocks = way.removeprefix("decode ").split("x")
    return int(columns), int(blocks)


def load_batch() -> Any:
    """`custom_ops.lora_linear`, with the CUDA library loaded; `way` for a way other than the table's."""
    from custom_ops.lora import launch
    from custom_ops.lora.linear import shrink_tile

    decode, of_shrink, of_expand = map(
        _op, ("lora_decode", "lora_batch_shrink", "lora_batch_expand")
    )

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        scaling: Tensor,
        ranks: Tensor,
        token_slots: Tensor,
        sorted_tokens: Tensor,
        tiles: Tensor,
        way: str | None = None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        way = way or way_of("batch", rows, weight, a, b, tiles)
        batch = launch.Tokens(ranks, sorted_tokens, tiles)
        with on_device(x):
            if way == ways.TILED:
                out = torch.nn.functional.linear(rows, weight, bias)
                y = hopper_batch.shrink(of_shrink, rows, a, [ranks] * len(a), batch)
                hopper_batch.expand(of_expand, out, y, b, scaling, batch)
                return out.view(*x.shape[:-1], weight.shape[0])
            y = launch.shrink(rows, a, batch, shrink_tile(rows.shape[0], True), dependent=True)
            slices = (*b, *[None] * (MAX_SLICES - len(b)))
            more = (1.0, scaling, token_slots, ranks, False, *tile_of(way))
            out = decode(rows, weight, bias, None, y, *slices, *more)
            return out.view(*x.shape[:-1], weight.shape[0])

    return run


def unsupported_batches(
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
) -> str | None:
    """The same of lora_linears: every one of its layers is done here, in tiles if one of them is, or none."""
    if reason := _unsupported_layers("batch", x, weights, a, b, tiles):
        return reason
    if len(weights) > hopper_batch.MAX_SLICES:
        return f"takes {hopper_batch.MAX_SLICES} layers at most, not {len(weights)}"
    each = zip(weights, a, b, strict=True)
    tiled = [way_of("batch", x, w, (i,), (j,), tiles) == ways.TILED for w, i, j in each]
    if any(tiled) and not all(hopper_batch.takes(x, (each_b,), tiles) for each_b in b):
        return "the table has tiles for one of the layers, and they do not take all of them"
    return None
