"""What a warm-up is worth, on a GPU: `python -m bench warmup --out DIR`.

A Llama of the widths of Llama-3-8B in block FP8. It has two layers: the products of all layers have the same
sizes, and hence the same kernels. Every phase is a process of its own, with DeepGEMM's cache and ours in fresh
folders; nvcc is wrapped in a script that notes each call, so that compilations are counted by what was run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.case import Target
from bench.results import ROOT, Row, Run

LAYERS, MAX_TOKENS = 2, 8192
COLD = (50, 300, 3000)
PROCESSES = 8
KILLED_KERNELS = 12
# What a process has run before the sweep: a prompt, a token, and a length that is no multiple of 8, for which cuDNN has
# another attention kernel, whose library it loads in the first such call (0.5 s, in a stock model as well).
PRIMED = (4096, 1, 127)

UNITS = {
    "cold_slowest_call": "before: slowest first call of a token count, caches cold (microseconds)",
    "slowest_first_call": "after the warm-up, over `first_calls` token counts that the process had not seen",
    "median_first_call": "median of the same calls",
    "serial": "the kernels one by one in a fresh cache; `serial_measured` of them, scaled to all",
    "parallel": "the same kernels by one warm-up in a fresh cache, on all cores",
    "second_start": "warmup() in a new process, caches intact: `second_start_load` of it is loading kernels",
    "ratios": "better when larger; a target of 1 on a ratio of the form limit / measured is the limit itself",
}


# --- phases: each is run as `python -m bench.warmup PHASE ARGUMENTS`, prints JSON as its last line ----------


def _model() -> Any:
    """Two decoder layers and the norm, [1, tokens, 4096] -> the same, compiled with a dynamic token count."""
    import fusion_passes
    from bench.suites.layer import FULL, Stack
    from fusion_passes import backend

    torch.manual_seed(0)
    device = torch.device("cuda")
    first, second = (Stack(FULL, device) for _ in range(2))
    first.layers.append(second.layers[0])
    fusion_passes.quantize_(first, "fp8_block")
    first.requires_grad_(False)
    return torch.compile(first, backend=backend.fusion_passes, dynamic=True)


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


def _ready() -> tuple[Any, torch.Tensor]:
    """The model with its graphs compiled: one for any number of tokens, one for a single token."""
    model, x = _model(), _inputs()
    for tokens in PRIMED:
        _timed(model, x, tokens)
        _timed(model, x, tokens)
    return model, x


def _listing() -> set[str]:
    from custom_ops.jit import deep_gemm

    folder = deep_gemm.cache() / "cache"
    return set(os.listdir(folder)) if folder.exists() else set()


def phase_cold(plan: str) -> dict[str, Any]:
    """Calls of new token counts with nothing compiled ahead; writes the plan for the other phases."""
    import fusion_passes

    with torch.no_grad():
        model, x = _ready()
        calls = {str(tokens): _timed(model, x, tokens) for tokens in COLD}
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


def phase_sweep() -> dict[str, Any]:
    """A second start, and then many token counts that the process has not seen."""
    import fusion_passes

    before = _listing()
    with torch.no_grad():
        model, x = _ready()
        graphs_from_cache = [report.from_cache for report in fusion_passes.reports()]
        start = time.perf_counter()
        outcome = fusion_passes.warmup(max_num_tokens=MAX_TOKENS, load=False, progress=False)
        found = time.perf_counter() - start
        fusion_passes.warmup(max_num_tokens=MAX_TOKENS, load=True, progress=False)
        second_start = time.perf_counter() - start
        edges = {b + d for b in (16, 32, *range(64, MAX_TOKENS + 1, 64)) for d in (-1, 0, 1)}
        counts = [m for m in edges if 1 < m <= MAX_TOKENS and m not in PRIMED]
        counts += random.Random(0).sample(range(2, MAX_TOKENS + 1), 200)
        counts = list(dict.fromkeys(m for m in counts if m not in PRIMED))
        random.Random(1).shuffle(counts)
        first = {m: _timed(model, x, m) for m in counts}
        again = {m: _timed(model, x, m) for m in random.Random(2).sample(counts, 50)}
    slowest = max(first, key=lambda m: first[m])
    return {
        "compiled": len(outcome.compiled),
        "found": len(outcome.found),
        "found_seconds": found,
        "second_start": second_start,
        "graphs_from_cache": graphs_from_cache,
        "calls": len(first),
        "slowest": first[slowest],
        "slowest_tokens": slowest,
        "slowest_calls": [
            {"tokens": m, "seconds": first[m], "position": counts.index(m)}
            for m in sorted(first, key=lambda m: -first[m])[:5]
        ],
        "median": statistics.median(first.values()),
        "worst_over_repeat": max(first[m] / again[m] for m in again),
        "graphs_compiled_since": len(fusion_passes.reports()) - len(graphs_from_cache),
        "events": [dataclasses.asdict(event) for event in fusion_passes.jit_events()],
        "new_folders": sorted(_listing() - before),
    }


PHASES: dict[str, Callable[..., dict[str, Any]]] = {
    "cold": phase_cold,
    "serial": phase_serial,
    "compile": phase_compile,
    "rank": phase_rank,
    "sweep": phase_sweep,
}


# --- the lead of the phases ---------------------------------------------------------------------------------


class Lab:
    """The folders of a run and the nvcc that notes its calls.

    Our CUDA kernels and Inductor's graphs are built once, by the first phase, and are there for all others.
    """

    def __init__(self, folder: Path) -> None:
        from custom_ops.jit import deep_gemm

        self.folder, self.plan = folder, folder / "plan.json"
        self.shim, self.log = folder / "nvcc", folder / "nvcc.log"
        self.log.touch()
        self.shim.write_text(
            f'#!/bin/sh\necho "$*" >> "{self.log}"\nexec "{deep_gemm.nvcc()}" "$@"\n'
        )
        self.shim.chmod(0o755)

    def environment(self, name: str) -> dict[str, str]:
        """Caches called `name`: new ones hold what the first phase built, and nothing of a warm-up."""
        ours, built = self.folder / name / "ours", self.folder / "cold" / "ours"
        if not ours.exists() and built.exists():
            shutil.copytree(built, ours, ignore=shutil.ignore_patterns("jit", "*.lock"))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("FUSION_PASSES", "DG_"))}
        return kept | {
            "CUSTOM_OPS_CACHE_DIR": str(ours),
            "DG_JIT_CACHE_DIR": str(self.folder / name / "deep_gemm"),
            "DG_JIT_NVCC_COMPILER": str(self.shim),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        }

    def start(
        self, cache: str, phase: str, *arguments: str, **variables: str
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "bench.warmup", phase, *arguments],
            env=self.environment(cache) | variables,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, cache: str, phase: str, *arguments: str) -> dict[str, Any]:
        """A phase, with how long its process took and how many compilations nvcc was called for."""
        before, start = self.compilations(), time.perf_counter()
        answer = finish(self.start(cache, phase, *arguments))
        took = time.perf_counter() - start
        return {**answer, "process": took, "nvcc": self.compilations() - before}

    def compilations(self) -> int:
        """How often nvcc was called to compile; DeepGEMM also asks each nvcc for its version."""
        return sum("-cubin" in line for line in self.log.read_text().splitlines())


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The JSON of a phase. Raises RuntimeError with the end of what it said when it failed."""
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{process.args!r}: exit code {process.returncode}\n{errors[-4000:]}")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def kill_a_writer(lab: Lab) -> dict[str, Any]:
    """Kill a warm-up with some kernels done, and start again."""
    limit = str(KILLED_KERNELS)
    place = lab.folder / "killed" / "deep_gemm" / "cache"
    process = lab.start("killed", "compile", str(lab.plan), limit)
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if place.exists() and os.listdir(place):
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    survived = len(os.listdir(place)) if place.exists() else 0
    again = lab.run("killed", "compile", str(lab.plan), limit)
    return {**again, "killed": process.returncode == -signal.SIGKILL, "survived": survived}


