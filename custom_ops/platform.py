"""What this machine has: GPU architecture, CUDA toolkit, optional packages and their versions.

Nothing here runs at import. Every answer is found when it is asked for, without importing the package
that the question is about: `find_spec` and `importlib.metadata` read the file system only.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

# Import name -> names of the distributions that provide it, best first.
DISTRIBUTIONS = {
    "deep_gemm": ("sgl-deep-gemm", "deep-gemm"),
    "flashinfer": ("flashinfer-python",),
    "tvm_ffi": ("apache-tvm-ffi",),
}


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: the path of its `nvcc` and its version, such as "13.0"."""

    nvcc: Path
    version: str


def cuda_capability(device: torch.device | int | None = None) -> tuple[int, int] | None:
    """Compute capability of a GPU, such as (9, 0) for an H100; None where there is no usable GPU.

    device: a CUDA device, its index, or None for the current one. Initialises CUDA when there is a GPU.
    """
    if not torch.cuda.is_available():
        return None
    index = device.index if isinstance(device, torch.device) else device
    return _capability(torch.cuda.current_device() if index is None else index)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the device of x current, where it is a GPU and another one is."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


@functools.cache
def has_package(name: str) -> bool:
    """Whether `import name` would find a package. Does not import it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # sys.modules[name] is None: an import of it would fail
        return False


def has_triton() -> bool:
    """Whether Triton is installed."""
    return has_package("triton")


def has_deep_gemm() -> bool:
    """Whether DeepGEMM (`sgl-deep-gemm`) and the `tvm_ffi` that loads it are installed."""
    return has_package("deep_gemm") and has_package("tvm_ffi")


def triton_interpret() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU (`TRITON_INTERPRET=1`).

    Triton reads the variable when a kernel is declared, so set it before the first Triton import.
    """
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@functools.cache
def package_version(name: str) -> str | None:
    """Version of the distribution that provides `import name`; None when it is not installed."""
    for distribution in (*DISTRIBUTIONS.get(name, ()), name):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def toolkit() -> Toolkit | None:
    """The CUDA toolkit that would compile kernels: `$CUDA_HOME`, then PATH, then /usr/local/cuda."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [Path(home, "bin", "nvcc") for home in homes if home]
    if on_path := shutil.which("nvcc"):
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for nvcc in candidates:
        if not nvcc.is_file():
            continue
        answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=60)
        if found := re.search(r"release (\d+\.\d+)", answer.stdout):
            return Toolkit(nvcc, found.group(1))
    return None
