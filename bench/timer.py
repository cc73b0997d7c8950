"""Timers. Each returns the median in microseconds.

Warm: a CUDA graph of many calls over the same buffers, which is what a decoding step in a CUDA graph sees and
leaves out what the host costs. Cold: one call at a time with the L2 cache overwritten in between, which is
what a kernel in a large model sees. Host: wall clock, for a CPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
COPY_BYTES = 1 << 30  # 20 times the largest L2, so that the copy measures memory


class Timer(Protocol):
    """What `bench run` needs of a clock."""

    name: str

    def warm(self, call: Call) -> float: ...

    def cold(self, call: Call) -> float | None: ...

    def launched(self, call: Call) -> float:
        """Microseconds a call, one after the other, launched by the host."""
        ...

    def copy_bandwidth(self) -> float:
        """GB/s of a large device-to-device copy, counting bytes read and bytes written."""
        ...


class CudaTimer:
    """CUDA graphs for warm times, events around single calls for cold ones."""

    name = "triton.testing.do_bench_cudagraph, median; cold: events around a graph, L2 overwritten before"

    def __init__(self, rep_ms: int = 20, cold_reps: int = 50) -> None:
        self.rep_ms = rep_ms
        self.cold_reps = cold_reps
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        # Also long enough (about 0.1 ms) for the host to queue a graph behind it, so that the gap between
        # the two events holds kernels and no host time.
        self._flush = torch.empty(max(4 * l2, 256 << 20), dtype=torch.int8, device="cuda")

    def warm(self, call: Call) -> float:
        from triton.testing import do_bench_cudagraph

        _warm_up(call)
        return 1e3 * do_bench_cudagraph(call, rep=self.rep_ms, return_mode="median")

    def cold(self, call: Call) -> float | None:
        _warm_up(call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(self.cold_reps)
        ]
        for start, end in events:
            self._flush.zero_()
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return 1e3 * statistics.median(start.elapsed_time(end) for start, end in events)

    def launched(self, call: Call, runs: int = 15, calls: int = 10) -> float:
        _warm_up(call)
        times = []
        for _ in range(runs):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / calls)
        return 1e6 * statistics.median(times)

    def copy_bandwidth(self) -> float:
        from triton.testing import do_bench

        source = torch.empty(COPY_BYTES // 2, dtype=torch.bfloat16, device="cuda").normal_()
        target = torch.empty_like(source)
        # no CUDA graph: a copy captured in one runs on a copy engine, at 2.44 instead of 3.03 TB/s on an H100
        seconds = 1e-3 * do_bench(lambda: target.copy_(source), return_mode="median")
        return 2 * COPY_BYTES / seconds / 1e9


class HostTimer:
    """Wall clock on the CPU; it has no way to empty the caches, so `cold` is None."""

    name = "time.perf_counter, median"

    def __init__(self, reps: int = 5, copy_bytes: int = 1 << 26) -> None:
        self.reps = reps
        self.copy_bytes = copy_bytes

    def warm(self, call: Call) -> float:
        call()
        times = []
        for _ in range(self.reps):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return 1e6 * statistics.median(times)

    def cold(self, call: Call) -> float | None:
        return None

    def launched(self, call: Call) -> float:
        return self.warm(call)

    def copy_bandwidth(self) -> float:
        source = torch.ones(self.copy_bytes // 4)
        target = torch.empty_like(source)
        return 2 * self.copy_bytes / self.warm(lambda: target.copy_(source)) / 1e3


def timer_for(device: torch.device) -> Timer:
    return CudaTimer() if device.type == "cuda" else HostTimer()


def _warm_up(call: Call) -> None:
    for _ in range(
        3
    ):  # the first call compiles, the second may recompile, the third is what is timed
        call()
    torch.cuda.synchronize()
