"""The names that DeepGEMM gives to compiled kernels: nvcc, its flags, the lines of a kernel, and where it looks for it.

A kernel's folder is named by a hash of those lines, of the headers that they include, of the compiler and of its
flags. Facts from DeepGEMM's sources as of `deep_gemm_tiles.VERSIONS`: csrc/jit/{compiler,include_parser}.hpp and
csrc/utils/hash.hpp (names), csrc/jit_kernels/impls/{sm90_fp8_gemm_1d2d,smxx_layout}.hpp (lines).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from custom_ops import platform
from custom_ops.jit import store
from custom_ops.jit.deep_gemm_tiles import BLOCK_K
from custom_ops.jit.kernel import Kernel

# What DeepGEMM calls a kernel of each kind, and the template's name for the kind.
_KINDS = {
    "dense": ("sm90_fp8_gemm_1d2d", "Normal"),
    "contiguous": ("sm90_m_grouped_fp8_gemm_contiguous_1d2d", "MGroupedContiguous"),
    "masked": ("sm90_fp8_m_grouped_gemm_masked_1d2d", "MGroupedMasked"),
}


def package() -> Path | None:
    """DeepGEMM's folder; does not import it."""
    if not platform.has_package("deep_gemm"):
        return None
    found = importlib.util.find_spec("deep_gemm")
    return Path(os.path.abspath(found.origin)).parent if found and found.origin else None


def _root() -> Path:
    root = package()
    if root is None:
        raise RuntimeError("deep_gemm is not installed (pip install sgl-deep-gemm apache-tvm-ffi)")
    return root


def cache() -> Path:
    """`DG_JIT_CACHE_DIR`, or `.deep_gemm` in the home directory."""
    return Path(
        os.environ.get("DG_JIT_CACHE_DIR") or Path(os.environ.get("HOME", ""), ".deep_gemm")
    )


def cuda_home() -> Path:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if given := os.environ.get(name):
            return Path(given)
    if found := shutil.which("nvcc"):
        return Path(found).parent.parent
    return Path("/usr/local/cuda")


def nvcc() -> Path:
    """The nvcc that DeepGEMM calls."""
    return Path(os.environ.get("DG_JIT_NVCC_COMPILER") or cuda_home() / "bin" / "nvcc")


def signature() -> str:
    """The compiler as DeepGEMM names it, such as NVCC13.0."""
    return f"NVCC{_version(nvcc())}"


@functools.cache
def _version(compiler: Path) -> str:
    """The version of an nvcc: asked once, and then remembered on disk for as long as the file is the same.

    A warm start then runs no compiler, not even for its version.
    """
    state = compiler.stat()
    key = f"{os.path.realpath(compiler)} {state.st_size} {state.st_mtime_ns}"
    memory = store.root() / "nvcc" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        return str(json.loads(memory.read_text())["version"])
    answer = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60)
    found = re.search(r"release (\d+\.\d+)", answer.stdout)
    if found is None:
        raise RuntimeError(f"{compiler} --version says no version: {answer.stdout}{answer.stderr}")
    store.write(memory, json.dumps({"version": found.group(1)}))
    return found.group(1)


def flags() -> str:
    """The flags that DeepGEMM gives to nvcc, in its order: they are part of a kernel's name."""
    said = ["-std=c++" + os.environ.get("DG_JIT_CPP_STANDARD", "20")]
    said += ["--diag-suppress=39,161,174,177,186,940", "--ptxas-options=--register-usage-level=10"]
    if any(is_on(f"DG_JIT_{name}") for name in ("DEBUG", "PTXAS_VERBOSE", "PTXAS_CHECK")):
        said.append("--ptxas-options=--verbose,--warn-on-local-memory-usage")
    if is_on("DG_JIT_WITH_LINEINFO"):
        said.append("-Xcompiler -rdynamic -lineinfo")
    said += [f"-I{_root() / 'include'}", "--gpu-architecture=sm_90a"]
    said.append("--compiler-options=-fPIC,-O3,-fconcepts,-Wno-deprecated-declarations,-Wno-abi")
    said += ["-O3", "--expt-relaxed-constexpr", "--expt-extended-lambda"]
    return " ".join(said)


