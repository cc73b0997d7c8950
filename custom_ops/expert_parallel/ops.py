"""Tokens to the ranks of their experts, and back: two ops that every rank of a process group calls together.

Words: N ranks; E experts in all, of which rank r owns r * E / N up to (r + 1) * E / N; T tokens on this rank; R rows
that it has, one for each token of any rank that has an expert here. Received rows stand by the rank that they
come from and then by token.

What `ep_dispatch` found out, `ep_combine` takes back as a handle, which means the same whatever implementation made it:
- sent, int32 [T, N]: negative where a token did not go to a rank; else its place among those of its channel that did.
- sources, int32 [R]: which token of its rank a received row is; after the last row, whatever memory held.
- ranks, int32 [N, N]: how many rows ranks 0 .. i sent to rank j, for this rank j; what else is in it says nothing.
- channels, int32 [N, C]: in the rows from a rank, the first of each of its channels. ElasticBuffer knows none: 0.

A channel is one of C = 10 runs of a rank's tokens, of ceil(T / C) each and the last ones shorter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.expert_parallel import deep_ep, deep_ep_elastic, groups, reference
from custom_ops.expert_parallel.agreement import CHANNELS, DTYPES
from custom_ops.expert_parallel.collective import define
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


def ep_dispatch(
    x: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    group: str,
    *,
    max_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Send each token once to every rank that owns one of its experts.

    x: float32, bfloat16, float16, float8_e4m3fn or int8, [T, H], any strides. scale: None, or float32, [T, G], which
    travels with x. topk_ids: int32 or int64, [T, K], of all experts; a pair whose id is not in [0, E) goes nowhere.
    topk_weights: float32, bfloat16 or float16, [T, K]. num_experts: E, a multiple of N. group: the `group_name` of a
    process group. All but T must be the same on every rank; T may be 0, and the rank calls the op all the same.
    max_tokens: 0, or the most tokens that any rank has: R is then N * max_tokens, whatever arrives, and with DeepEP
    the host does not wait. Rows after those that arrived have the ids -1, and are else whatever memory held.

    Returns, with every tensor contiguous and on the device of x:
    - recv_x [R, H], bit for bit, and recv_scale [R, G], or [0] without scales.
    - recv_ids, int64 [R, K]: which expert of this rank, in [0, E / N), -1 for one elsewhere.
    - recv_weights [R, K], of the dtype of topk_weights: 0 for an expert elsewhere.
    - counts, int32 [E / N]: the pairs that each expert of this rank has.
    - sent, sources, ranks, channels: the handle (above) that `ep_combine` takes.

    `fused_moe(recv_x, <weights of the experts here>, recv_weights, recv_ids)` is what `ep_combine` takes back.

    Implementations: DeepEP (its Buffer, high-throughput, over NVLink; its ElasticBuffer, for distinct experts of a
    token, if CUSTOM_OPS_DISABLE has deep_ep), and the reference, torch.distributed (gloo, NCCL). The host waits for the
    number of rows, but not in DeepEP with max_tokens. Raises ValueError for another dtype, shape, device, number or
    group, and ExchangeError, which names the op and the rank, if a rank died, did not call the op in time, or called it
    with other dtypes or sizes. In time: within the time-out of the group; DeepEP has its own, 100 s, and finds other
    sizes the first time that they are used.
    """
    return torch.ops.custom_ops.ep_dispatch(
        x, scale, topk_ids, topk_weights, num_experts, group, max_tokens=max_tokens
    )


def ep_combine(
    y: Tensor,
    sent: Tensor,
    sources: Tensor,
    ranks: Tensor,
    channels: Tensor,
    group: str,
    *,
    max_tokens: int = 0,
) -> Tensor:
    """Return rows to the ranks that their tokens came from, and add up those of each token.

    y: float32, bfloat16 or float16, [R, H], any strides: for each row that `ep_dispatch` received, the weighted sum
    over the experts of this rank. H need not be that of the tokens. sent, sources, ranks, channels: the handle that
    `ep_dispatch` returned. max_tokens: as `ep_dispatch` was given it (only ElasticBuffer has to know).

    Returns [T, H] of y's dtype, contiguous: sums in float32 from rank 0 on, one rounding, so the same bits however
    the rows arrive; zeros for a token that went nowhere. Implementations and errors: those of `ep_dispatch`, but that
    with DeepEP the host waits for nobody, so that a rank that does not come is an error of a later call, and a line on
    stderr that names the op and the rank.
    """
    return torch.ops.custom_ops.ep_combine(
        y, sent, sources, ranks, channels, group, max_tokens=max_tokens
    )


