"""Triton's kernels for a warm-up: which specializations token counts reach, compiled by processes of their own.

They go to a Triton cache of this package, one for all processes and devices of a node: where Triton itself looks
changes when Inductor first runs. A process that is to use them loads them (`load`), which is what a warm-up does.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from custom_ops import cuda_build, library, monitor, platform
from custom_ops.jit import store, tracing
from custom_ops.jit.kernel import (
    Compiler,
    Kernel,
    NotCovered,
    Problem,
    Target,
    powers_and_boundaries,
)
from custom_ops.jit.launches import IMPLEMENTATION, launch_of

OUTPUT = "files.json"
# Heights of tiles; what a table adds between them only "full" finds.
TILES = (16, 32, 64, 128, 256)
# A file that keeps what the tracing of a problem found is worth it from here on.
_SLOW_SECONDS = 0.2

_watching = threading.Lock()
_watched = False


def watch_triton() -> None:
    """From now on the monitor is asked before one of our kernels compiles. Imports Triton."""
    global _watched
    from custom_ops.jit import triton_internals

    with _watching:
        if not _watched:
            triton_internals.watch(monitor.triton_compiling)
            _watched = True


def folder() -> Path:
    """The Triton cache that the kernels go to."""
    return store.root() / "triton"


class Triton(Compiler):
    """Finds specializations by tracing ops, and compiles them without a GPU."""

    name = IMPLEMENTATION
    memory = 1 << 30

    def version(self) -> str:
        return (
            f"triton {platform.package_version('triton')}, torch {torch.__version__}, "
            f"custom_ops {library.source_hash()[:16]}"
        )

    def why_not(self, target: Target) -> str | None:
        if target.arch == "cpu":
            return "the target has no GPU"
        if not platform.has_triton():
            return "triton is not installed (pip install triton)"
        if platform.triton_interpret():
            return "TRITON_INTERPRET is set, and Triton compiles nothing then"
        return None

    def knows(self, op: str) -> bool:
        return False

    def kernels(
        self, problem: Problem, low: int, high: int, mode: str, target: Target
    ) -> Iterable[Kernel]:
        """The kernels of whatever compiler that calls of the problem reach, by calling it for every row count.

        Raises ValueError for a problem that cannot be traced, NotCovered for one that can in part.
        """
        memory = self._memory(problem, low, high, mode, target)
        kernels, notes = _recall(memory)
        if kernels is None:
            start = time.monotonic()
            kernels, notes = self._trace(problem, low, high, mode, target)
            if time.monotonic() - start > _SLOW_SECONDS:
                known = {"kernels": [kernel.to_json() for kernel in kernels], "notes": notes}
                store.write(memory, json.dumps(known))
        if notes:
            raise NotCovered("; ".join(notes), kernels)
        return kernels

    def _trace(
        self, problem: Problem, low: int, high: int, mode: str, target: Target
    ) -> tuple[list[Kernel], list[str]]:
        """What calls of every row count compile, and what of it cannot be named."""
        wanted = set(powers_and_boundaries(low, high, TILES)) if mode == "relax" else None
        with tracing.Trace(target) as trace:
            for rows, symbols in tracing.counts_of(problem, low, high):
                if wanted is not None and rows not in wanted:
                    continue
                try:
                    trace.call(problem, symbols, rows=rows)
                except Exception as error:  # whatever the implementation makes of such tensors
                    raise ValueError(
                        f"calling it with {rows} rows to see what it compiles raised "
                        f"{type(error).__name__}: {error}"
                    ) from error
        return list(trace.kernels), list(trace.notes)

    def _memory(self, problem: Problem, low: int, high: int, mode: str, target: Target) -> Path:
        """Where what tracing found is kept: it depends on all of this."""
        settings = {k: v for k, v in os.environ.items() if k.startswith(("CUSTOM_OPS_", "DG_"))}
        settings.pop("CUSTOM_OPS_CACHE_DIR", None)
        here = [
            platform.package_version("deep_gemm"),
            cuda_build.why_not(),
            sorted(settings.items()),
        ]
        key = repr([problem, low, high, mode, target, self.version(), *here])
        return store.root() / "traced" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def environment(self, target: Target) -> Mapping[str, str]:
        return {"folder": str(folder()), "arch": target.arch, "driver": target.driver}

    def identity(self, kernel: Kernel, target: Target) -> str:
        from custom_ops.jit.triton_internals import cache_hash

        parts = [cache_hash(launch_of(kernel), target.arch), dict(self.environment(target))]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def command(self, kernel: Kernel, folder: Path, target: Target) -> Sequence[str]:
        spec = json.dumps(kernel.to_json())
        return [sys.executable, "-m", "custom_ops.jit.triton", spec, target.arch, str(folder)]

    def publish(self, kernel: Kernel, folder: Path, target: Target) -> Sequence[Path]:
        return [Path(path) for path in json.loads((folder / OUTPUT).read_text())]

    def load(self, kernels: Sequence[Kernel]) -> None:
        from custom_ops.jit import target, triton_internals

        arch = target.here().arch
        for kernel in kernels:
            if not triton_internals.load(launch_of(kernel), arch, folder()):
                monitor.log.warning("%s was compiled for other settings of Triton", kernel.label)


def _recall(memory: Path) -> tuple[list[Kernel] | None, list[str]]:
    """What an earlier trace found, or (None, [])."""
    try:
        known = json.loads(memory.read_text())
        return [Kernel.from_json(each) for each in known["kernels"]], list(known["notes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, []


COMPILER = Triton()


def main(spec: str, arch: str, out: str) -> None:
    """Compile a kernel, and write where its files are; what a compiling process does."""
    from custom_ops.jit import triton_internals

    launch = launch_of(Kernel.from_json(json.loads(spec)))
    files = triton_internals.compile_ahead(launch, arch, folder())
    (Path(out) / OUTPUT).write_text(json.dumps([str(path) for path in files]))


if __name__ == "__main__":
    main(*sys.argv[1:])
