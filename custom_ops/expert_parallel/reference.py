"""Dispatch and combine with torch.distributed alone: gloo on CPUs, NCCL on GPUs.

A header goes first, which says how many rows follow and of what (`agreement`). Then a row is one run of bytes: the
token, its index, ids, weights and scales; so there is one exchange whatever the dtypes, and codes arrive bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from custom_ops.expert_parallel import groups
from custom_ops.expert_parallel.agreement import CHANNELS, agree
from custom_ops.moe.parts import count_tokens


def ep_dispatch(
    x: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    group: str,
    *,
    max_tokens: int = 0,
) -> tuple[Tensor, ...]:
    op = "ep_dispatch"
    pg = groups.resolve(op, group)
    local = num_experts // pg.size()
    found = plan(topk_ids, num_experts, pg.size())
    # The host has to know how many rows it sends, for torch.distributed does.
    send_counts = found.wanted.sum(0).tolist()
    about = about_dispatch(x, scale, topk_ids, topk_weights, num_experts, max_tokens)
    starts = found.starts.tolist()
    numbers = agree(op, group, x.device, about, [[*send_counts, *row] for row in starts])
    sent_to = torch.tensor(numbers, dtype=torch.int32)[:, : pg.size()]
    receive_counts = sent_to[:, pg.rank()].tolist()

    tokens = found.wanted.t().nonzero()[:, 1]  # by rank, then by token
    ids = torch.where((topk_ids >= 0) & (topk_ids < num_experts), topk_ids, -1).int()
    index = torch.arange(len(x), dtype=torch.int32, device=x.device).unsqueeze(1)
    columns = [x, index, ids, topk_weights] + ([] if scale is None else [scale])
    rows = torch.cat([as_bytes(column[tokens]) for column in columns], 1)
    arrived = sum(receive_counts)
    received = rows.new_empty((pg.size() * max_tokens or arrived, rows.shape[1]))
    received[arrived:] = 0
    groups.exchange(op, group, rows, send_counts, received[:arrived], receive_counts, wait=False)

    widths = [column.shape[1] * column.element_size() for column in columns]
    parts = received.split(widths, 1)
    recv_x, sources, recv_ids, recv_weights = (
        as_values(part, column) for part, column in zip(parts, columns[:4], strict=False)
    )
    recv_scale = x.new_empty(0, dtype=torch.float32)
    if scale is not None:
        recv_scale = as_values(parts[4], scale)
    recv_ids = recv_ids.long() - local * pg.rank()
    here = (recv_ids >= 0) & (recv_ids < local)
    here[arrived:] = False
    recv_ids = torch.where(here, recv_ids, -1)
    recv_weights = torch.where(here, recv_weights, 0)
    counts = count_tokens(recv_ids, local)
    channels = torch.tensor([row[pg.size() :] for row in numbers], dtype=torch.int32)
    handle = found.sent, sources.flatten(), sent_to.cumsum(0, dtype=torch.int32), channels
    on_device = (tensor.to(x.device) for tensor in handle)
    return recv_x, recv_scale, recv_ids, recv_weights, counts, *on_device


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
    op = "ep_combine"
    pg = groups.resolve(op, group)
    wanted = sent >= 0
    back_counts = wanted.sum(0).tolist()
    counts = ranks[:, pg.rank()].diff(prepend=ranks.new_zeros(1)).tolist()
    if y.shape[0] < sum(counts):
        raise ValueError(
            f"{op}: y has {y.shape[0]} rows; accepted: {sum(counts)}, as were received with this handle"
        )
    y = y[: sum(counts)]
    about = about_combine(y, max_tokens)
    announced = agree(op, group, y.device, about, [[count] for count in counts])
    for peer, ((have,), want) in enumerate(zip(announced, back_counts, strict=True)):
        if have != want:
            raise groups.ExchangeError(
                f"{op}: rank {peer} returns {have} rows to rank {pg.rank()}, which sent {want}: their handles are "
                "of different dispatches"
            )
    rows = as_bytes(y)
    back = rows.new_empty((sum(back_counts), rows.shape[1]))
    groups.exchange(op, group, rows, counts, back, back_counts, wait=False)
    # Row -1, of a rank that a token did not go to, is the last: zeros.
    values = torch.cat([as_values(back, y), y.new_zeros((1, y.shape[1]))])
    by_rank = wanted.t().flatten()
    row_of = torch.where(by_rank, by_rank.cumsum(0) - 1, -1).view(len(counts), -1)
    out = torch.zeros((len(sent), y.shape[1]), dtype=torch.float32, device=y.device)
    for of_rank in row_of:
        out += values[of_rank].float()
    return out.to(y.dtype)


def about_dispatch(
    x: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    max_tokens: int,
) -> dict[str, int | torch.dtype]:
    """What must be the same on every rank, by the names that an error uses."""
    return {
        "x.dtype": x.dtype,
        "the last dimension of x": x.shape[1],
        "the last dimension of scale": -1 if scale is None else scale.shape[1],
        "the last dimension of topk_ids": topk_ids.shape[1],
        "topk_weights.dtype": topk_weights.dtype,
        "num_experts": num_experts,
        "max_tokens": max_tokens,
    }


def about_combine(y: Tensor, max_tokens: int) -> dict[str, int | torch.dtype]:
    """What must be the same on every rank, by the names that an error uses."""
    return {
        "y.dtype": y.dtype,
        "the last dimension of y": y.shape[1],
        "max_tokens": max_tokens,
    }


class Plan(NamedTuple):
    """wanted: bool [T, N], whether a token goes to a rank. sent, starts: see `plan`."""

    wanted: Tensor
    sent: Tensor
    starts: Tensor


def plan(topk_ids: Tensor, num_experts: int, ranks: int) -> Plan:
    """Which tokens go where. sent: int32 [T, N], the how-manieth of its channel for that rank a token is, or -1.

    starts: int64 [N, CHANNELS], how many tokens of earlier channels go to a rank.
    """
    tokens, local = len(topk_ids), num_experts // ranks
    known = (topk_ids >= 0) & (topk_ids < num_experts)
    owners = torch.where(known, topk_ids.long() // local, ranks)
    wanted = torch.zeros((tokens, ranks + 1), dtype=torch.bool, device=topk_ids.device)
    wanted = wanted.scatter_(1, owners, True)[:, :ranks]
    each = -(-tokens // CHANNELS)
    padded = torch.nn.functional.pad(wanted.int(), (0, 0, 0, each * CHANNELS - tokens))
    places = padded.view(CHANNELS, each, ranks).cumsum(1)
    sent = torch.where(wanted, places.flatten(0, 1)[:tokens] - 1, -1).int()
    before = padded.view(CHANNELS, each, ranks).sum(1).cumsum(0)
    starts = torch.nn.functional.pad(before[:-1], (0, 0, 1, 0)).t()
    return Plan(wanted, sent, starts)


def as_bytes(rows: Tensor) -> Tensor:
    """uint8 [rows, bytes of a row]. A tensor without elements has no byte view of its own."""
    if not rows.numel():
        return rows.new_empty((len(rows), rows.shape[1] * rows.element_size()), dtype=torch.uint8)
    return rows.contiguous().view(torch.uint8)


def as_values(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `as_bytes` for rows of another tensor's width and dtype; contiguous memory of its own."""
    if not rows.numel():
        return like.new_empty((len(rows), like.shape[1]))
    return rows.clone(memory_format=torch.contiguous_format).view(like.dtype)
