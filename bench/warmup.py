"""What a warm-up is worth, on a GPU: `python -m bench warmup --out DIR`.

A Llama of the widths of Llama-3-8B in block FP8. It has two layers: the products of all layers have the same
sizes, and hence the same kernels. Every phase is a process of its own, with DeepGEMM's cache and ours in fresh
folders; nvcc is wrapped in a script that notes each call, so that compilations are counted by what was run. One phase
leaves out CUDA C++ and DeepGEMM, so that Triton runs everything.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
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
from bench.warmup_phases import LAYERS, MAX_TOKENS

PROCESSES = 8
KILLED_KERNELS = 12

UNITS = {
    "cold_slowest_call": "before: slowest first call of a token count, caches cold (microseconds)",
    "slowest_first_call": "after the warm-up, over `first_calls` token counts that the process had not seen",
    "median_first_call": "median of the same calls",
    "serial": "the kernels one by one in a fresh cache; `serial_measured` of them, scaled to all",
    "parallel": "the same kernels by one warm-up in a fresh cache, on all cores",
    "graphs_of_ours": "graphs compiled for `PRIMED` token counts; graphs_of_stock: by backend='inductor' for the same",
    "more_graphs_of_ours": "graphs compiled in the sweep; more_graphs_of_stock: for `ONE_MORE` token counts",
    "triton": "one warm-up where CUDA C++ and DeepGEMM are left out; triton_trace: finding what there is to compile",
    "second_start": "warmup() in a new process, caches intact: `second_start_load` of it is loading kernels",
    "ratios": "better when larger; a target of 1 on a ratio of the form limit / measured is the limit itself",
}


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
            [sys.executable, "-m", "bench.warmup_phases", phase, *arguments],
            env=self.environment(cache) | variables,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, cache: str, phase: str, *arguments: str, **variables: str) -> dict[str, Any]:
        """A phase, with how long its process took and how many compilations nvcc was called for."""
        before, start = self.compilations(), time.perf_counter()
        answer = finish(self.start(cache, phase, *arguments, **variables))
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
            (
                "triton",
                lambda: lab.run("triton", "triton", CUSTOM_OPS_DISABLE="cuda,deep_gemm"),
            ),
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

    bars = {"no_event": 1, "no_new_folder": 1, "no_graph": 1, "of_ten_medians": 1}
    sweep, answer = row("sweep", "sweep", bars)
    if answer:
        sweep.warm_us = {
            "slowest_first_call": 1e6 * answer["slowest"],
            "median_first_call": 1e6 * answer["median"],
        }
        sweep.ratios = {
            "no_event": float(not answer["events"]),
            "no_new_folder": float(not answer["new_folders"]),
            "no_graph": float(not answer["more_graphs"]),
            "of_ten_medians": 10 * answer["median"] / answer["slowest"],
            "first_calls": answer["calls"],
        }

    graphs, answer = row("graphs", "sweep", {"no_more_than_stock": 1})
    if answer:
        ours, more = answer["graphs"], answer["more_graphs"]
        stock, more_of_stock = answer["graphs_of_stock"], answer["more_graphs_of_stock"]
        graphs.ratios = {
            "no_more_than_stock": float(ours + more <= stock + more_of_stock),
            "graphs_of_ours": ours,
            "graphs_of_stock": stock,
            "more_graphs_of_ours": more,
            "more_graphs_of_stock": more_of_stock,
        }

    bars = {"no_event": 1, "no_graph": 1, "covered": 1, "of_ten_medians": 1}
    triton, answer = row("triton", "triton", bars)
    if answer:
        triton.warm_us = {
            "triton": 1e6 * answer["wall"],
            "triton_trace": 1e6 * answer["traced_seconds"],
            "slowest_first_call": 1e6 * answer["slowest"],
            "median_first_call": 1e6 * answer["median"],
        }
        triton.ratios = {
            "no_event": float(not answer["events"]),
            "no_graph": float(not answer["more_graphs"]),
            "covered": float(not answer["notes"] and answer["compiled"] > 0),
            "of_ten_medians": 10 * answer["median"] / answer["slowest"],
            "kernels": answer["compiled"],
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
