"""What DeepGEMM's first call of a problem in a process compiles or loads: said beforehand, and checked after it.

It compares what `deep_gemm_names` foresees with the folder where DeepGEMM compiles.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from custom_ops import monitor, platform
from custom_ops.jit.deep_gemm_names import cache, directory, is_on
from custom_ops.jit.deep_gemm_tiles import (
    IMPLEMENTATION,
    OP,
    VERSIONS,
    Product,
    kernel_of,
    transpose_of,
)
from custom_ops.jit.kernel import Kernel, Target

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


def multiprocessors_of(target: Target) -> int:
    """How many DeepGEMM divides the work among: all of the GPU's, unless its user said otherwise."""
    if (deep_gemm := sys.modules.get("deep_gemm")) is not None:
        return int(deep_gemm.get_num_sms())
    return target.multiprocessors