def start_together(lab: Lab) -> dict[str, Any]:
    """Eight processes with nothing compiled."""
    before = lab.compilations()
    ranks = [
        lab.start("together", "rank", str(lab.plan), LOCAL_RANK=str(rank))
        for rank in range(PROCESSES)
    ]
    answers, errors = [], []
    for process in ranks:
        try:
            answers.append(finish(process))
        except RuntimeError as error:
            errors.append(str(error)[-1000:])
    return {
        "compiled": sum(answer["compiled"] for answer in answers),
        "nvcc": lab.compilations() - before,
        "digests": len({answer["digest"] for answer in answers}),
        "errors": errors,
        "seconds": max((answer["wall"] for answer in answers), default=0.0),
    }


def measure(
    out: Path, serial_seconds: float, commit: str, say: Callable[[str, dict[str, Any]], None]
) -> tuple[Run, Path]:
    """All phases, one row each for the bars that they are held against; also the raw answers, beside the rows."""
    session = results.describe("warmup", torch.device("cuda"), "wall clock", 0.0)
    session.commit = commit or session.commit
    session.units = dict(UNITS)
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="warmup-") as folder:
        lab = Lab(Path(folder))
        plan = str(lab.plan)
        steps: Sequence[tuple[str, Callable[[], dict[str, Any]]]] = (
            ("cold", lambda: lab.run("cold", "cold", plan)),
            ("parallel", lambda: lab.run("warm", "compile", plan)),
            ("sweep", lambda: lab.run("warm", "sweep")),
            ("serial", lambda: lab.run("serial", "serial", plan, str(serial_seconds))),
            ("together", lambda: start_together(lab)),
            ("killed", lambda: kill_a_writer(lab)),
        )
        for name, step in steps:
            start = time.perf_counter()
            try:
                raw[name] = step()
            except (
                RuntimeError
            ) as error:  # a phase that fails must not cost what the others measured
                raw[name] = {"failed": str(error)}
            raw[name] = _without_paths(raw[name], folder)
            raw[name]["took"] = round(time.perf_counter() - start, 1)
            say(name, raw[name])
            session.rows = rows(raw)
            path = session.save(out)
        (out / f"{path.stem}.raw.txt").write_text(json.dumps(raw, indent=1) + "\n")
    return session, path


