"""Says which op a rank hangs in, where the host does not wait for it.

The low-latency kernels of DeepEP wait for their peers for ever, and its combine for 100 s, after which the GPU stops
with an error that names nothing. So an event is recorded behind each such op, and a thread looks at the oldest one.
One that is not reached within the time-out of the group is a line on stderr that names the op, this rank, and the ranks
that did not say that they gave up too; then the process ends, for nothing else stops a kernel. (The watchdog of NCCL
does the same.)

A CUDA graph is not seen: what is recorded in a capture never runs by itself.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from custom_ops.expert_parallel import groups

_PERIOD_SECONDS = 0.5
EXIT_CODE = 70


@dataclass
class Pending:
    """An op that a stream has not passed yet."""

    op: str
    group: str
    event: Any
    since: float
    seconds: float


class Watchdog:
    """A queue of events and the thread that looks at them. exit: what ends the process."""

    def __init__(self, end: Callable[[int], Any] = os._exit) -> None:
        self.pending: deque[Pending] = deque()
        self.spare: list[Any] = []
        self.end = end
        self.thread: threading.Thread | None = None

    def add(self, op: str, group: str, event: Any, seconds: float) -> None:
        self.pending.append(Pending(op, group, event, time.monotonic(), seconds))
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, daemon=True, name="expert_parallel")
            self.thread.start()

    def look(self, now: float) -> None:
        """Drop what is done, in order; report the first that is not and should be, or that failed."""
        while self.pending:
            first = self.pending[0]
            try:
                done = first.event.query()
            except RuntimeError as error:
                self._report(first, error)
                self.pending.clear()  # the error reaches whoever calls CUDA next
                return
            if not done:
                if now - first.since > first.seconds:
                    self._report(first, f"nothing for {first.seconds:.1f} s")
                    self.end(EXIT_CODE)
                    self.pending.clear()
                return
            self.pending.popleft()
            self.spare.append(first.event)

    def _report(self, pending: Pending, error: object) -> None:
        print(groups.no_answer(pending.op, pending.group, error), file=sys.stderr, flush=True)

    def _run(self) -> None:
        _mind_own_captures()
        while True:
            time.sleep(_PERIOD_SECONDS)
            self.look(time.monotonic())


def _mind_own_captures() -> None:
    """Let this thread ask for events while another one captures a CUDA graph, which would break that capture."""
    major = (torch.version.cuda or "").split(".")[0]
    thread_local = ctypes.c_int(1)  # cudaStreamCaptureModeThreadLocal
    exchange = ctypes.CDLL(f"libcudart.so.{major}").cudaThreadExchangeStreamCaptureMode
    if error := exchange(ctypes.byref(thread_local)):
        raise RuntimeError(f"cudaThreadExchangeStreamCaptureMode: error {error}")


_watchdog = Watchdog()


def watch(op: str, group: str, device: torch.device, patience: float = 1.0) -> None:
    """Record an event behind what the current stream of a GPU was given, and look after it.

    patience: the part of the group's time-out that it may take. `groups.PATIENCE` where NCCL moves the rows, whose own
    watchdog ends the process at the time-out and knows no op.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return
    event = _watchdog.spare.pop() if _watchdog.spare else torch.cuda.Event()
    event.record()
    seconds = patience * groups.timeout(groups.resolve(op, group), device)
    _watchdog.add(op, group, event, seconds)
