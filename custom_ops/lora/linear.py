"""The LoRA ops in Triton, and which of their ways is taken for how many tokens.

Apart, beside, after: the BLAS multiplies by W, the shrink runs before it, beside it or after it, and the expand adds to
what the BLAS wrote, in place. Fused: one kernel does W and the expand (`triton_linear`). The choice depends on sizes
only: `ways`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from custom_ops import platform
from custom_ops.lora import launch, ways
from custom_ops.lora.launch import ExpandTile, LinearTile, ShrinkTile, Tokens
from custom_ops.platform import on_device
from custom_ops.scales import as_rows

MAX_SPLIT_RANK = 64  # from where on the partial sums are added up by a kernel of their own
FUSED_TILE = LinearTile(128, 256, 64, 8, 3, parts=2)


def lora_shrink(
    x: Tensor,
    a: Sequence[Tensor],
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> Tensor:
    """As `custom_ops.lora_shrink`. Takes any row pitch of x."""
    rows = as_rows(x)
    with on_device(x):
        y = launch.shrink(
            rows, a, Tokens(ranks, sorted_tokens, tiles), shrink_tile(rows.shape[0], True)
        )
        return y[0] if y.shape[0] == 1 else y.sum(0)


def lora_expand(
    y: Tensor,
    b: Sequence[Tensor],
    base: Tensor | None,
    scaling: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> Tensor:
    """As `custom_ops.lora_expand`. Takes any row pitch of the base."""
    columns = sum(each.shape[1] for each in b)
    shape = (y.shape[1], columns) if base is None else base.shape
    out = torch.empty(shape, dtype=b[0].dtype, device=y.device)
    rows = None if base is None else as_rows(base)
    with on_device(y):
        launch.expand(
            y.contiguous()[None],
            b,
            rows,
            scaling,
            Tokens(ranks, sorted_tokens, tiles),
            out.view(y.shape[1], columns),
            expand_tile(y.shape[1], True, y.shape[2]),
        )
    return out


def lora_add(
    x: Tensor,
    base: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> Tensor:
    """As `custom_ops.lora_add`. Takes any row pitch of x and the base."""
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    rows, tokens = as_rows(x), Tokens(ranks, sorted_tokens, tiles)
    with on_device(x):
        y = launch.shrink(rows, a, tokens, shrink_tile(rows.shape[0], True), chained(x))
        launch.expand(
            summed(y, False, x.dtype, chained(x)),
            b,
            as_rows(base),
            scaling,
            tokens,
            out.view(-1, base.shape[-1]),
            expand_tile(rows.shape[0], True, y.shape[-1]),
            dependent=chained(x),
            after_shrink=True,
        )
    return out


def lora_linear(
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
    """As `custom_ops.lora_linear`. Takes any row pitch of x and the weight. way: other than the table's."""
    tokens, rows = Tokens(ranks, sorted_tokens, tiles), as_rows(x)
    columns, channels = weight.shape
    way = way or ways.best("batch", rows.shape[0], columns, channels, a[0].shape[1], ways.WITH_BLAS)
    with on_device(x):
        out = _with_blas(rows, weight, bias, a, b, scaling, tokens, False, way)
    return out.view(*x.shape[:-1], weight.shape[0])


def lora_linear_single(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    way: str | None = None,
) -> Tensor:
    """As `custom_ops.lora_linear_single`. Takes any row pitch; what is strided along its rows is copied.

    way: other than the table's.
    """
    rows, a, b = as_rows(x), as_rows(a), as_rows(b)
    each = a.dtype == x.dtype
    if way is None:
        way = single_way(rows, weight, b, each)
    with on_device(x):
        if way == "fused":
            tile = shrink_tile(rows.shape[0], False)
            y = launch.shrink(rows, (a,), None, tile, chained(x))
            out = launch.linear(
                rows, weight, bias, y, b, scaling, FUSED_TILE, each=each, dependent=chained(x)
            )
        else:
            out = _with_blas(rows, weight, bias, (a,), (b,), scaling, None, each, way)
    return out.view(*x.shape[:-1], weight.shape[0])


def single_way(x: Tensor, weight: Tensor, b: Tensor, each: bool) -> str:
    """What the table has for one adapter of b's rank, among the ways of Triton."""
    kind = "single" if each else "single float32"
    columns, channels, rank = *weight.shape, b.shape[1]
    fused = rank <= ways.MAX_FUSED_RANK and fusible(x, weight)
    among = (*ways.WITH_BLAS, *(["fused"] if fused else []))
    return ways.best(kind, x.shape[0], columns, channels, rank, among)


