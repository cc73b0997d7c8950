"""Dispatch and combine of fixed shapes by DeepEP's low-latency kernels (NVSHMEM: NVLink in a host, RDMA between hosts).

Its tensors are those of the ops, and so is its handle, so that there is nothing to do but to call it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import platform
from custom_ops.expert_parallel import buffers, deep_ep, groups, watchdog
from custom_ops.expert_parallel.agreement import agree_once
from custom_ops.expert_parallel.low_latency_reference import about_combine, about_dispatch
from custom_ops.implementation import Implementation
from custom_ops.scales import known

# What its kernels are compiled for.
HIDDEN_SIZES = (2048, 2560, 4096, 5120, 6144, 7168, 8192)
_MOST_TOP_K = 11
_ROWS_MULTIPLE = 4


def ep_dispatch_low_latency(
    x: Tensor, topk_ids: Tensor, num_experts: int, max_tokens: int, group: str, *, fp8: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "ep_dispatch_low_latency"
    with platform.on_device(x), deep_ep.naming(op, group):
        about = about_dispatch(x, topk_ids, num_experts, max_tokens, fp8)
        agree_once(op, group, x.device, about)
        buffer = buffers.low_latency(op, group, max_tokens, x.shape[1], num_experts)
        received, counts, handle, _, _ = buffer.low_latency_dispatch(
            deep_ep.aligned(x),
            topk_ids.long().contiguous(),
            max_tokens,
            num_experts,
            use_fp8=fp8,
        )
        watchdog.watch(op, group, x.device)
    recv_x, recv_scale = received if fp8 else (received, x.new_empty(0, dtype=torch.float32))
    return recv_x, recv_scale, counts, handle[0], handle[1]


def ep_combine_low_latency(
    y: Tensor, topk_ids: Tensor, topk_weights: Tensor, sources: Tensor, ranges: Tensor, group: str
) -> Tensor:
    op = "ep_combine_low_latency"
    local, rows, hidden = y.shape
    ranks = groups.size(op, group)
    max_tokens, num_experts = rows // ranks, local * ranks
    with platform.on_device(y), deep_ep.naming(op, group):
        agree_once(op, group, y.device, about_combine(y, topk_ids))
        buffer = buffers.low_latency(op, group, max_tokens, hidden, num_experts)
        out, _, _ = buffer.low_latency_combine(
            deep_ep.aligned(y),
            topk_ids.long().contiguous(),
            topk_weights.float().contiguous(),
            (sources, ranges, max_tokens, hidden, num_experts),
        )
        watchdog.watch(op, group, y.device)
    return out


def _unsupported(hidden: int, rows: int, top_k: int) -> str | None:
    if not any(known(hidden == size) for size in HIDDEN_SIZES):
        return f"takes rows of {', '.join(map(str, HIDDEN_SIZES))} elements, here are {hidden}"
    if not known(top_k <= _MOST_TOP_K):
        return f"takes at most {_MOST_TOP_K} experts for a token, here are {top_k}"
    if not known(rows % _ROWS_MULTIPLE == 0):
        return (
            f"takes a multiple of {_ROWS_MULTIPLE} of rows for each expert (max_tokens times ranks), "
            f"here are {rows}"
        )
    return None


def _dispatch_unsupported(
    x: Tensor, topk_ids: Tensor, num_experts: int, max_tokens: int, group: str, *, fp8: bool
) -> str | None:
    ranks = groups.size("ep_dispatch_low_latency", group)
    return _unsupported(x.shape[1], ranks * max_tokens, topk_ids.shape[1])


def _combine_unsupported(
    y: Tensor, topk_ids: Tensor, topk_weights: Tensor, sources: Tensor, ranges: Tensor, group: str
) -> str | None:
    return _unsupported(y.shape[2], y.shape[1], topk_ids.shape[1])


DISPATCH = Implementation(
    "deep_ep_low_latency",
    lambda: deep_ep.loaded(ep_dispatch_low_latency),
    lambda device: deep_ep.why_not(device),
    _dispatch_unsupported,
)
COMBINE = Implementation(
    "deep_ep_low_latency",
    lambda: deep_ep.loaded(ep_combine_low_latency),
    lambda device: deep_ep.why_not(device),
    _combine_unsupported,
)
