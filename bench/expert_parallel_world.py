"""A rank of the bench of several GPUs: its sizes, what it draws, and how calls of all ranks together are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.results import Row

ROUNDS = 3
# Even, as are the calls in a graph: the low-latency ops of DeepEP take two buffers in turns, whoever calls them.
WARM_UPS = 4
LAYER_TOKENS = (16, 64, 256, 1024, 4096, 8192)

Call = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """A layer, all experts of all ranks counted."""

    hidden: int = 7168
    intermediate: int = 2048
    experts: int = 64
    top_k: int = 8
    tokens: int = 4096  # of a rank, for the high-throughput ops
    low_latency_tokens: int = 128
    layer_tokens: tuple[int, ...] = LAYER_TOKENS
    step_hidden: int = 2048
    step_tokens: int = 1024
    reps: int = 15

    def dict(self, tokens: int, ranks: int) -> dict[str, int]:
        return {
            "tokens": tokens,
            "ranks": ranks,
            "hidden": self.hidden,
            "experts": self.experts,
            "top_k": self.top_k,
        }


TINY = Sizes(64, 32, 8, 2, 24, 8, (3, 8), 64, 16, 2)


@dataclass(frozen=True)
class Plan:
    """What to measure, and where the rows go."""

    device: str
    ranks: int
    parts: tuple[str, ...]
    sizes: Sizes
    steps_seconds: float
    out: Path
    commit: str
    tokens: tuple[int, ...] = ()


@dataclass
class World:
    """This rank and what it has."""

    rank: int
    ranks: int
    group: str
    device: torch.device
    sizes: Sizes
    plan: Plan
    generator: torch.Generator = field(default_factory=torch.Generator)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def local(self) -> int:
        return self.sizes.experts // self.ranks

    def draw(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens in bfloat16, ids of distinct experts, and weights."""
        sizes = self.sizes
        x = torch.randn(tokens, sizes.hidden, device=self.device).bfloat16()
        scores = torch.rand(tokens, sizes.experts, device=self.device)
        weights, ids = scores.topk(sizes.top_k, dim=1)
        return x, ids, weights / weights.sum(1, keepdim=True)

    def slowest(self, times: dict[str, float]) -> dict[str, float]:
        """The largest of all ranks, name by name."""
        found = torch.tensor(list(times.values()), dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        return dict(zip(times, found.tolist(), strict=True))

    def together(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        torch.distributed.barrier()


def launched(world: World, calls: dict[str, Call]) -> dict[str, float]:
    """Microseconds of each call, launched one after the other, in turns with the others."""
    for call in calls.values():
        for _ in range(WARM_UPS):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            world.together()
            times[name] += _events(world, call)
    return world.slowest({name: statistics.median(found) for name, found in times.items()})


def _events(world: World, call: Call) -> list[float]:
    reps = world.sizes.reps
    if not world.cuda:
        found = []
        for _ in range(reps):
            start = time.perf_counter()
            call()
            found.append(1e6 * (time.perf_counter() - start))
        return found
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(reps)]
    for start_event, end_event in events:
        start_event.record()
        call()
        end_event.record()
    torch.cuda.synchronize()
    return [1e3 * start_event.elapsed_time(end_event) for start_event, end_event in events]


def graphed(
    world: World, calls: dict[str, Call], repeats: int = 20, replays: int = 10
) -> dict[str, float]:
    """Microseconds of each call in a CUDA graph of many; on a CPU as `launched`."""
    if not world.cuda:
        return launched(world, calls)
    graphs = {name: graph_of(world, call, repeats) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            world.together()
            events = []
            for _ in range(replays):
                pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                pair[0].record()
                graph.replay()
                pair[1].record()
                events.append(pair)
            torch.cuda.synchronize()
            times[name] += [1e3 * a.elapsed_time(b) / repeats for a, b in events[1:]]
    return world.slowest({name: statistics.median(found) for name, found in times.items()})


def graph_of(world: World, call: Call, repeats: int) -> Any:
    """A CUDA graph of so many calls; every rank captures it at the same time."""
    for _ in range(WARM_UPS):
        call()
    world.together()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    world.together()
    return graph


def row(
    world: World,
    case: str,
    tokens: int,
    times: dict[str, float],
    targets: dict[str, float] | None = None,
    **more: Any,
) -> Row:
    """A row with the ratios of all ways to ours."""
    made = Row(case, world.sizes.dict(tokens, world.ranks), warm_us=times, **more)
    made.ratios = {f"of_{n}": t / times["ours"] for n, t in times.items() if n != "ours"}
    made.targets = {n: t for n, t in (targets or {}).items() if n in made.ratios}
    return made