def _check_dispatch(
    x: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    group: str,
    *,
    max_tokens: int,
) -> None:
    op = "ep_dispatch"
    check_dtype(op, "x", x, DTYPES)
    check_dims(op, "x", x, 2)
    tokens = x.shape[0]
    check_at_least(op, "the last dimension of x", x.shape[1], 1)
    check_ids(op, topk_ids, num_experts, None)
    pair = (tokens, topk_ids.shape[1])
    check_shape(op, "topk_ids", topk_ids, pair)
    check_dtype(op, "topk_weights", topk_weights, FLOATS)
    check_shape(op, "topk_weights", topk_weights, pair)
    check_device(op, "topk_ids", topk_ids, "x", x)
    check_device(op, "topk_weights", topk_weights, "x", x)
    if scale is not None:
        check_dtype(op, "scale", scale, (torch.float32,))
        check_dims(op, "scale", scale, 2)
        check_shape(op, "scale", scale, (tokens, scale.shape[1]))
        check_device(op, "scale", scale, "x", x)
    groups.check_shares(op, num_experts, group)
    check_at_least(op, "max_tokens", max_tokens, 0)
    if max_tokens:
        require(
            tokens <= max_tokens,
            lambda: f"{op}: x has {tokens} tokens; accepted: at most max_tokens, {max_tokens}",
        )


def _empty_dispatch(
    x: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    group: str,
    *,
    max_tokens: int,
) -> tuple[Tensor, ...]:
    ranks, top_k = groups.size("ep_dispatch", group), topk_ids.shape[1]
    rows = ranks * max_tokens if max_tokens else torch.library.get_ctx().new_dynamic_size()
    scales = (0,) if scale is None else (rows, scale.shape[1])
    handle = (x.shape[0], ranks), (rows,), (ranks, ranks), (ranks, CHANNELS)
    return (
        x.new_empty((rows, x.shape[1])),
        x.new_empty(scales, dtype=torch.float32),
        x.new_empty((rows, top_k), dtype=torch.int64),
        topk_weights.new_empty((rows, top_k)),
        x.new_empty(num_experts // ranks, dtype=torch.int32),
        *(x.new_empty(shape, dtype=torch.int32) for shape in handle),
    )


def _check_combine(
    y: Tensor,
    sent: Tensor,
    sources: Tensor,
    ranks: Tensor,
    channels: Tensor,
    group: str,
    *,
    max_tokens: int,
) -> None:
    op = "ep_combine"
    check_dtype(op, "y", y, FLOATS)
    check_dims(op, "y", y, 2)
    check_at_least(op, "the last dimension of y", y.shape[1], 1)
    size = groups.size(op, group)
    check_dims(op, "sent", sent, 2)
    check_dims(op, "sources", sources, 1)
    handle = {
        "sent": (sent, (sent.shape[0], size)),
        "sources": (sources, (sources.shape[0],)),
        "ranks": (ranks, (size, size)),
        "channels": (channels, (size, CHANNELS)),
    }
    for name, (tensor, shape) in handle.items():
        check_dtype(op, name, tensor, (torch.int32,))
        check_shape(op, name, tensor, shape)
        check_device(op, name, tensor, "y", y)
    require(
        y.shape[0] == sources.shape[0],
        lambda: (
            f"{op}: y has {y.shape[0]} rows; accepted: {sources.shape[0]}, as were received with this handle"
        ),
    )


def _empty_combine(
    y: Tensor,
    sent: Tensor,
    sources: Tensor,
    ranks: Tensor,
    channels: Tensor,
    group: str,
    *,
    max_tokens: int,
) -> Tensor:
    return y.new_empty((sent.shape[0], y.shape[1]))


define(
    ep_dispatch,
    "(Tensor x, Tensor? scale, Tensor topk_ids, Tensor topk_weights, int num_experts, str group, *,"
    " int max_tokens=0) -> (Tensor recv_x, Tensor recv_scale, Tensor recv_ids, Tensor recv_weights, Tensor counts,"
    " Tensor sent, Tensor sources, Tensor ranks, Tensor channels)",
    check=_check_dispatch,
    empty=_empty_dispatch,
    reference=reference.ep_dispatch,
    implementations=[deep_ep.DISPATCH, deep_ep_elastic.DISPATCH],
)
define(
    ep_combine,
    "(Tensor y, Tensor sent, Tensor sources, Tensor ranks, Tensor channels, str group, *, int max_tokens=0)"
    " -> Tensor",
    check=_check_combine,
    empty=_empty_combine,
    reference=reference.ep_combine,
    implementations=[deep_ep.COMBINE, deep_ep_elastic.COMBINE],
)
