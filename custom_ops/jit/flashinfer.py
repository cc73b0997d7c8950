"""FlashInfer's modules as kernels of a warm-up: libraries of CUTLASS kernels that it builds with ninja on first use.

What FlashInfer compiles after that for every shape by itself (NVRTC, in its block-scaled FP8 products) nobody outside
of it can name: those who call it say so in the plan.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from custom_ops import monitor, platform
from custom_ops.jit import tracing
from custom_ops.jit.kernel import Compiler, Kernel, Problem, Target

NAME = "flashinfer"
MODULES = {
    "fused_moe_90": "flashinfer.jit.fused_moe:gen_cutlass_fused_moe_sm90_module",
    "fp8_blockscale_gemm_90": "flashinfer.jit.gemm:gen_fp8_blockscale_gemm_sm90_module",
}
"""Names of modules, each with the function that describes it (flashinfer-python 0.6.6)."""
_PATH = "library.txt"
_BUILD = """
import importlib, os, pathlib, sys
generator, arch, answer = sys.argv[1:]
os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", arch)
module, _, name = generator.partition(":")
spec = getattr(importlib.import_module(module), name)()
if not spec.is_aot:
    spec.build(verbose=False)
pathlib.Path(answer).write_text(str(spec.get_library_path()))
"""


def note(trace: tracing.Trace, op: str, module: str, uncovered: str = "") -> None:
    """Say in a trace that a call needs a module, and what FlashInfer compiles besides, if anything."""
    if trace.can(NAME):
        trace.add(Kernel.of(op, NAME, {"module": module}))
    if uncovered:
        trace.uncovered(uncovered)


def first_call(op: str, module: str) -> None:
    """Tell the monitor of a module that FlashInfer has yet to build. Raises JitError after a strict warm-up."""
    if not monitor.armed():
        return
    from flashinfer.jit import env

    places = (env.FLASHINFER_AOT_DIR, env.FLASHINFER_JIT_DIR)
    if not any((Path(place) / module / f"{module}.so").exists() for place in places):
        _, sizes = monitor.calling()
        monitor.compiling(op, NAME, sizes, module)


class Modules(Compiler):
    """Builds modules where FlashInfer looks for them, under its own lock and in its own cache."""

    name = NAME
    memory = 8 << 30  # ninja runs several nvcc, each over CUTLASS

    def version(self) -> str:
        return platform.package_version("flashinfer") or ""

    def why_not(self, target: Target) -> str | None:
        if not target.arch.startswith("9.0"):
            return f"FlashInfer's modules here are those for Hopper, the target is {target.arch}"
        if not platform.has_package("flashinfer"):
            return "flashinfer is not installed (pip install flashinfer-python)"
        return None

    def knows(self, op: str) -> bool:
        return False  # the ops are traced, and call `note`

    def kernels(
        self, problem: Problem, low: int, high: int, mode: str, target: Target
    ) -> Iterable[Kernel]:
        raise ValueError(f"{problem.op} on FlashInfer is traced")

    def environment(self, target: Target) -> Mapping[str, str]:
        toolkit = platform.toolkit()
        return {
            "flashinfer": self.version(),
            "torch": platform.package_version("torch") or "",
            "toolkit": toolkit.version if toolkit else "",
            "arch": target.arch,
            "cache": os.environ.get("FLASHINFER_WORKSPACE_BASE", ""),
        }

    def command(self, kernel: Kernel, folder: Path, target: Target) -> Sequence[str]:
        generator = MODULES[kernel["module"]]
        return [sys.executable, "-c", _BUILD, generator, target.arch, str(folder / _PATH)]

    def publish(self, kernel: Kernel, folder: Path, target: Target) -> Sequence[Path]:
        return [Path((folder / _PATH).read_text())]


COMPILER = Modules()
