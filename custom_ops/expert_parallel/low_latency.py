"""Tokens to the ranks of their experts, and back, in tensors of fixed shapes: for decoding, and for CUDA graphs.

Words: N ranks; E experts in all, of which rank r owns r * E / N up to (r + 1) * E / N; T tokens on this rank, at most
M = max_tokens; one row for each token and expert. The batched format: [E / N, N * M, H], in which an expert's rows come
first, in any order, and what follows them is whatever memory held.

What `ep_dispatch_low_latency` found out, `ep_combine_low_latency` takes back, whatever implementation made it:
- sources, int32 [E / N, N * M]: which token of its rank a row is.
- ranges, int64 [E / N, N]: of an expert, the rows from a rank: how many in the low 32 bits, the first in the high ones.

Nobody waits for the host but on the first call with new sizes, which is collective and outside of any capture. DeepEP
takes two buffers in turns, one for each call: so a dispatch is followed by its combine, in a CUDA graph too, and no
more than two calls are on their way at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.expert_parallel import deep_ep_low_latency, groups, low_latency_reference
from custom_ops.expert_parallel.collective import define
from custom_ops.expert_parallel.low_latency_reference import GROUP
from custom_ops.library import require
from custom_ops.moe.checks import (
    FLOATS,
    check_at_least,
    check_dims,
    check_dtype,
    check_ids,
    check_shape,
)
from custom_ops.quantization.checks import check_device


def ep_dispatch_low_latency(
    x: Tensor, topk_ids: Tensor, num_experts: int, max_tokens: int, group: str, *, fp8: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send each token to each of its experts.

    x: bfloat16, [T, H], any strides. topk_ids: int32 or int64, [T, K], of all experts: those of a token distinct; a
    negative one is of nobody, and E or more is not allowed (it is not looked for). num_experts: E, a multiple of N.
    max_tokens: M, T or more. group: the `group_name` of a process group. fp8: send float8_e4m3fn codes with a scale for
    each 128 elements: float32, max(|x|, 1e-4) * (1 / 448); codes of x * (448 / max(|x|, 1e-4)), each operation rounded
    to float32; a NaN does not count in the maximum. All but T must be the same on every rank; T may be 0.

    Returns, on the device of x:
    - recv_x [E / N, N * M, H], bfloat16 or float8_e4m3fn, contiguous.
    - recv_scale, float32 [E / N, N * M, H / 128], of which the last two dimensions are column-major; [0] without fp8.
    - counts, int32 [E / N]: the rows of each expert of this rank.
    - sources, ranges: the handle (above) that `ep_combine_low_latency` takes.

    Implementations: DeepEP (low-latency), and the reference, torch.distributed, which sends every token to every rank.
    Raises ValueError for another dtype, shape, device, number or group; RuntimeError on the first call if it is in a
    capture; ExchangeError, which names the op and the rank, if on the first call with new sizes a rank has others or
    does not come. Later, where the host does not wait, a rank that does not come within the time-out of the group is a
    line on stderr that names the op and the rank, and the end of the process; in a replayed graph it is a hang.
    """
    return torch.ops.custom_ops.ep_dispatch_low_latency(
        x, topk_ids, num_experts, max_tokens, group, fp8=fp8
    )


def ep_combine_low_latency(
    y: Tensor, topk_ids: Tensor, topk_weights: Tensor, sources: Tensor, ranges: Tensor, group: str
) -> Tensor:
    """Return each expert's rows to the ranks that their tokens came from, and add up those of each token.

    y: bfloat16, [E / N, N * M, H], any strides: for each row that `ep_dispatch_low_latency` received, what its expert
    makes of it, not weighted. topk_ids: as they were dispatched. topk_weights: float32, bfloat16 or float16, [T, K].
    sources, ranges: the handle that `ep_dispatch_low_latency` returned.

    Returns [T, H], bfloat16, contiguous: the sum of weight * row in float32, by fused multiply-adds in the order of K,
    one rounding; zeros for a token that went nowhere. Implementations and errors: those of `ep_dispatch_low_latency`.
    """
    return torch.ops.custom_ops.ep_combine_low_latency(
        y, topk_ids, topk_weights, sources, ranges, group
    )


