"""Process groups by name, and exchanges between their ranks that end in an error instead of in a hang.

The only module here that knows torch.distributed, whose lookups by name are private. It is imported on first use: a
torch without it still imports this package.

The time-out is that of the group: `init_process_group(..., timeout=)` or `new_group(..., timeout=)`.
"""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops.library import require

# How long a rank that gave up waits for the others to say so too, before it names those that did not.
_GRACE_SECONDS = 2.0
# The part of a group's time-out after which this module gives up: before the watchdog of NCCL ends the process.
PATIENCE = 0.8

_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_next_number = itertools.count()


class ExchangeError(RuntimeError):
    """A rank did not answer in time, died, or called the op with something else than this one.

    The group is not to be used again: messages of the exchange that failed may still be under way.
    """


def resolve(op: str, group: str) -> Any:
    """The process group of a name (`group.group_name`). Raises ValueError for a name that is not registered."""
    if torch.distributed.is_available():
        from torch.distributed.distributed_c10d import _resolve_process_group

        try:
            return _resolve_process_group(group)  # type: ignore[arg-type, unused-ignore]
        except RuntimeError:
            pass
    raise ValueError(
        f"{op}: group is {group!r}; accepted: the group_name of a process group of this process "
        "(torch.distributed.group.WORLD.group_name after init_process_group)"
    )


def number(op: str, group: str) -> int:
    """Which group of this process has that name now: one that is destroyed leaves its name to the next."""
    pg = resolve(op, group)
    found = _numbers.get(pg)
    if found is None:
        found = _numbers[pg] = next(_next_number)
    return found


def current(group: str) -> int | None:
    """The `number` of the group of that name, or None where there is none any more."""
    try:
        return number("current", group)
    except ValueError:
        return None


def size(op: str, group: str) -> int:
    """How many ranks a group has."""
    return resolve(op, group).size()


def check_shares(op: str, num_experts: int, group: str) -> None:
    """Raise ValueError unless the ranks of a group can have as many experts each."""
    ranks = size(op, group)
    require(
        num_experts % ranks == 0,
        lambda: (
            f"{op}: num_experts is {num_experts}; accepted: a multiple of the {ranks} ranks of group {group!r}"
        ),
    )


def exchange(
    op: str,
    group: str,
    sent: Tensor,
    send_counts: Sequence[int],
    received: Tensor,
    receive_counts: Sequence[int],
    *,
    wait: bool = True,
) -> None:
    """Rows of `sent`, by rank, to their ranks, and theirs into `received`, by rank.

    Both are contiguous, of one dtype that every backend moves (uint8, int64). send_counts, receive_counts: rows for
    and from each rank. wait: whether the host waits for the rows; without it only the current CUDA stream does, and a
    rank that dies meanwhile is noticed by the watchdog of NCCL and by the next exchange that waits.
    Raises ExchangeError.
    """

    def start(pg: Any) -> Any:
        return torch.distributed.all_to_all_single(
            received, sent, list(receive_counts), list(send_counts), group=pg, async_op=True
        )

    _finish(op, group, start, sent, wait)


def gather(op: str, group: str, sent: Tensor, received: Tensor) -> None:
    """`sent` of every rank, by rank, into `received`. The same shape on all; the host does not wait. See `exchange`."""

    def start(pg: Any) -> Any:
        dist = torch.distributed
        # its name from 2.13 on, where the old one warns
        gather_one = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return gather_one(received, sent, group=pg, async_op=True)

    _finish(op, group, start, sent, False)


def gather_all(op: str, group: str, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
    """`gather` of several tensors at once: one launch with NCCL."""

    def start(pg: Any) -> Any:
        # as bytes, for a backend that does not know a dtype
        return pg.allgather_into_tensor_coalesced(
            [t.view(torch.uint8) if t.numel() else t for t in received],
            [t.view(torch.uint8) if t.numel() else t for t in sent],
        )

    _finish(op, group, start, sent[0], False)


def reduce_scatter(op: str, group: str, sent: Tensor, received: Tensor) -> None:
    """Of the sums over the ranks of `sent`, this rank's part into `received`. On GPUs; the host does not wait."""

    def start(pg: Any) -> Any:
        return torch.distributed.reduce_scatter_tensor(received, sent, group=pg, async_op=True)

    _finish(op, group, start, sent, False)


def most(op: str, group: str, count: int, device: torch.device) -> int:
    """The largest of the counts that the ranks give. The host waits for them."""
    mine = torch.full((1,), count, dtype=torch.int64, device=device)
    all_counts = mine.new_empty(size(op, group))
    if mine.is_cuda:
        refuse_capture(op)
    gather(op, group, mine, all_counts)
    if not mine.is_cuda:
        return int(all_counts.max())
    on_host = torch.empty_like(all_counts, device="cpu", pin_memory=True)
    on_host.copy_(all_counts, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    seconds = PATIENCE * timeout(resolve(op, group), device)
    deadline = time.monotonic() + seconds
    while not arrived.query():
        if time.monotonic() > deadline:
            raise no_answer(op, group, f"nothing for {seconds:.1f} s")
    return int(on_host.max())


def refuse_capture(op: str) -> None:
    """Raise RuntimeError where the current CUDA stream is being captured: what follows waits for the host."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{op}: it waits for the host and cannot be captured in a CUDA graph; leave it out of the capture, or "
            "call it once before (an op of fixed shapes waits only on its first call)"
        )


def _finish(op: str, group: str, start: Callable[[Any], Any], sent: Tensor, wait: bool) -> None:
    """Start a collective, and wait for it on the host or on the stream. Raises ExchangeError."""
    pg = resolve(op, group)
    if wait and sent.is_cuda:
        refuse_capture(op)
    try:
        work = start(pg)
        # gloo's own time-out ends its wait; NCCL's ends the process, so that this one has to come first.
        if wait and sent.is_cuda:
            seconds = PATIENCE * timeout(pg, sent.device)
            deadline = time.monotonic() + seconds
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise RuntimeError(f"nothing for {seconds:.1f} s")
                time.sleep(0)
        work.wait()
    except RuntimeError as error:
        raise no_answer(op, group, error) from error


def no_answer(op: str, group: str, error: object) -> ExchangeError:
    """The error of a rank that waited in vain: who it is, who did not say that it gave up too, and what it saw."""
    pg = resolve(op, group)
    peers = absent(op, pg)
    whom = f"ranks {peers}" if peers else "a rank that cannot be told"
    return ExchangeError(
        f"{op}: rank {pg.rank()} of {pg.size()} (group {group!r}) got no answer from {whom}: {error}"
    )


def timeout(pg: Any, device: torch.device) -> float:
    """The time-out of a group in seconds."""
    return pg._get_backend(device).options._timeout.total_seconds()


def absent(op: str, pg: Any) -> list[int]:
    """Ranks of the group that do not say, within a few seconds, that they gave up as this one does.

    For a collective that failed as a whole: whoever waited in it gives up too, whoever died or never called it does
    not. Empty if all of them say so or nobody can be asked (the rank that keeps the store is gone).
    """
    from torch.distributed.distributed_c10d import _get_process_group_store

    try:
        store = _get_process_group_store(pg)
        store.set(f"custom_ops/{op}/{pg.rank()}", "gave up")
        missing = [peer for peer in range(pg.size()) if peer != pg.rank()]
        deadline = time.monotonic() + _GRACE_SECONDS
        while missing and time.monotonic() < deadline:
            missing = [peer for peer in missing if not store.check([f"custom_ops/{op}/{peer}"])]
            time.sleep(0.02)
    except RuntimeError:
        return []
    return missing
