"""Dispatch and combine by `ElasticBuffer` of DeepEP 2, between the GPUs of one host.

DeepEP 2 still has the `Buffer` of DeepEP 1, which `deep_ep` uses and which is what has been measured here; so this runs
only where `CUSTOM_OPS_DISABLE=deep_ep` leaves that out. It needs `max_tokens`, as its buffers are made for so many, and
distinct experts for each token, which the kernel asserts.

The handle of the ops is made from DeepEP's, and DeepEP's again from that: combining has to know of each row where it
came from, and of each token which ranks it went to, for which one expert of each rank will do.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from custom_ops import library, platform
from custom_ops.expert_parallel import buffers, deep_ep, groups, watchdog
from custom_ops.expert_parallel.agreement import CHANNELS, agree_once
from custom_ops.expert_parallel.reference import about_combine, about_dispatch, plan
from custom_ops.implementation import Implementation
from custom_ops.scales import known

_ROW_ALIGNMENT = 512  # a vector of 16 bytes for each lane of a warp


def ep_dispatch(
    x: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    group: str,
    *,
    max_tokens: int,
) -> tuple[Tensor, ...]:
    op = "ep_dispatch"
    pg = groups.resolve(op, group)
    rank, count, local = pg.rank(), pg.size(), num_experts // pg.size()
    ids = torch.where((topk_ids >= 0) & (topk_ids < num_experts), topk_ids.long(), -1)
    rows = deep_ep.aligned(x)
    with platform.on_device(x), deep_ep.naming(op, group):
        about = about_dispatch(x, scale, topk_ids, topk_weights, num_experts, max_tokens)
        agree_once(op, group, x.device, about)
        buffer = buffers.elastic(op, group, max_tokens, x.shape[1], max(count, ids.shape[1]))
        received, recv_ids, recv_weights, theirs, _ = buffer.dispatch(
            rows if scale is None else (rows, scale),
            topk_idx=ids.contiguous(),
            topk_weights=topk_weights.float().contiguous(),
            num_experts=num_experts,
            num_max_tokens_per_rank=max_tokens,
            num_sms=buffers.SMS,  # its own estimate asks nvidia-smi how fast NVLink is
            do_cpu_sync=False,
        )
        watchdog.watch(op, group, x.device)
    recv_x, recv_scale = (received, None) if scale is None else received
    if recv_scale is None:
        recv_scale = x.new_empty(0, dtype=torch.float32)
    ends = theirs.psum_num_recv_tokens_per_scaleup_rank
    # Neither weights of experts elsewhere nor ids of rows that did not arrive are cleared.
    arrived = torch.arange(len(recv_x), device=x.device) < ends[-1]
    recv_ids = torch.where(arrived.unsqueeze(1), recv_ids.long(), -1)
    recv_weights = torch.where(recv_ids >= 0, recv_weights, 0.0).to(topk_weights.dtype)
    counts = (recv_ids.view(-1, 1) == torch.arange(local, device=x.device)).sum(0)
    ranks = x.new_zeros((count, count), dtype=torch.int32)
    ranks[:, rank] = ends
    return (
        recv_x,
        recv_scale,
        recv_ids,
        recv_weights,
        counts.int(),
        plan(topk_ids, num_experts, count).sent.contiguous(),
        (theirs.recv_src_metadata[:, 0] % max_tokens).int(),
        ranks,
        x.new_zeros((count, CHANNELS), dtype=torch.int32),
    )


def ep_combine(
    y: Tensor,
    sent: Tensor,
    sources: Tensor,
    ranks: Tensor,
    channels: Tensor,
    group: str,
    *,
    max_tokens: int,
) -> Tensor:
    op = "ep_combine"
    pg = groups.resolve(op, group)
    rank, count = pg.rank(), pg.size()
    with platform.on_device(y), deep_ep.naming(op, group):
        agree_once(op, group, y.device, about_combine(y, max_tokens))
        buffer = buffers.elastic(op, group, max_tokens, y.shape[1], count)
        ends = ranks[:, rank].contiguous()
        row = torch.arange(len(y), dtype=torch.int32, device=y.device)
        source = torch.searchsorted(ends, row, right=True).clamp(max=count - 1)
        metadata = y.new_zeros((len(y), 2 + count), dtype=torch.int32)
        metadata[:, 0] = source * max_tokens + sources
        metadata[:, 1] = source * count + rank
        one_each = torch.arange(count, device=y.device)
        nothing = y.new_zeros(0, dtype=torch.int32)
        handle = buffers.package().EPHandle(
            do_expand=False,
            num_experts=count,
            expert_alignment=1,
            num_max_tokens_per_rank=max_tokens,
            num_sms=buffers.SMS,
            topk_idx=torch.where(sent >= 0, one_each, -1).contiguous(),
            num_recv_tokens=len(y),
            num_expanded_tokens=len(y),
            num_recv_tokens_per_expert_list=[],
            psum_num_recv_tokens_per_scaleup_rank=ends,
            psum_num_recv_tokens_per_expert=nothing,
            num_unaligned_recv_tokens_per_expert=nothing,
            recv_src_metadata=metadata,
            dst_buffer_slot_idx=nothing,
            token_metadata_at_forward=None,
            channel_linked_list=None,
        )
        out, _, _ = buffer.combine(deep_ep.aligned(y), handle)
        watchdog.watch(op, group, y.device)
    return out


def why_not(device: torch.device) -> str | None:
    """Why it cannot run on a device, or None."""
    if reason := deep_ep.why_not(device):
        return reason
    return None if _has_elastic() else "this deep_ep has no ElasticBuffer (DeepEP 2)"


@functools.cache
def _has_elastic() -> bool:
    """Whether the installed deep_ep is of version 2, without importing it."""
    if not platform.has_package("deep_ep"):
        return False
    spec = importlib.util.find_spec("deep_ep")
    folders = (spec.submodule_search_locations if spec else None) or ()
    return any(Path(folder, "buffers", "elastic.py").exists() for folder in folders)


def _wrong(op: str, group: str, x: Tensor, max_tokens: int) -> str | None:
    if "deep_ep" not in library._parse_disable(os.environ.get("CUSTOM_OPS_DISABLE", "")):
        return "deep_ep.Buffer is there, and measured; CUSTOM_OPS_DISABLE=deep_ep leaves it out"
    if not max_tokens:
        return "needs max_tokens"
    if not known(x.shape[1] * x.element_size() % _ROW_ALIGNMENT == 0):
        return f"takes rows of a multiple of {_ROW_ALIGNMENT} bytes"
    return deep_ep.wrong_group(op, group)


def _dispatch_unsupported(
    x: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    num_experts: int,
    group: str,
    *,
    max_tokens: int,
) -> str | None:
    wanted = torch.bfloat16 if scale is None else torch.float8_e4m3fn
    if x.dtype != wanted:
        return f"takes bfloat16, or float8_e4m3fn with scales, x is {x.dtype}"
    if not known(topk_ids.shape[1] <= deep_ep.MOST_TOP_K):
        return f"takes at most {deep_ep.MOST_TOP_K} experts for a token"
    return _wrong("ep_dispatch", group, x, max_tokens)


def _combine_unsupported(
    y: Tensor,
    sent: Tensor,
    sources: Tensor,
    ranks: Tensor,
    channels: Tensor,
    group: str,
    *,
    max_tokens: int,
) -> str | None:
    if y.dtype != torch.bfloat16:
        return f"adds up bfloat16 only, y is {y.dtype}"
    return _wrong("ep_combine", group, y, max_tokens)


def _implementation(function: Any, unsupported: Any) -> Implementation:
    return Implementation(
        "deep_ep_elastic",
        lambda: deep_ep.loaded(function),
        lambda device: why_not(device),
        unsupported,
    )


DISPATCH = _implementation(ep_dispatch, _dispatch_unsupported)
COMBINE = _implementation(ep_combine, _combine_unsupported)
