"""The rows of a run and where they come from: one JSON file per suite and run, in `bench/results/`."""

from __future__ import annotations

import datetime
import json
import platform as host
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.case import Target
from custom_ops import platform

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results"
RANKS = "expert_parallel"
"""The suite of several GPUs, whose rows stand beside other things than stock."""
PACKAGES = ("torch", "triton", "transformers", "deep_gemm", "tvm_ffi", "flashinfer", "numpy")
UNITS = {
    "warm_us": "microseconds, median, CUDA graph, warm L2 (see timer)",
    "cold_us": "microseconds, median, L2 overwritten before each call",
    "of_copy": "least traffic / warm time of ours / copy bandwidth of the same run",
    "of_inductor": "warm time of stock torch.compile, the faster of both modes / warm time of ours",
    "copy_gbps": "GB/s, bytes read plus bytes written",
}


@dataclass
class Row:
    """One case: the time of each way of running it, and the ratios that matter.

    `ours` is the op, by the implementation that `custom_ops` chooses; `plugin` is the plain PyTorch of the case
    compiled with the plugin. A case without an op is a model: there the plugin's time is ours.
    """

    case: str
    sizes: dict[str, int]
    moved_bytes: int = 0
    flops: int = 0
    chosen: str = ""
    fusion: str | None = None
    fired: dict[str, int] = field(default_factory=dict)
    warm_us: dict[str, float] = field(default_factory=dict)
    cold_us: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    targets: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.case, *sorted(self.sizes.items()))

    @property
    def label(self) -> str:
        return f"{self.case}({', '.join(f'{key}={value}' for key, value in self.sizes.items())})"

    @property
    def ours_us(self) -> float | None:
        return self.warm_us.get("ours", self.warm_us.get("plugin"))

    @property
    def inductor_us(self) -> float | None:
        found = [
            self.warm_us[k] for k in ("inductor", "inductor_max_autotune") if k in self.warm_us
        ]
        return min(found, default=None)

    @property
    def missed(self) -> list[str]:
        """The targets that the row does not reach, as sentences."""
        return [
            f"{name} is {self.ratios.get(name, float('nan')):.3f}, wanted {least:g}"
            for name, least in self.targets.items()
            if not self.ratios.get(name, float("nan")) >= least
        ]

    def finish(self, copy_gbps: float, targets: Iterable[Target] = ()) -> None:
        """Compute the ratios, each of which is better when it is larger."""
        self.targets = {target.ratio: target.at_least for target in targets}
        ours = self.ours_us
        if not ours:
            return
        self.ratios["of_copy"] = self.moved_bytes / ours / 1e3 / copy_gbps
        for name, time in {**self.warm_us, "inductor": self.inductor_us}.items():
            if name not in ("ours", "inductor_max_autotune") and time:
                self.ratios[f"of_{name}"] = time / ours
        if "plugin" in self.warm_us and self.inductor_us:
            self.ratios["plugin_of_inductor"] = self.inductor_us / self.warm_us["plugin"]
        if self.flops:
            self.ratios["tflops"] = self.flops / ours / 1e6


@dataclass
class Run:
    """The rows of one suite and their provenance."""

    suite: str
    device: dict[str, Any]
    versions: dict[str, str | None]
    commit: str
    command: str
    date: str
    timer: str
    copy_gbps: float
    rows: list[Row] = field(default_factory=list)
    units: dict[str, str] = field(default_factory=lambda: dict(UNITS))

    def save(self, folder: Path) -> Path:
        """Write `<suite>-<device>-<date>.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        slug = re.sub(r"[^a-z0-9]+", "-", self.device["name"].lower()).strip("-")
        stamp = re.sub(r"[^0-9]", "", self.date)[:14]
        path = folder / f"{self.suite}-{slug}-{stamp}.json"
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return path


def load(path: Path) -> Run:
    data = json.loads(path.read_text())
    return Run(**{**data, "rows": [Row(**row) for row in data["rows"]]})


def load_all(folder: Path = FOLDER) -> list[Run]:
    """Every run in a folder, oldest first."""
    return sorted(map(load, folder.glob("*.json")), key=lambda run: run.date)


def newest(runs: Sequence[Run]) -> dict[str, list[tuple[Run, Row]]]:
    """Per device, the newest row of each case with the run that it is from, in the order of the suites.

    A row measured without stock does not take the place of one that has it: it says nothing of being ahead.
    """
    found: dict[str, dict[tuple[Any, ...], tuple[Run, Row]]] = {}
    for run in runs:
        for row in run.rows:
            rows = found.setdefault(run.device["name"], {})
            known = rows.get(row.key)
            if known is None or row.inductor_us is not None or known[1].inductor_us is None:
                rows[row.key] = (run, row)
    return {device: list(rows.values()) for device, rows in found.items()}


def describe(suite: str, device: torch.device, timer: str, copy_gbps: float) -> Run:
    """An empty run of this machine, now."""
    return Run(
        suite=suite,
        device=_device(device),
        versions={
            "python": host.python_version(),
            "cuda": torch.version.cuda,
            **{name: platform.package_version(name) for name in PACKAGES},
        },
        commit=_commit(),
        command=_command(sys.argv[1:]),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        timer=timer,
        copy_gbps=copy_gbps,
    )


def _command(arguments: Sequence[str]) -> str:
    """What was run, less the folder on the machine that it was run on."""
    kept = list(arguments)
    if "--out" in kept:
        place = kept.index("--out")
        del kept[place : place + 2]
    return shlex.join(["python", "-m", "bench", *kept])


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": f"{host.machine()} cpu", "arch": "cpu", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size >> 20,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def _commit() -> str:
    """The commit of the checkout, with "+" when it has changes; the hash of the sources without git."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if not commit:
        from custom_ops.library import source_hash

        return f"custom_ops sources {source_hash()[:12]}"
    dirty = _output(
        "git", "-C", str(ROOT), "status", "--porcelain", "--", "custom_ops", "fusion_passes"
    )
    return commit + ("+" if dirty else "")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return ""
    return (
        done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""
    )
