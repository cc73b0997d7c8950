"""Dispatch and combine of fixed shapes with torch.distributed alone: gloo on CPUs, NCCL on GPUs.

Every rank gets every token, and keeps those of its experts; it returns a row for each of its experts and tokens of a
rank, whether there is one or not. That is more than need be, but the same for all routings: no size depends on them,
and the host waits for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.expert_parallel import groups, watchdog
from custom_ops.expert_parallel.agreement import agree_once
from custom_ops.expert_parallel.reference import as_bytes, as_values

GROUP = 128
_LEAST = 1e-4
_LARGEST = 448.0


def ep_dispatch_low_latency(
    x: Tensor, topk_ids: Tensor, num_experts: int, max_tokens: int, group: str, *, fp8: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "ep_dispatch_low_latency"
    pg = groups.resolve(op, group)
    local, ranks = num_experts // pg.size(), pg.size()
    agree_once(op, group, x.device, about_dispatch(x, topk_ids, num_experts, max_tokens, fp8))
    columns = [x, topk_ids.int()] if not fp8 else [*quantize(x), topk_ids.int()]
    ids_of_nobody = topk_ids.new_full((max_tokens - len(x), topk_ids.shape[1]), -1).int()
    mine = [
        torch.cat([column, ids_of_nobody])
        if column.dtype == torch.int32
        else _pad(column, max_tokens)
        for column in columns
    ]
    rows = torch.cat([as_bytes(column) for column in mine], 1)
    received = rows.new_empty((ranks * max_tokens, rows.shape[1]))
    groups.gather(op, group, rows, received)
    watchdog.watch(op, group, x.device, groups.PATIENCE)
    widths = [column.shape[1] * column.element_size() for column in mine]
    *parts, ids = (
        as_values(part, column)
        for part, column in zip(received.split(widths, 1), mine, strict=True)
    )

    experts = torch.arange(local, device=x.device) + local * pg.rank()
    wanted = (ids.unsqueeze(0) == experts.view(-1, 1, 1)).any(2)  # [experts here, tokens of all]
    counts = wanted.view(local, ranks, max_tokens).sum(2)
    ranges = counts | (counts.cumsum(1) - counts) << 32
    # Those of an expert first, by rank and then by token.
    order = wanted.int().argsort(dim=1, descending=True, stable=True)
    recv_x = _rows(parts[0], order)
    recv_scale = x.new_empty(0, dtype=torch.float32)
    if fp8:
        found = parts[1][order].transpose(1, 2)
        recv_scale = found.new_empty(found.shape).copy_(found).transpose(1, 2)
    sources = (order % max_tokens).int()
    return recv_x, recv_scale, counts.sum(1, dtype=torch.int32), sources, ranges


def ep_combine_low_latency(
    y: Tensor, topk_ids: Tensor, topk_weights: Tensor, sources: Tensor, ranges: Tensor, group: str
) -> Tensor:
    op = "ep_combine_low_latency"
    pg = groups.resolve(op, group)
    (local, rows, hidden), ranks = y.shape, pg.size()
    max_tokens = rows // ranks
    agree_once(op, group, y.device, about_combine(y, topk_ids))
    # Which row of y goes to each rank, expert and token: [ranks, experts here, tokens], or the one past the last.
    count, first = ranges & 0xFFFFFFFF, ranges >> 32
    row = torch.arange(rows, device=y.device)
    of_rank = (row >= first.unsqueeze(2)) & (row < (first + count).unsqueeze(2))
    owner = torch.where(of_rank.any(1), of_rank.int().argmax(1), ranks)
    expert = torch.arange(local, device=y.device).unsqueeze(1)
    token = torch.where(owner < ranks, sources.long(), 0)
    place = (owner * local + expert) * max_tokens + token
    sent = y.new_zeros((ranks * local * max_tokens + max_tokens * local, hidden))
    sent.index_copy_(0, place.flatten(), y.reshape(-1, hidden))
    sent = as_bytes(sent[: ranks * local * max_tokens])
    back, each = torch.empty_like(sent), [local * max_tokens] * ranks
    groups.exchange(op, group, sent, each, back, each, wait=False)
    watchdog.watch(op, group, y.device, groups.PATIENCE)

    values = as_values(back, y.flatten(0, 1))  # by expert of all, then by token
    tokens = torch.arange(len(topk_ids), device=y.device)
    out = torch.zeros((len(topk_ids), hidden), dtype=torch.float32, device=y.device)
    for ids, weights in zip(topk_ids.long().t(), topk_weights.float().t(), strict=True):
        known = (ids >= 0) & (ids < local * ranks)
        found = values[torch.where(known, ids, 0) * max_tokens + tokens]
        # In float64 a product is exact and the sum is rounded to float32 at once, as in a fused multiply-add.
        exact = torch.addcmul(out.double(), found.double(), weights.double().unsqueeze(1))
        out = torch.where(known.unsqueeze(1), exact.float(), out)
    return out.to(y.dtype)


def about_dispatch(
    x: Tensor, topk_ids: Tensor, num_experts: int, max_tokens: int, fp8: bool
) -> dict[str, int]:
    """What must be the same on every rank, by the names that an error uses."""
    return {
        "the last dimension of x": x.shape[1],
        "the last dimension of topk_ids": topk_ids.shape[1],
        "num_experts": num_experts,
        "max_tokens": max_tokens,
        "fp8": fp8,
    }


def about_combine(y: Tensor, topk_ids: Tensor) -> dict[str, int]:
    """What must be the same on every rank, by the names that an error uses."""
    return {
        "the first dimension of y": y.shape[0],
        "the second dimension of y": y.shape[1],
        "the last dimension of y": y.shape[2],
        "the last dimension of topk_ids": topk_ids.shape[1],
    }


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn codes and float32 scales of groups of 128, as DeepEP makes them while it sends."""
    grouped = x.float().unflatten(1, (-1, GROUP))
    largest = torch.where(grouped.isnan(), 0, grouped.abs()).amax(2, keepdim=True).clamp(min=_LEAST)
    # Not 448 / largest, which PyTorch computes as a reciprocal and a product.
    codes = grouped * (torch.full_like(largest, _LARGEST) / largest)
    codes = codes.clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    return codes.flatten(1), (largest * (1 / _LARGEST)).squeeze(2)


def _pad(rows: Tensor, count: int) -> Tensor:
    """Rows of zeros after those that are there. In bytes: float8 has no cat on some devices."""
    padded = rows.new_empty((count, rows.shape[1]))
    padded.view(torch.uint8)[: len(rows)] = as_bytes(rows)
    padded.view(torch.uint8)[len(rows) :] = 0
    return padded


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index], of any dtype."""
    return as_bytes(x)[index].view(x.dtype)
