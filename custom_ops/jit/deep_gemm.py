"""Compiles DeepGEMM's kernels for block-scaled products on Hopper before DeepGEMM does.

DeepGEMM picks a tile for (M, N, K, multiprocessors), writes a few lines of C++ that instantiate a template for
it, and looks for a folder whose name is a hash of them. All of that is computed here (`deep_gemm_tiles`,
`deep_gemm_names`), so a kernel can be compiled without DeepGEMM, without a GPU, and by any process: nvcc with the
same lines and flags, into the folder where DeepGEMM will look. `first_call` checks the prediction against that folder
whenever a problem is new to a process.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from custom_ops import platform
from custom_ops.jit import monitor
from custom_ops.jit.deep_gemm_names import (
    cache,
    code,
    directory,
    flags,
    is_on,
    library_hash,
    nvcc,
    package,
    signature,
)
from custom_ops.jit.deep_gemm_tiles import (
    IMPLEMENTATION,
    OP,
    TILE_M,
    VERSIONS,
    Product,
    choose,
    kernel_at,
    kernel_of,
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


def multiprocessors_of(target: Target) -> int:
    """How many DeepGEMM divides the work among: all of the GPU's, unless its user said otherwise."""
    if (deep_gemm := sys.modules.get("deep_gemm")) is not None:
        return int(deep_gemm.get_num_sms())
    return target.multiprocessors


def _may_transpose(a_scale: Operand) -> bool:
    """Whether DeepGEMM may have to transpose the scales of a. One group: strides say nothing there."""
    in_place = a_scale.layout == "column_major_tma" or (
        len(a_scale.shape) == 2 and a_scale.stride[0] == 1
    )
    return not in_place or a_scale.shape[-1] == 1


# --- the monitor's side --------------------------------------------------------------------------------------

# Kernels that this process has run, and hence loaded, by device index.
_loaded: set[tuple[int | None, Kernel]] = set()


@contextlib.contextmanager
def first_call(
    device: int | None, m: int, n: int, k: int, transposes: bool, capturing: bool
) -> Iterator[None]:
    """Around the first call of a problem in this process: says beforehand what it will compile, then checks.

    Raises RuntimeError in a capture if a kernel is not loaded yet, JitError if a warm-up is strict and a
    kernel is not compiled yet.
    """
    with first_call_of(Product(n, k), m, device, transposes, capturing):
        yield


@contextlib.contextmanager
def first_call_of(
    product: Product, m: int, device: int | None, transposes: bool, capturing: bool
) -> Iterator[None]:
    """`first_call` for a product of any kind."""
    op, sizes = OP, f"M={m}, N={product.n}, K={product.k}"
    if product.kind != "dense":
        op, _ = monitor.calling()
        sizes = f"{product.kind}, {product.groups} groups, {sizes}"
    needed = _needed(product, m, transposes)
    unloaded = None if needed is None else [x for x in needed if (device, x) not in _loaded]
    if capturing and unloaded != []:
        raise RuntimeError(
            f"{op}: DeepGEMM has not run {sizes} yet and may have to compile or load a kernel for it, "
            "which must not happen while a CUDA graph is captured; warm up (fusion_passes.warmup), or "
            "run the op once with these sizes, before the capture"
        )
    absent = [x for x in unloaded or () if not (directory(x) / "kernel.cubin").exists()]
    for kernel in absent:
        monitor.compiling(op, IMPLEMENTATION, sizes, kernel.label)
    before = _listing() if monitor.armed() else None
    yield
    if before is not None:
        _report_surprises(op, before, {directory(x).name for x in absent}, sizes)
    if unloaded is not None:
        _loaded.update((device, x) for x in unloaded)


def _needed(product: Product, m: int, transposes: bool) -> list[Kernel] | None:
    """The kernels of a problem; None where DeepGEMM is of a version whose choice is not known."""
    if platform.package_version("deep_gemm") not in VERSIONS or is_on("DG_JIT_USE_NVRTC"):
        return None
    import deep_gemm

    kernels = [kernel_of(m, product, deep_gemm.get_num_sms())]
    return [*kernels, transpose_of(m, product)] if transposes else kernels


def _listing() -> set[str]:
    with contextlib.suppress(FileNotFoundError):
        return set(os.listdir(cache() / "cache"))
    return set()


def _report_surprises(op: str, before: set[str], expected: set[str], sizes: str) -> None:
    """Count what DeepGEMM compiled although it was not foreseen; another process may have done it as well."""
    for name in sorted(_listing() - before - expected):
        monitor.record(op, IMPLEMENTATION, sizes, f"{name} (not foreseen)")
