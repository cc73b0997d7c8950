"""The phases of the bench of warm-up, each a process: `python -m bench.warmup_phases PHASE ARGUMENTS`.

A phase prints its answer as JSON, as its last line; `bench.warmup` runs them and holds the answers against the bars.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

LAYERS, MAX_TOKENS = 2, 8192
COLD = (50, 300, 3000)
# What a process has run before the sweep, so that Dynamo has every graph that stock torch.compile would have:
# - a multiple of 128 that is no size of the model: Dynamo takes sizes of equal value for one, and a graph made for 4096
#   tokens would be for 4096 tokens only, as hidden_size is 4096. With a multiple of 8 that is none of 128 the first of
#   128 that followed took 0.5 s, which no kernel of ours was compiled in;
# - one token, for which it makes a graph of its own;
# - a count that is no multiple of 4: Inductor pads the strides of attention masks to multiples of 4 elements, and a
#   graph made for one kind is guarded against the other. Nor is it a multiple of 8: cuDNN has another attention kernel
#   for those, whose library it loads in the first such call (0.5 s, in a stock model as well).
PRIMED = (2304, 1, 127)
# One more of each kind, for stock: those that follow must not need a graph either.
ONE_MORE = (520, 1, 255, 2052)


class Counted:
    """A backend of torch.compile that counts the graphs that it is given."""

    def __init__(self, backend: Callable[..., Any]) -> None:
        self.backend, self.graphs = backend, 0

    def __call__(self, gm: Any, example_inputs: Any) -> Any:
        self.graphs += 1
        return self.backend(gm, example_inputs)


def _layers() -> Any:
    """Two decoder layers and the norm, [1, tokens, 4096] -> the same."""
    import fusion_passes
    from bench.suites.layer import FULL, Stack

    torch.manual_seed(0)
    device = torch.device("cuda")
    first, second = (Stack(FULL, device) for _ in range(2))
    first.layers.append(second.layers[0])
    fusion_passes.quantize_(first, "fp8_block")
    first.requires_grad_(False)
    return first


def _compiled(layers: Any, backend: Counted) -> Any:
    return torch.compile(layers, backend=backend, dynamic=True)


def _inputs() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(1, MAX_TOKENS, 4096, device="cuda", dtype=torch.bfloat16)


def _timed(model: Any, x: torch.Tensor, tokens: int) -> float:
    """Seconds of one call, with the GPU idle before and after."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    model(x[:, :tokens])
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Ready:
    """The model with its graphs compiled, by ours and on request by stock, and its input."""

    def __init__(self) -> None:
        from fusion_passes import backend

        self.layers, self.x = _layers(), _inputs()
        self.ours = Counted(backend.fusion_passes)
        self.model = _compiled(self.layers, self.ours)
        self.call(PRIMED, 2)
        self.primed = self.ours.graphs

    def call(self, counts: Sequence[int], times: int = 1) -> dict[int, float]:
        """Seconds of the last call of each count."""
        return {m: [_timed(self.model, self.x, m) for _ in range(times)][-1] for m in counts}

    def stock(self) -> tuple[int, int]:
        """Graphs that stock makes for the primed counts, and for one more of each kind. The last thing to ask."""
        from torch import _dynamo

        torch.compiler.reset()
        stock = Counted(_dynamo.lookup_backend("inductor"))
        model = _compiled(self.layers, stock)
        for m in PRIMED:
            _timed(model, self.x, m)
        primed = stock.graphs
        for m in ONE_MORE:
            _timed(model, self.x, m)
        return primed, stock.graphs - primed


def _listing() -> set[str]:
    from custom_ops.jit import deep_gemm

    folder = deep_gemm.cache() / "cache"
    return set(os.listdir(folder)) if folder.exists() else set()


def phase_cold(plan: str) -> dict[str, Any]:
    """Calls of new token counts with nothing compiled ahead; writes the plan for the other phases."""
    import fusion_passes

    with torch.no_grad():
        calls = {str(tokens): seconds for tokens, seconds in Ready().call(COLD).items()}
    warm_up = fusion_passes.warmup_plan(max_num_tokens=MAX_TOKENS)
    Path(plan).write_text(warm_up.to_json())
    return {"calls": calls, "kernels": len(warm_up.kernels), "notes": list(warm_up.notes)}


def _compile(plan: Any, **options: Any) -> Any:
    import fusion_passes

    return fusion_passes.warmup(plan=plan, load=False, progress=False, **options)


def _read(plan: str) -> Any:
    import fusion_passes

    return fusion_passes.WarmupPlan.from_json(Path(plan).read_text())


def phase_serial(plan: str, seconds: str) -> dict[str, Any]:
    """One kernel after the other, in a random order, until the time is over."""
    whole = _read(plan)
    kernels = list(whole.kernels)
    random.Random(0).shuffle(kernels)
    start, done = time.perf_counter(), 0
    for kernel in kernels:
        # the CUDA library was built by the first phase, and is no compilation here
        done += len(_compile(dataclasses.replace(whole, kernels=(kernel,)), workers=1).compiled)
        if time.perf_counter() - start > float(seconds):
            break
    return {"seconds": time.perf_counter() - start, "kernels": done}