def is_on(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def code(kernel: Kernel) -> str:
    """The lines that DeepGEMM writes for a kernel, to the byte."""
    spec = dict(kernel.spec)
    if groups := spec.get("transpose_groups"):
        header, values = "smxx_layout", [["512", "64", str(groups)]]
        function = "transpose_fp32"
    else:
        header, values = "sm90_fp8_gemm_1d2d", _template(spec)
        function = f"{header}_impl"
    arguments = ",\n        ".join(", ".join(line) for line in values)
    include = f"deep_gemm/impls/{header}.cuh"
    return (
        f"// Includes' hash value: {_include_hash(_root() / 'include', include)}\n"
        f"\n#include <{include}>\n\nusing namespace deep_gemm;\n\n"
        "static void __instantiate_kernel() {\n"
        f"    auto ptr = reinterpret_cast<void*>(&{function}<\n        {arguments}\n    >);\n}};\n"
    )


def _template(spec: Mapping[str, Any]) -> list[list[str]]:
    """The arguments of the product's template, line by line."""
    block_m, block_n = spec["block_m"], spec["block_n"]
    kind = spec.get("kind", "dense")
    swizzle = next(mode for mode in (128, 64, 32, 16) if block_n * 2 % mode == 0)
    return [
        ["cute::UMMA::Major::K"],
        # M is known at run time only; so are N and K, unless the product is grouped
        ["0", str(spec.get("n", 0)), str(spec.get("k", 0))],
        [str(spec.get("groups", 1))],
        [str(block_m), str(block_n), str(BLOCK_K)],
        ["128", "128", str(swizzle)],
        [str(spec["stages"])],
        ["128", "128" if block_m <= 64 else "256"],
        [str(spec["cluster"]), "true" if spec["multicast_a"] else "false"],
        [str(spec["multiprocessors"]), f"GemmType::{_KINDS[kind][1]}"],
        ["cutlass::bfloat16_t"],
        ["epilogue::transform::EpilogueIdentity"],
    ]


def directory(kernel: Kernel) -> Path:
    """The folder in which DeepGEMM looks for a compiled kernel."""
    spec = dict(kernel.spec)
    transposes = "transpose_groups" in spec
    name = "transpose_fp32" if transposes else _KINDS[spec.get("kind", "dense")][0]
    text = f"{name}$${signature()}$${flags()}$${code(kernel)}"
    return cache() / "cache" / f"kernel.{name}.{digest(text.encode())}"


def digest(data: bytes) -> str:
    """DeepGEMM's hash: two 64-bit FNV-1a sums of other seeds, each through the finalizer of SplitMix64."""
    return "".join(
        f"{_finalize(_fnv1a(data, seed)):016x}" for seed in (0xC6A4A7935BD1E995, 0x9E3779B97F4A7C15)
    )


_64_BITS = (1 << 64) - 1


def _fnv1a(data: bytes, state: int) -> int:
    for byte in data:
        state = (state ^ byte) * 0x100000001B3 & _64_BITS
    return state


def _finalize(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _64_BITS
    return z ^ z >> 31


@functools.cache
def _include_hash(include: Path, header: str) -> str:
    return digest(f"{_file_hash(include, header)}$".encode())


@functools.cache
def _file_hash(include: Path, header: str) -> str:
    """Hash of a header and of those headers of DeepGEMM that it includes."""
    text = (include / header).read_bytes()
    parts = b""
    for line in re.findall(rb'#\s*include\s*[<"][^>"]+[>"]', text):
        name = line.partition(b"<")[2].rstrip(b">").decode()
        if name.startswith("deep_gemm"):
            parts += f"{_file_hash(include, name)}$".encode()
    return digest(parts + f"#{digest(text)}".encode())


@functools.cache
def library_hash() -> str:
    return hashlib.sha256((_root() / "_C.so").read_bytes()).hexdigest()[:16]
