"""The communication buffers of DeepEP: one for each group, size and batch, made on first use, freed at exit.

Making one is collective: every rank of the group makes the same ones in the same order, which it does if it calls the
ops in the same order. Freeing one waits for the other ranks, so none is freed after an exchange has failed, and none
whose group made room for another of its name, of which nobody knows whether it has the same ranks.

A high-throughput buffer has one set of counters, into which the GPU writes the rows that every dispatch will receive
and which the host reads for those that it waits for. A dispatch that nobody waits for may still be on its way, or be
replayed by a CUDA graph, when the host begins to wait for a later one, and would take the counts of the earlier for
those of the later: rows beyond the memory that was made for them. So those with `max_tokens` have buffers of their own.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from custom_ops.expert_parallel import groups
from custom_ops.expert_parallel.agreement import CHANNELS

# Of each two SMs, one sends and one receives the tokens of a channel.
SMS = 2 * CHANNELS
# Tokens that a rank puts into a peer's queue at a time, by the number of ranks, and how many a queue holds: what DeepEP
# recommends for a host with NVLink. Its recommendation is not asked for at run time, since the number of SMs in it may
# have been changed, and the handle of a dispatch has a row of CHANNELS.
DISPATCH_CHUNK = {2: 24, 4: 6, 8: 6}
COMBINE_CHUNK = {2: 10, 4: 9, 8: 4}
QUEUE_TOKENS = 256
LEAST_QUEUE_PAIRS = 24  # DeepEP's default

# By group, its number (`groups.number`), mode, sizes and batch.
_buffers: dict[tuple[Any, ...], Any] = {}
_batch = contextvars.ContextVar("_batch", default=0)
_failed = False
_pairs = 0


def package() -> Any:
    """The module `deep_ep`, imported on first use."""
    return importlib.import_module("deep_ep")


@contextlib.contextmanager
def batch(which: int) -> Iterator[None]:
    """Inside, buffers are those of one of several batches that are on their way at once (0: what all else uses)."""
    token = _batch.set(which)
    try:
        yield
    finally:
        _batch.reset(token)


def high_throughput(op: str, group: str, row_bytes: int, counted: bool) -> Any:
    """The `deep_ep.Buffer` for rows of at most so many bytes. counted: the host waits for how many will come."""
    mode = "counted" if counted else "not counted"
    key = (group, groups.number(op, group), "high_throughput", mode, row_bytes, _batch.get())
    if key not in _buffers:
        deep_ep, ranks = package(), groups.size(op, group)
        size = max(
            config.get_nvl_buffer_size_hint(row_bytes, ranks)
            for config in (dispatch_config(ranks), combine_config(ranks))
        )
        _make(op, group, key, lambda pg: deep_ep.Buffer(pg, size, 0, explicitly_destroy=True))
    return _buffers[key]


def low_latency(op: str, group: str, max_tokens: int, hidden: int, num_experts: int) -> Any:
    """The `deep_ep.Buffer` in low-latency mode for so many tokens of each rank."""
    key = (group, groups.number(op, group), "low_latency", max_tokens, hidden, num_experts)
    if key not in _buffers:
        deep_ep, ranks = package(), groups.size(op, group)
        pairs = _queue_pairs(op, num_experts // ranks)
        size = deep_ep.Buffer.get_low_latency_rdma_size_hint(max_tokens, hidden, ranks, num_experts)
        _make(
            op,
            group,
            key,
            lambda pg: deep_ep.Buffer(
                pg,
                0,
                size,
                low_latency_mode=True,
                num_qps_per_rank=pairs,
                explicitly_destroy=True,
            ),
        )
    return _buffers[key]


def elastic(op: str, group: str, max_tokens: int, hidden: int, top_k: int) -> Any:
    """A `deep_ep.ElasticBuffer` for so many tokens of each rank; `deterministic`, or rows come in any order.

    One that was made for longer rows or for more experts of a token serves too: what one rank has, all have.
    """
    whose = (group, groups.number(op, group), "elastic")
    for (*of, most, width, distinct, which), buffer in _buffers.items():
        same = (*of, most, which) == (*whose, max_tokens, _batch.get())
        if same and width >= hidden and distinct >= top_k:
            return buffer
    key = (*whose, max_tokens, hidden, top_k, _batch.get())
    deep_ep = package()
    _make(
        op,
        group,
        key,
        lambda pg: deep_ep.ElasticBuffer(
            pg,
            num_max_tokens_per_rank=max_tokens,
            hidden=hidden,
            num_topk=top_k,
            deterministic=True,
            allow_hybrid_mode=False,
            explicitly_destroy=True,
        ),
    )
    return _buffers[key]


def _queue_pairs(op: str, local_experts: int) -> int:
    """How many queue pairs NVSHMEM has for each peer: one for each expert here. It is told once in a process."""
    global _pairs
    _pairs = _pairs or max(LEAST_QUEUE_PAIRS, local_experts)
    if local_experts > _pairs:
        raise RuntimeError(
            f"{op}: a rank has {local_experts} experts; accepted: at most {_pairs}, which the first buffer of this "
            "process was made for. Call the op for the layer with the most experts first"
        )
    return _pairs


def dispatch_config(ranks: int) -> Any:
    """The `deep_ep.Config` that dispatch runs with."""
    return package().Config(SMS, DISPATCH_CHUNK[ranks], QUEUE_TOKENS)


def combine_config(ranks: int) -> Any:
    """The `deep_ep.Config` that combine runs with."""
    return package().Config(SMS, COMBINE_CHUNK[ranks], QUEUE_TOKENS)


def _make(op: str, group: str, key: tuple[Any, ...], make: Callable[[Any], Any]) -> None:
    groups.refuse_capture(op)
    if any(of[0] == key[0] and of[1] != key[1] for of in _buffers):
        warnings.warn(
            f"{op}: buffers of an earlier group {group!r} keep their memory; call "
            "custom_ops.expert_parallel.release_buffers() on every rank before destroy_process_group",
            stacklevel=2,
        )
    if not _buffers:
        atexit.register(_release_at_exit)
    _buffers[key] = make(groups.resolve(op, group))


def spans_hosts(ranks: int) -> bool:
    """Whether so many ranks are more than this host runs, as far as the launcher (torchrun) says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) < ranks


def failed() -> None:
    """An exchange ended in an error: what the buffers hold is unknown, and peers may be gone."""
    global _failed
    _failed = True


def _release_at_exit() -> None:
    # The process may end by an error, of which its peers know nothing.
    if hasattr(sys, "last_value"):
        failed()
    release()


def release() -> None:
    """Free all buffers, in the order in which they were made. Every rank calls it; it runs at exit by itself.

    To be called before `destroy_process_group` where another group is to be made after it.
    """
    while _buffers:
        (group, number, mode, *_), buffer = next(iter(_buffers.items()))
        del _buffers[next(iter(_buffers))]
        now = groups.current(group)
        # Without its group a Buffer still reaches its peers, over memory; an ElasticBuffer needs the communicator.
        alive = now == number or (now is None and mode != "elastic")
        if alive and not _failed:
            buffer.destroy()