def _without_paths(answer: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """An answer less the folders of this machine, which are nobody else's business."""
    text = json.dumps(answer)
    for path, name in ((folder, "CACHE"), (sys.prefix, "PYTHON"), (str(ROOT), ".")):
        text = text.replace(json.dumps(path)[1:-1], name)
    cleaned: dict[str, Any] = json.loads(text)
    return cleaned


def rows(raw: Mapping[str, Any]) -> list[Row]:
    """The bars as ratios, each better when larger and with its target; a phase that failed is an error."""
    found: list[Row] = []

    def row(name: str, phase: str, targets: Mapping[str, float]) -> tuple[Row, Mapping[str, Any]]:
        new = Row(f"warmup_{name}", {"tokens": MAX_TOKENS, "layers": LAYERS})
        answer = raw.get(phase, {"failed": "not run yet"})
        if "failed" in answer:
            new.errors[phase] = answer["failed"]
            answer = {}
        new.finish(0.0, [Target(ratio, least) for ratio, least in targets.items()])
        found.append(new)
        return new, answer

    cold, answer = row("before", "cold", {})
    if answer:
        cold.warm_us = {
            f"first_call_{tokens}_tokens": 1e6 * s for tokens, s in answer["calls"].items()
        }
        cold.warm_us["cold_slowest_call"] = 1e6 * max(answer["calls"].values())

    sweep, answer = row("sweep", "sweep", {"no_event": 1, "no_new_folder": 1, "of_ten_medians": 1})
    if answer:
        sweep.warm_us = {
            "slowest_first_call": 1e6 * answer["slowest"],
            "median_first_call": 1e6 * answer["median"],
        }
        sweep.ratios = {
            "no_event": float(not answer["events"]),
            "no_new_folder": float(not answer["new_folders"]),
            "of_ten_medians": 10 * answer["median"] / answer["slowest"],
            "first_calls": answer["calls"],
        }

    second, answer = row("second_start", "sweep", {"of_three_seconds": 1, "no_compiler": 1})
    if answer:
        load = answer["second_start"] - answer["found_seconds"]
        second.warm_us = {
            "second_start": 1e6 * answer["second_start"],
            "second_start_load": 1e6 * load,
        }
        second.ratios = {
            "of_three_seconds": 3 / answer["second_start"],
            "no_compiler": float(not answer["nvcc"] and not answer["compiled"]),
        }

    parallel, answer = row("parallel", "parallel", {"of_serial": 6})
    serial = raw.get("serial", {})
    if answer:
        parallel.warm_us = {"parallel": 1e6 * answer["wall"]}
        parallel.ratios = {"kernels": answer["compiled"], "workers": answer["workers"]}
        if "seconds" in serial:
            scaled = serial["seconds"] / serial["kernels"] * answer["compiled"]
            parallel.warm_us["serial"] = 1e6 * scaled
            parallel.ratios["serial_measured"] = serial["kernels"]
            parallel.ratios["of_serial"] = scaled / answer["wall"]
        else:
            parallel.errors["serial"] = serial.get("failed", "not run yet")

    together, answer = row("together", "together", {"once": 1, "no_error": 1, "equal": 1})
    if answer:
        kernels = raw["parallel"].get("compiled", -1)
        together.warm_us = {"together": 1e6 * answer["seconds"]}
        together.ratios = {
            "once": float(answer["compiled"] == answer["nvcc"] == kernels),
            "no_error": float(not answer["errors"]),
            "equal": float(answer["digests"] == 1),
        }

    killed, answer = row("killed", "killed", {"killed": 1, "recovered": 1})
    if answer:
        killed.ratios = {
            "killed": float(answer["killed"]),
            "recovered": float(answer["whole"]),
            "survived": answer["survived"],
            "compiled_again": answer["compiled"],
        }
    return found


if __name__ == "__main__":
    print(json.dumps(PHASES[sys.argv[1]](*sys.argv[2:])))
