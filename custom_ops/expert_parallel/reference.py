"""Dispatch and combine with torch.distributed alone: gloo on CPUs, NCCL on GPUs.

A header goes first, which says how many rows follow and of what: a rank that was called with something else is an
error on every rank, with its name, before a byte of a row moves. Then a row is one run of bytes: the token, its scales,
ids and weights; so there is one exchange whatever the dtypes, and codes arrive bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops.expert_parallel import groups
from custom_ops.moe.parts import count_tokens

# What a header says a dtype is: its place here.
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int8,
)
_OPS = ("ep_dispatch", "ep_combine")


def ep_dispatch(
    x: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "ep_dispatch"
    pg = groups.resolve(op, group)
    local = num_experts // pg.size()
    wanted, row_of = _destinations(topk_ids, num_experts, pg.size())
    # The host has to know how many rows it sends, for torch.distributed does.
    send_counts = wanted.sum(0).tolist()
    receive_counts = _agree(
        op,
        group,
        x.device,
        send_counts,
        {
            "x.dtype": DTYPES.index(x.dtype),
            "the last dimension of x": x.shape[1],
            "the last dimension of scale": -1 if scale is None else scale.shape[1],
            "the last dimension of topk_ids": topk_ids.shape[1],
            "topk_weights.dtype": DTYPES.index(topk_weights.dtype),
            "num_experts": num_experts,
        },
    )
    tokens = wanted.t().nonzero()[:, 1]  # by rank, then by token
    ids = torch.where((topk_ids >= 0) & (topk_ids < num_experts), topk_ids, -1).int()
    columns = [x, ids, topk_weights] if scale is None else [x, ids, topk_weights, scale]
    rows = torch.cat([_bytes(column[tokens]) for column in columns], 1)
    received = rows.new_empty((sum(receive_counts), rows.shape[1]))
    groups.exchange(op, group, rows, send_counts, received, receive_counts, wait=False)

    widths = [column.shape[1] * column.element_size() for column in columns]
    parts = received.split(widths, 1)
    recv_x, recv_ids, recv_weights = (
        _values(part, column) for part, column in zip(parts, columns[:3], strict=False)
    )
    recv_scale = x.new_empty(0, dtype=torch.float32)
    if scale is not None:
        recv_scale = _values(parts[3], scale)
    recv_ids = recv_ids.long() - local * pg.rank()
    here = (recv_ids >= 0) & (recv_ids < local)
    recv_ids = torch.where(here, recv_ids, -1)
    recv_weights = torch.where(here, recv_weights, 0)
    splits = torch.tensor([send_counts, receive_counts], dtype=torch.int32)
    counts = count_tokens(recv_ids, local)
    return recv_x, recv_scale, recv_ids, recv_weights, counts, splits, row_of


def ep_combine(y: Tensor, splits: Tensor, row_of: Tensor, group: str) -> Tensor:
    op = "ep_combine"
    back_counts, counts = splits.tolist()
    if y.shape[0] != sum(counts):
        raise ValueError(
            f"{op}: y has {y.shape[0]} rows; accepted: {sum(counts)}, as were received with these splits"
        )
    about = {"y.dtype": DTYPES.index(y.dtype), "the last dimension of y": y.shape[1]}
    announced = _agree(op, group, y.device, counts, about)
    for peer, (have, want) in enumerate(zip(announced, back_counts, strict=True)):
        if have != want:
            raise groups.ExchangeError(
                f"{op}: rank {peer} returns {have} rows to rank {groups.resolve(op, group).rank()}, which sent "
                f"{want}: their splits are of different dispatches"
            )
    rows = _bytes(y)
    back = rows.new_empty((sum(back_counts), rows.shape[1]))
    groups.exchange(op, group, rows, counts, back, back_counts, wait=False)
    # Row -1, of a rank that a token did not go to, is the last: zeros.
    values = torch.cat([_values(back, y), y.new_zeros((1, y.shape[1]))])
    out = torch.zeros((row_of.shape[0], y.shape[1]), dtype=torch.float32, device=y.device)
    for rank in range(row_of.shape[1]):
        out += values[row_of[:, rank].long()].float()
    return out.to(y.dtype)


def _destinations(topk_ids: Tensor, num_experts: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Whether each token goes to each rank, bool [T, N], and as which row that is sent, int32 [T, N], or -1."""
    local = num_experts // ranks
    known = (topk_ids >= 0) & (topk_ids < num_experts)
    owners = torch.where(known, topk_ids.long() // local, ranks)
    wanted = torch.zeros((len(topk_ids), ranks + 1), dtype=torch.bool, device=topk_ids.device)
    wanted = wanted.scatter_(1, owners, True)[:, :ranks]
    by_rank = wanted.t().flatten()
    rows = (by_rank.cumsum(0) - 1).view(ranks, -1).t()
    return wanted, torch.where(wanted, rows, -1).int().contiguous()


def _agree(
    op: str, group: str, device: torch.device, counts: list[int], about: dict[str, Any]
) -> list[int]:
    """Tell every rank how many rows it gets and of what; returns how many each has for this one.

    Raises ExchangeError on every rank if one of them was called with something else.
    """
    pg = groups.resolve(op, group)
    mine = [_OPS.index(op), *about.values(), *[0] * (8 - len(about))]
    ones = [1] * pg.size()
    header = torch.tensor([[count, *mine] for count in counts]).to(device)
    theirs = torch.empty_like(header)
    groups.exchange(op, group, header, ones, theirs, ones)
    answers = theirs.tolist()
    for peer, (_, which, *values) in enumerate(answers):
        if which != _OPS.index(op):
            raise groups.ExchangeError(
                f"{op}: rank {peer} calls {_OPS[which]} where rank {pg.rank()} calls {op} (group {group!r})"
            )
        for (name, value), given in zip(about.items(), values, strict=False):
            if value != given:
                a, b = (DTYPES[v] if name.endswith("dtype") else v for v in (given, value))
                raise groups.ExchangeError(
                    f"{op}: {name} is {a} on rank {peer} and {b} on rank {pg.rank()}; accepted: the same on "
                    f"every rank of group {group!r}"
                )
    return [count for count, *_ in answers]


def _bytes(rows: Tensor) -> Tensor:
    """uint8 [rows, bytes of a row]. A tensor without elements has no byte view of its own."""
    if not rows.numel():
        return rows.new_empty((len(rows), rows.shape[1] * rows.element_size()), dtype=torch.uint8)
    return rows.contiguous().view(torch.uint8)


def _values(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_bytes` for rows of another tensor's width and dtype; contiguous memory of its own."""
    if not rows.numel():
        return like.new_empty((len(rows), like.shape[1]))
    return rows.clone(memory_format=torch.contiguous_format).view(like.dtype)