def _check_dispatch(
    x: Tensor, topk_ids: Tensor, num_experts: int, max_tokens: int, group: str, *, fp8: bool
) -> None:
    op = "ep_dispatch_low_latency"
    check_dtype(op, "x", x, (torch.bfloat16,))
    check_dims(op, "x", x, 2)
    tokens, hidden = x.shape
    check_at_least(op, "the last dimension of x", hidden, 1)
    check_ids(op, topk_ids, num_experts, None)
    check_shape(op, "topk_ids", topk_ids, (tokens, topk_ids.shape[1]))
    check_device(op, "topk_ids", topk_ids, "x", x)
    check_at_least(op, "max_tokens", max_tokens, 1)
    require(
        tokens <= max_tokens,
        lambda: f"{op}: x has {tokens} tokens; accepted: at most max_tokens, {max_tokens}",
    )
    groups.check_shares(op, num_experts, group)
    if fp8:
        require(
            hidden % GROUP == 0,
            lambda: (
                f"{op}: the last dimension of x is {hidden}; accepted with fp8: a multiple of {GROUP}"
            ),
        )


def _empty_dispatch(
    x: Tensor, topk_ids: Tensor, num_experts: int, max_tokens: int, group: str, *, fp8: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ranks, hidden = groups.size("ep_dispatch_low_latency", group), x.shape[1]
    local, rows = num_experts // ranks, ranks * max_tokens
    scale = x.new_empty(0, dtype=torch.float32)
    if fp8:
        scale = x.new_empty((local, hidden // GROUP, rows), dtype=torch.float32).transpose(1, 2)
    return (
        x.new_empty((local, rows, hidden), dtype=torch.float8_e4m3fn if fp8 else x.dtype),
        scale,
        x.new_empty(local, dtype=torch.int32),
        x.new_empty((local, rows), dtype=torch.int32),
        x.new_empty((local, ranks), dtype=torch.int64),
    )


def _check_combine(
    y: Tensor, topk_ids: Tensor, topk_weights: Tensor, sources: Tensor, ranges: Tensor, group: str
) -> None:
    op = "ep_combine_low_latency"
    check_dtype(op, "y", y, (torch.bfloat16,))
    check_dims(op, "y", y, 3)
    local, rows, hidden = y.shape
    check_at_least(op, "the last dimension of y", hidden, 1)
    size = groups.size(op, group)
    require(
        rows % size == 0,
        lambda: (
            f"{op}: y has {rows} rows for each expert; accepted: a multiple of {size}, the ranks"
        ),
    )
    check_ids(op, topk_ids, local * size, None)
    check_dtype(op, "topk_weights", topk_weights, FLOATS)
    check_shape(op, "topk_weights", topk_weights, (topk_ids.shape[0], topk_ids.shape[1]))
    check_dtype(op, "sources", sources, (torch.int32,))
    check_shape(op, "sources", sources, (local, rows))
    check_dtype(op, "ranges", ranges, (torch.int64,))
    check_shape(op, "ranges", ranges, (local, size))
    others = {
        "topk_ids": topk_ids,
        "topk_weights": topk_weights,
        "sources": sources,
        "ranges": ranges,
    }
    for name, tensor in others.items():
        check_device(op, name, tensor, "y", y)
    require(
        topk_ids.shape[0] <= rows // size,
        lambda: (
            f"{op}: topk_ids has {topk_ids.shape[0]} tokens; accepted: at most {rows // size}, for which y has rows"
        ),
    )


def _empty_combine(
    y: Tensor, topk_ids: Tensor, topk_weights: Tensor, sources: Tensor, ranges: Tensor, group: str
) -> Tensor:
    return y.new_empty((topk_ids.shape[0], y.shape[2]))


define(
    ep_dispatch_low_latency,
    "(Tensor x, Tensor topk_ids, int num_experts, int max_tokens, str group, *, bool fp8=False)"
    " -> (Tensor recv_x, Tensor recv_scale, Tensor counts, Tensor sources, Tensor ranges)",
    check=_check_dispatch,
    empty=_empty_dispatch,
    reference=low_latency_reference.ep_dispatch_low_latency,
    implementations=[deep_ep_low_latency.DISPATCH],
    capturable=True,
)
define(
    ep_combine_low_latency,
    "(Tensor y, Tensor topk_ids, Tensor topk_weights, Tensor sources, Tensor ranges, str group) -> Tensor",
    check=_check_combine,
    empty=_empty_combine,
    reference=low_latency_reference.ep_combine_low_latency,
    implementations=[deep_ep_low_latency.COMBINE],
    capturable=True,
)
