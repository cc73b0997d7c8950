"""The CUDA C++ kernels as one kernel of a warm-up: a library for the target's architecture."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from custom_ops import cuda_build, library, platform
from custom_ops.jit.kernel import Compiler, Kernel, Problem, Target

_BUILD = "import sys; from custom_ops import cuda_build; cuda_build.build([sys.argv[1]])"


class CudaLibrary(Compiler):
    """Builds the library with `cuda_build`, which has a cache and a lock of its own."""

    name = "cuda"
    memory = 6 << 30  # it runs one nvcc per source, and each includes headers of torch

    def why_not(self, target: Target) -> str | None:
        if target.arch == "cpu":
            return "the target has no GPU"
        if platform.toolkit() is None and cuda_build._find(target.arch) is None:
            return "there is no nvcc to build the CUDA C++ kernels with (set CUDA_HOME)"
        return None

    def kernels(
        self, problem: Problem, low: int, high: int, mode: str, target: Target
    ) -> Iterable[Kernel]:
        return [Kernel.of(problem.op, "cuda", {"arch": target.arch})]

    def environment(self, target: Target) -> Mapping[str, str]:
        return {"build": cuda_build._name(target.arch), "driver": target.driver}

    def command(self, kernel: Kernel, folder: Path, target: Target) -> Sequence[str]:
        return [sys.executable, "-c", _BUILD, kernel["arch"]]

    def publish(self, kernel: Kernel, folder: Path, target: Target) -> Sequence[Path]:
        files = self.existing(kernel, target)
        assert files is not None
        return files

    def existing(self, kernel: Kernel, target: Target) -> Sequence[Path] | None:
        folder = cuda_build._find(kernel["arch"])  # one that matches its checksum
        return [folder / cuda_build.LIBRARY, folder / cuda_build.MANIFEST] if folder else None

    def load(self, kernels: Sequence[Kernel]) -> None:
        library.load_cuda()


COMPILER = CudaLibrary()