def phase_compile(plan: str, limit: str = "0") -> dict[str, Any]:
    """A warm-up by plan, of the first `limit` kernels if it is not 0; loads nothing."""
    whole = _read(plan)
    part = dataclasses.replace(whole, kernels=whole.kernels[: int(limit) or None])
    outcome = _compile(part)
    return {
        "wall": outcome.wall,
        "compiled": len(outcome.compiled),
        "found": len(outcome.found),
        "workers": outcome.workers,
        "slowest_kernel": max(outcome.seconds.values(), default=0.0),
        "whole": all(part.is_compiled(kernel) for kernel in part.kernels),
    }


def phase_rank(plan: str) -> dict[str, Any]:
    """One of several processes that start together: warms up, runs a product, and hashes its result."""
    answer = phase_compile(plan)
    import custom_ops

    torch.manual_seed(2)
    a = torch.randn(300, 4096, device="cuda", dtype=torch.bfloat16)
    codes, scales = custom_ops.group_quant(a, 128, scale_layout="column_major_tma")
    weight = torch.randn(1024, 4096, device="cuda").to(torch.float8_e4m3fn)
    weight_scale = torch.rand(8, 32, device="cuda") + 0.5
    out = custom_ops.block_scaled_mm(codes, scales, weight, weight_scale)
    digest = hashlib.sha256(out.view(torch.int16).cpu().numpy().tobytes()).hexdigest()
    return {**answer, "digest": digest}


def _counts() -> list[int]:
    """Token counts of a sweep: on both sides of each boundary of a tile, and 200 at random."""
    edges = {b + d for b in (16, 32, *range(64, MAX_TOKENS + 1, 64)) for d in (-1, 0, 1)}
    counts = sorted(m for m in edges if 1 < m <= MAX_TOKENS)
    counts += random.Random(0).sample(range(2, MAX_TOKENS + 1), 200)
    counts = list(dict.fromkeys(m for m in counts if m not in PRIMED))
    random.Random(1).shuffle(counts)
    return counts


def _sweep(ready: Ready, counts: Sequence[int]) -> dict[str, Any]:
    """First calls of those counts, after a warm-up."""
    import fusion_passes

    first = ready.call(counts)
    again = ready.call(random.Random(2).sample(list(counts), 50))
    slowest = max(first, key=lambda m: first[m])
    return {
        "calls": len(first),
        "slowest": first[slowest],
        "slowest_tokens": slowest,
        "slowest_calls": [
            {"tokens": m, "seconds": first[m], "position": counts.index(m)}
            for m in sorted(first, key=lambda m: -first[m])[:5]
        ],
        "median": statistics.median(first.values()),
        "worst_over_repeat": max(first[m] / again[m] for m in again),
        "graphs": ready.primed,
        "more_graphs": ready.ours.graphs - ready.primed,
        "events": [dataclasses.asdict(event) for event in fusion_passes.jit_events()],
    }


def phase_sweep() -> dict[str, Any]:
    """A second start, and then many token counts that the process has not seen."""
    import fusion_passes

    before = _listing()
    with torch.no_grad():
        ready = Ready()
        graphs_from_cache = [report.from_cache for report in fusion_passes.reports()]
        start = time.perf_counter()
        outcome = fusion_passes.warmup(max_num_tokens=MAX_TOKENS, load=False, progress=False)
        found = time.perf_counter() - start
        fusion_passes.warmup(max_num_tokens=MAX_TOKENS, load=True, progress=False)
        second_start = time.perf_counter() - start
        swept = _sweep(ready, _counts())
        folders = sorted(_listing() - before)
        stock, more_of_stock = ready.stock()
    return {
        **swept,
        "compiled": len(outcome.compiled),
        "found": len(outcome.found),
        "found_seconds": found,
        "second_start": second_start,
        "graphs_from_cache": graphs_from_cache,
        "graphs_of_stock": stock,
        "more_graphs_of_stock": more_of_stock,
        "new_folders": folders,
    }


def phase_triton() -> dict[str, Any]:
    """A warm-up of Triton's kernels, and then many token counts."""
    import fusion_passes

    with torch.no_grad():
        ready = Ready()
        start = time.perf_counter()
        plan = fusion_passes.warmup_plan(max_num_tokens=MAX_TOKENS)
        traced = time.perf_counter() - start
        outcome = fusion_passes.warmup(plan=plan, progress=False)
        swept = _sweep(ready, _counts()[:200])
    return {
        **swept,
        "compiled": len(outcome.compiled),
        "traced_seconds": traced,
        "wall": outcome.wall,
        "workers": outcome.workers,
        "slowest_kernel": max(outcome.seconds.values(), default=0.0),
        "functions": sorted({str(kernel["function"]) for kernel in plan.kernels}),
        "notes": list(plan.notes),
    }


PHASES: dict[str, Callable[..., dict[str, Any]]] = {
    "cold": phase_cold,
    "serial": phase_serial,
    "compile": phase_compile,
    "rank": phase_rank,
    "sweep": phase_sweep,
    "triton": phase_triton,
}


if __name__ == "__main__":
    print(json.dumps(PHASES[sys.argv[1]](*sys.argv[2:])))
