"""Dispatch and combine by DeepEP's high-throughput kernels, between the GPUs of one host over NVLink.

DeepEP moves rows of bytes, so any dtype goes as bfloat16; codes with scales go as what it calls FP8. It returns rows
by the rank that they come from and then by token, as `ep_dispatch` promises, and what it needs of its own handle is the
handle of the ops. Combining adds up in float32 from rank 0 on and rounds once; it knows bfloat16 only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops import platform
from custom_ops.expert_parallel import buffers, groups, watchdog
from custom_ops.expert_parallel.agreement import agree_once
from custom_ops.expert_parallel.reference import about_combine, about_dispatch
from custom_ops.implementation import Implementation
from custom_ops.scales import known

MOST_TOP_K = 32  # a lane of a warp each
_MOST_LOCAL_EXPERTS = 128  # a thread each
_MOST_GROUPS = 128  # what its buffers have room for
# A half of a row, and 8 bytes, in the shared memory of a warp; it is read 16 bytes at a time.
_MOST_ROW_BYTES = 2 * (8192 - 8)
_ROW_ALIGNMENT = 32
# Combining synchronizes the lanes of a warp in a loop over a row, 16 bytes each: they must all be in it to its end.
_SUM_ALIGNMENT = 512
_POINTER_ALIGNMENT = 16


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
    about = about_dispatch(x, scale, topk_ids, topk_weights, num_experts, max_tokens)
    ids, weights = topk_ids.long().contiguous(), topk_weights.float().contiguous()
    rows = _view(aligned(x), torch.bfloat16 if scale is None else torch.float8_e4m3fn)
    with platform.on_device(x), naming(op, group):
        if not max_tokens:
            groups.refuse_capture(op)
        buffer = _buffer(op, group, x, max_tokens, about)
        to_rank, _, to_expert, is_in_rank, _ = buffer.get_dispatch_layout(ids, num_experts)
        # Without `max_tokens` the host waits here, for the number of rows that it has to allocate.
        received, recv_ids, recv_weights, counts, handle, _ = buffer.dispatch(
            rows if scale is None else (rows, scale),
            num_tokens_per_rank=to_rank,
            is_token_in_rank=is_in_rank,
            num_tokens_per_expert=to_expert,
            topk_idx=ids,
            topk_weights=weights,
            num_worst_tokens=max_tokens * buffer.group_size,
            config=buffers.dispatch_config(buffer.group_size),
        )
        watchdog.watch(op, group, x.device)
    recv_x, recv_scale = (received, None) if scale is None else received
    if recv_scale is None:
        recv_scale = x.new_empty(0, dtype=torch.float32)
    if max_tokens:
        experts = torch.arange(num_experts // buffer.group_size, device=x.device)
        counts = (recv_ids.view(-1, 1) == experts).sum(0, dtype=torch.int32)
    else:
        # From pinned memory, or the host would wait for the rows too.
        on_host = torch.tensor(counts, dtype=torch.int32, pin_memory=x.is_cuda)
        counts = on_host.to(x.device, non_blocking=True)
    ranks, _, channels, sources, _, sent = handle
    return (
        _view(recv_x, x.dtype),
        recv_scale,
        recv_ids,
        recv_weights.to(topk_weights.dtype),
        counts,
        sent,
        sources,
        ranks,
        channels,
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
    about = about_combine(y, max_tokens)
    with platform.on_device(y), naming(op, group):
        buffer = _buffer(op, group, y, max_tokens, about)
        # It writes into `sent`, one negative number over another, and an op does not write into what it is given.
        handle = ranks, None, channels, sources, None, sent.clone()
        config = buffers.combine_config(buffer.group_size)
        out, _, _ = buffer.combine(aligned(y), handle, config=config)
        watchdog.watch(op, group, y.device)
    return out


def _buffer(op: str, group: str, x: Tensor, max_tokens: int, about: dict[str, Any]) -> Any:
    agree_once(op, group, x.device, about)
    # For codes too as large as for 16 bits, which is what the results come back in.
    row_bytes = x.shape[1] * max(2, x.element_size())
    return buffers.high_throughput(op, group, row_bytes, counted=not max_tokens)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it where it is not contiguous or begins where no 16 bytes may be read at once."""
    if x.is_contiguous() and x.data_ptr() % _POINTER_ALIGNMENT == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _view(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of contiguous rows as another dtype. A tensor without elements may have no such view."""
    if rows.numel():
        return rows.view(dtype)
    return rows.new_empty(
        (len(rows), rows.shape[1] * rows.element_size() // dtype.itemsize), dtype=dtype
    )


class naming:
    """Turns what DeepEP raises when a peer does not come into an ExchangeError that names the op and the ranks."""

    def __init__(self, op: str, group: str) -> None:
        self.op, self.group = op, group

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # Its time-out, and the error of a GPU on which one of its kernels gave up.
        gave_up = any(sign in str(error) for sign in ("timeout", "unspecified launch failure"))
        if isinstance(error, RuntimeError) and gave_up:
            buffers.failed()
            raise groups.no_answer(self.op, self.group, error) from error


def why_not(device: torch.device) -> str | None:
    """Why DeepEP cannot run on a device, or None."""
    if device.type != "cuda":
        return f"needs a CUDA tensor, this one is on {device.type}"
    if not platform.has_package("deep_ep"):
        return (
            "deep_ep is not installed (github.com/deepseek-ai/DeepEP, or pip install sgl-deep-ep)"
        )
    capability = platform.cuda_capability(device)
    if capability is None or capability < (9, 0):
        return f"needs a GPU of compute capability 9.0 or newer, here is {capability}"
    return None


def wrong_group(op: str, group: str) -> str | None:
    """Why DeepEP does not serve a group, or None."""
    ranks = groups.size(op, group)
    if ranks not in buffers.DISPATCH_CHUNK:
        return f"takes 2, 4 or 8 ranks, group {group!r} has {ranks}"
    if buffers.spans_hosts(ranks):
        return f"takes the GPUs of one host, group {group!r} has more (LOCAL_WORLD_SIZE)"
    return None


def _wrong_row(name: str, x: Tensor, alignment: int) -> str | None:
    size = x.shape[1] * x.element_size()
    if not known(size % alignment == 0) or not known(size <= _MOST_ROW_BYTES):
        limits = f"a multiple of {alignment} and at most {_MOST_ROW_BYTES} bytes"
        return f"takes rows of {limits}, those of {name} have {size}"
    return None


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
    if reason := wrong_group("ep_dispatch", group) or _wrong_row("x", x, _ROW_ALIGNMENT):
        return reason
    if not known(topk_ids.shape[1] <= MOST_TOP_K):
        return f"takes at most {MOST_TOP_K} experts for a token, here are {topk_ids.shape[1]}"
    local = num_experts // groups.size("ep_dispatch", group)
    if not known(local <= _MOST_LOCAL_EXPERTS):
        return f"takes at most {_MOST_LOCAL_EXPERTS} experts for a rank, here are {local}"
    if scale is None:
        return None
    if x.element_size() != 1:
        return f"takes scales with codes of 8 bits, x is {x.dtype}"
    if not known(scale.shape[1] <= _MOST_GROUPS):
        return f"takes at most {_MOST_GROUPS} scales for a token, here are {scale.shape[1]}"
    return None


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
    return wrong_group("ep_combine", group) or _wrong_row("y", y, _SUM_ALIGNMENT)


def loaded(function: Any) -> Any:
    buffers.package()  # so that what is wrong with it is an error of the first use
    return function


DISPATCH = Implementation(
    "deep_ep", lambda: loaded(ep_dispatch), lambda device: why_not(device), _dispatch_unsupported
)
COMBINE = Implementation(
    "deep_ep", lambda: loaded(ep_combine), lambda device: why_not(device), _combine_unsupported
)