def lora_add_single(x: Tensor, base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """As `custom_ops.lora_add_single`. Takes any row pitch; what is strided along its rows is copied."""
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    rows, a, b = as_rows(x), as_rows(a), as_rows(b)
    with on_device(x):
        tile = shrink_tile(rows.shape[0], False, rank=a.shape[0])
        y = launch.shrink(rows, (a,), None, tile, chained(x))
        launch.expand(
            summed(y, a.dtype == x.dtype, x.dtype, chained(x)),
            (b,),
            as_rows(base),
            scaling,
            None,
            out.view(-1, base.shape[-1]),
            expand_tile(rows.shape[0], False, y.shape[-1]),
            each=a.dtype == x.dtype,
            dependent=chained(x),
            after_shrink=True,
        )
    return out


def lora_shrink_single(x: Tensor, a: Sequence[Tensor]) -> Tensor:
    """As `custom_ops.lora_shrink_single`. Takes any row pitch; what is strided along its rows is copied."""
    rows, a, dtype = as_rows(x), [as_rows(each) for each in a], a[0].dtype
    if any(each.stride(0) != a[0].stride(0) for each in a):
        a = [each.contiguous() for each in a]  # a kernel has one row pitch
    with on_device(x):
        tile = shrink_tile(rows.shape[0], False, rank=a[0].shape[0])
        y = launch.shrink(rows, a, None, tile, chained(x))
        return launch.round_sums(y, dtype, chained(x))


def lora_expand_single(y: Tensor, base: Tensor, b: Tensor, scaling: float) -> Tensor:
    """As `custom_ops.lora_expand_single`. Takes any row pitch; what is strided along its rows is copied."""
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    with on_device(y):
        launch.expand(
            y.contiguous()[None, None],
            (as_rows(b),),
            as_rows(base),
            scaling,
            None,
            out.view(-1, base.shape[-1]),
            expand_tile(y.shape[0], False, y.shape[1]),
            each=y.dtype == base.dtype,
        )  # not dependent: the kernel before it may be the one that makes B, which is read before the wait
    return out


def _with_blas(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Tensor | float,
    tokens: Tokens | None,
    each: bool,
    way: str,
) -> Tensor:
    count = x.shape[0]
    batched = tokens is not None
    after = way == "after" and chained(x)
    shrink = shrink_tile(count, batched, rank=a[0].shape[-2])
    parts, run = launch.prepare_shrink(x, a, tokens, shrink, after)

    def run_shrink() -> (
        Tensor
    ):  # what it allocates is of its stream, which waits for this one before it runs again
        run()
        return summed(parts, each, x.dtype, after)

    if way == "beside" and x.device.type == "cuda":
        main, side = torch.cuda.current_stream(), side_stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            y = run_shrink()
        out = torch.nn.functional.linear(x, weight, bias)
        main.wait_stream(side)
    elif way == "after":
        out = torch.nn.functional.linear(x, weight, bias)
        y = run_shrink()
    else:
        y = run_shrink()
        out = torch.nn.functional.linear(x, weight, bias)
    tile = expand_tile(count, batched, y.shape[-1])
    order = {"dependent": after, "after_shrink": after}
    return launch.expand(y, b, out, scaling, tokens, out, tile, each=each, **order)


_side_streams: dict[tuple[int, int], torch.cuda.Stream] = {}


def side_stream() -> torch.cuda.Stream:
    """One per stream that asks, so that no capture meets the work of another stream."""
    current = torch.cuda.current_stream()
    key = (current.device_index, current.cuda_stream)
    if key not in _side_streams:
        _side_streams[key] = torch.cuda.Stream()
    return _side_streams[key]


def chained(x: Tensor) -> bool:
    """Whether one kernel may start while the one before it ends (programmatic dependent launch)."""
    return x.device.type == "cuda" and (platform.cuda_capability(x.device) or (0, 0)) >= (9, 0)


def fusible(x: Tensor, weight: Tensor) -> bool:
    """Whether TMA can read x and W: rows on 16 bytes."""
    return chained(x) and all(
        t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0
        for t in (x, weight)
    )


def shrink_tile(tokens: int, batched: bool, whole: bool = False, rank: int = 0) -> ShrinkTile:
    """Few tokens: many splits, since there are few tiles; many: as few partial sums as fill the GPU.

    whole: without splits, for sums that are rounded where they are made. rank: where `summed` adds them up, more splits
    cost little.
    """
    if whole:
        return ShrinkTile(64, 64, 1, 4, 4)
    if tokens <= 64 and rank > MAX_SPLIT_RANK and not batched:
        return ShrinkTile(32, 128, 16, 4, 3)
    if tokens <= 64:
        return ShrinkTile(16, 256, 8, 4, 2)
    if batched:
        return ShrinkTile(16, 128, 4, 2, 4)
    if tokens <= 512:
        return ShrinkTile(16, 128, 4, 4, 3)
    return ShrinkTile(64, 128, 4, 4, 3)


def expand_tile(tokens: int, batched: bool, rank: int) -> ExpandTile:
    if batched and tokens > 512 and rank <= 16:
        return ExpandTile(16, 512, 8)
    if batched or tokens <= 512:
        return ExpandTile(16, 128 if tokens <= 64 else 256, 4)
    return ExpandTile(64, 128, 4)


def summed(y: Tensor, each: bool, dtype: torch.dtype, dependent: bool = False) -> Tensor:
    """y as the shrink left it, or its sum where the expand, whose columns each read all of it, would read it too often.

    each: rounded to dtype, where PEFT's layer rounds it; the expand would do so.
    """
    if y.shape[0] == 1 or y.shape[-1] <= MAX_SPLIT_RANK:
        return y
    return launch.round_sums(y, dtype if each else torch.float32, dependent)[None]
