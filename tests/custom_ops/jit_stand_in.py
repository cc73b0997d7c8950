"""A JIT compiler for tests: it counts its compilations, and sleeps and fails on demand."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from custom_ops import cuda_build
from custom_ops.jit.kernel import Compiler, Kernel, Problem, Target, powers_and_boundaries

TILES = (16, 32, 64, 128)
CPU = Target("cpu")

# Writes half of its output, sleeps, and then writes the rest. Needs no package: it starts in milliseconds.
_SCRIPT = """
import os, sys, time
out, log, tile, sleep, fails = sys.argv[1:]
with open(log, "a") as file:
    file.write(tile + "\\n")
with open(out, "w") as file:
    file.write("half ")
    file.flush()
    time.sleep(float(sleep))
    if fails == "1":
        sys.exit(f"tile {tile} does not compile")
    file.write("whole " + tile)
"""


def tile_of(rows: int) -> int:
    return next((tile for tile in TILES if rows <= tile), TILES[-1])


@dataclass
class StandIn(Compiler):
    """One kernel per tile and last size of the first argument. fails: the tiles that do not compile."""

    sleep: float = 0.0
    fails: frozenset[int] = frozenset()
    toolchain: str = "1"
    reason: str | None = None
    loaded: list[Kernel] = field(default_factory=list)

    name = "stand_in"
    memory = 1 << 20

    @property
    def folder(self) -> Path:
        return cuda_build.cache_dir() / "stand_in"

    def count(self, tile: int | None = None) -> int:
        """How many compilations were started, by any process; of one tile if it is given."""
        try:
            lines = (self.folder / "log").read_text().split()
        except FileNotFoundError:
            return 0
        return len(lines) if tile is None else lines.count(str(tile))

    def version(self) -> str:
        return self.toolchain

    def why_not(self, target: Target) -> str | None:
        return self.reason

    def kernels(
        self, problem: Problem, low: int, high: int, mode: str, target: Target
    ) -> Iterable[Kernel]:
        width = problem.arguments[0].shape[-1]
        if not isinstance(width, int):
            raise ValueError(f"the last size is {width}, which is not known")
        counts = range(low, high + 1) if mode == "full" else powers_and_boundaries(low, high, TILES)
        return [
            Kernel.of(problem.op, problem.implementation, {"tile": tile, "width": width})
            for tile in dict.fromkeys(map(tile_of, counts))
        ]

    def environment(self, target: Target) -> Mapping[str, str]:
        return {"toolchain": self.toolchain, "arch": target.arch, "driver": target.driver}

    def command(self, kernel: Kernel, folder: Path, target: Target) -> Sequence[str]:
        self.folder.mkdir(parents=True, exist_ok=True)
        tile = kernel["tile"]
        arguments = [tile, self.sleep, int(tile in self.fails)]
        paths = [str(folder / "kernel.bin"), str(self.folder / "log")]
        return [sys.executable, "-ISc", _SCRIPT, *paths, *map(str, arguments)]

    def output(self, kernel: Kernel, target: Target = CPU) -> Path:
        return self.folder / f"{self.identity(kernel, target)}.bin"

    def publish(self, kernel: Kernel, folder: Path, target: Target) -> Sequence[Path]:
        os.replace(folder / "kernel.bin", self.output(kernel, target))
        return [self.output(kernel, target)]

    def load(self, kernels: Sequence[Kernel]) -> None:
        self.loaded += kernels


def kernels(count: int, width: int = 64) -> list[Kernel]:
    """Some different kernels of an implementation called stand_in."""
    return [
        Kernel.of("op", "stand_in", {"tile": 1 << index, "width": width}) for index in range(count)
    ]
