"""Compiles DeepGEMM's kernels for block-scaled products on Hopper before DeepGEMM does.

DeepGEMM picks a tile for (M, N, K, multiprocessors), writes a few lines of C++ that instantiate a template for
it, and looks for a folder whose name is a hash of them. All of that is computed here (`deep_gemm_tiles`,
`deep_gemm_names`), so a kernel can be compiled without DeepGEMM, without a GPU, and by any process: nvcc with the
same lines and flags, into the folder where DeepGEMM will look. `deep_gemm_first_call`
checks the prediction against that folder whenever a problem is new to a process.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from custom_ops import platform
from custom_ops.jit.deep_gemm_first_call import multiprocessors_of
from custom_ops.jit.deep_gemm_names import (
    cache,
    code,
    directory,
    flags,
    library_hash,
    nvcc,
    package,
    signature,
)
from custom_ops.jit.deep_gemm_tiles import (
    OP,
    TILE_M,
    VERSIONS,
    Product,
    choose,
    kernel_at,
    transpose_of,
)
from custom_ops.jit.kernel import Compiler, Kernel, Operand, Problem, Target, powers_and_boundaries


class DeepGemm(Compiler):
    """Compiles DeepGEMM's kernels with nvcc, to where DeepGEMM looks for them."""

    name = "deep_gemm"
    memory = 1 << 30  # an nvcc was measured to take 0.46 GiB

    def version(self) -> str:
        return platform.package_version("deep_gemm") or "not installed"

    def why_not(self, target: Target) -> str | None:
        if target.arch != "9.0a":
            return f"DeepGEMM's kernels here are for sm_90a, the target is {target.arch}"
        if package() is None:
            return "deep_gemm is not installed (pip install sgl-deep-gemm apache-tvm-ffi)"
        if (version := platform.package_version("deep_gemm")) not in VERSIONS:
            return f"DeepGEMM's choice of kernels is known for {', '.join(VERSIONS)}, here is {version}"
        if os.environ.get("DG_JIT_USE_NVRTC", "0") not in ("", "0"):
            return "DG_JIT_USE_NVRTC is set, and warm-up compiles with nvcc: unset it"
        if not nvcc().is_file():
            return f"there is no {nvcc()} to compile with (set CUDA_HOME)"
        return None

    def knows(self, op: str) -> bool:
        return op == OP

    def kernels(
        self, problem: Problem, low: int, high: int, mode: str, target: Target
    ) -> Iterable[Kernel]:
        b, a_scale = problem.arguments[2], problem.arguments[1]
        n, k = b.shape
        multiprocessors = multiprocessors_of(target)
        if not (isinstance(n, int) and isinstance(k, int)):
            raise ValueError(f"b is {n} x {k}: its sizes must be known to enumerate kernels")
        counts = (
            np.arange(low, high + 1, dtype=np.int64)
            if mode == "full"
            else np.array(powers_and_boundaries(low, high, TILE_M["dense"]), np.int64)
        )
        product = Product(n, k)
        chosen = choose(counts, product, multiprocessors)
        found: dict[Kernel, None] = {}
        for index, first in zip(*np.unique(chosen, return_index=True)):
            kernel = kernel_at(int(index), int(counts[first]), product, multiprocessors)
            found[kernel] = None
        if _may_transpose(a_scale):
            found[transpose_of(low, product)] = None
        return found

    def environment(self, target: Target) -> Mapping[str, str]:
        return {
            "deep_gemm": f"{platform.package_version('deep_gemm')} {library_hash()}",
            "compiler": f"{signature()} {flags()}",
            "folder": str(cache()),
            "arch": target.arch,
            "driver": target.driver,
        }

    def command(self, kernel: Kernel, folder: Path, target: Target) -> Sequence[str]:
        source = folder / "kernel.cu"
        source.write_text(code(kernel))
        return [
            str(nvcc()),
            str(source),
            "-cubin",
            "-o",
            str(folder / "kernel.cubin"),
            *shlex.split(flags()),
        ]

    def publish(self, kernel: Kernel, folder: Path, target: Target) -> Sequence[Path]:
        place = directory(kernel)
        place.parent.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # it was private: an image may be built by one user and run by another
        names = ("kernel.cu", "kernel.cubin")
        try:
            os.rename(folder, place)
        except (
            OSError
        ):  # it is there, from DeepGEMM itself or truncated: the same name, hence the same content
            for name in names:
                os.replace(folder / name, place / name)
        return [place / name for name in names]

    def private(self, kernel: Kernel) -> Path | None:
        return cache() / "tmp"

    def load(self, kernels: Sequence[Kernel]) -> None:
        from custom_ops.gemm import deep_gemm
        from custom_ops.jit import deep_gemm_grouped

        for kernel in kernels:
            if "groups" in dict(kernel.example):
                deep_gemm_grouped.run_once(kernel)
                continue
            transposes = "transpose_groups" in dict(kernel.spec)
            layout = "row_major" if transposes else "column_major_tma"
            deep_gemm.run_once(**dict(kernel.example), scale_layout=layout)


COMPILER = DeepGemm()


def _may_transpose(a_scale: Operand) -> bool:
    """Whether DeepGEMM may have to transpose the scales of a. One group: strides say nothing there."""
    in_place = a_scale.layout == "column_major_tma" or (
        len(a_scale.shape) == 2 and a_scale.stride[0] == 1
    )
    return not in_place or a_scale.shape[-1] == 1
