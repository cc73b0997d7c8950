"""Which kernels DeepGEMM compiles for block-scaled products on Hopper, and how to compile them before it does.

DeepGEMM picks a tile for (M, N, K, multiprocessors), writes a few lines of C++ that instantiate a template for
it, and looks for a folder whose name is a hash of those lines, of the headers that they include, of the compiler
and of its flags. None of M, N and K is in the lines (its default of `compiled_dims`), so kernels are few and
shared by layers; K decides only how many stages fit into shared memory.

All of that is computed here, so a kernel can be compiled without DeepGEMM, without a GPU, and by any process:
nvcc with the same lines and flags, into the folder where DeepGEMM will look. `first_call` checks the prediction
against that folder whenever a problem is new to a process. Facts from DeepGEMM's sources as of `VERSIONS`:
csrc/jit_kernels/heuristics/sm90.hpp (tiles), csrc/jit/{compiler,include_parser}.hpp and csrc/utils/hash.hpp
(names), csrc/jit_kernels/impls/{sm90_fp8_gemm_1d2d,smxx_layout}.hpp (lines).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from custom_ops import platform
from custom_ops.jit import monitor, store
from custom_ops.jit.kernel import Compiler, Kernel, Operand, Problem, Target, powers_and_boundaries

VERSIONS = ("0.1.4",)
OP, IMPLEMENTATION = "block_scaled_mm", "deep_gemm"

BLOCK_K = 128
WGMMA_M = 64
SHARED_MEMORY = 232448
MAX_STAGES = 16
# Bytes per cycle from L2, all multiprocessors together, and from one multiprocessor's L1.
L2_LIMIT, L2_EACH, L1_EACH = 8e6 / 1.3e3, 64.0, 128
TILE_M = (64, 128, 16, 32, 256)
TILE_N = tuple(range(16, 193, 16))
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Tile:
    """One choice of the heuristic."""

    block_m: int
    block_n: int
    cluster_m: int
    cluster_n: int
    stages: int


@functools.lru_cache(maxsize=256)
def tiles(k: int) -> tuple[Tile, ...]:
    """The tiles that DeepGEMM considers for a K, in its order, which decides between equals."""
    found = []
    for cluster_m, cluster_n in ((1, 1), (1, 2), (2, 1)):
        for block_m in TILE_M:
            for block_n in TILE_N:
                over = block_n - BLOCK_K
                if over > 0 and block_n % over and BLOCK_K % over:
                    continue
                if block_m > 128 and block_n > 128:
                    continue
                stages = _stages(block_m, block_n, k)
                if stages >= (3 if block_m * block_n >= 128 * 192 else 4):
                    found.append(Tile(block_m, block_n, cluster_m, cluster_n, stages))
    return tuple(found)


def _stages(block_m: int, block_n: int, k: int) -> int:
    """How many stages of the pipeline fit into shared memory beside the output tile and the scales of b."""
    output = _align(block_m * block_n * 2, 1024)
    barriers = MAX_STAGES * 8 * 2
    scales = _align(-(-k // BLOCK_K) * 4 * (1 if BLOCK_K % block_n == 0 else 2), 8)
    stage = (block_m + block_n) * BLOCK_K + _align(block_m * 4, 128)
    return min((SHARED_MEMORY - output - barriers - scales) // stage, MAX_STAGES)


def _align(size: int, to: int) -> int:
    return -(-size // to) * to


def choose(m: np.ndarray, n: int, k: int, multiprocessors: int) -> np.ndarray:
    """For each M, the index in `tiles(k)` of the tile that DeepGEMM picks: that of the fewest cycles.

    m: int64, [count]. Divisions and roundings are those of its C++: int64, and float32 for the efficiency.
    """
    considered = tiles(k)
    block_m, block_n, cluster_m, cluster_n = (
        np.array([getattr(t, name) for t in considered], np.int64)[:, None]
        for name in ("block_m", "block_n", "cluster_m", "cluster_n")
    )
    blocks = -(-m[None, :] // block_m) * -(-n // block_n)
    waves = -(-blocks // multiprocessors)
    l2_rate = int(min(L2_EACH * multiprocessors, L2_LIMIT))
    l1_rate = L1_EACH * multiprocessors

    output = block_m * block_n * 2
    l2_bytes = k * (block_m // cluster_n + block_n // cluster_m) + output
    # tiles are read into L1, and again by the tensor cores, whose instruction has 64 rows
    l1_bytes = k * (block_m + block_n) + k * (np.maximum(WGMMA_M, block_m) + block_n) + 2 * output
    slowest = np.maximum(l1_bytes * blocks // l1_rate, l2_bytes * blocks // l2_rate)
    efficiency = blocks.astype(np.float32) / (waves * multiprocessors).astype(np.float32)
    cycles = (slowest.astype(np.float32) / efficiency).astype(np.int64)

    cycles[(cluster_m * cluster_n > 1) & (waves <= 1)] = NEVER  # multicast pays from two waves on
    cycles[((block_m == 16) & (m > 16)) | ((block_m == 32) & (m > 32))] = NEVER
    return np.argmin(cycles, axis=0)  # the first of equals


def spec_of(tile: Tile, multiprocessors: int) -> dict[str, int]:
    """What of a tile is compiled in."""
    return {
        "block_m": tile.block_m,
        "block_n": tile.block_n,
        "stages": tile.stages,
        "cluster": tile.cluster_m * tile.cluster_n,
        "multicast_a": int(tile.cluster_n > 1),
        "multiprocessors": multiprocessors,
    }


@functools.lru_cache(maxsize=1 << 14)
def kernel_of(m: int, n: int, k: int, multiprocessors: int) -> Kernel:
    """The kernel that DeepGEMM runs for one problem."""
    index = int(choose(np.array([m], np.int64), n, k, multiprocessors)[0])
    return _kernel(index, m, n, k, multiprocessors)


def _kernel(index: int, m: int, n: int, k: int, multiprocessors: int) -> Kernel:
    spec = spec_of(tiles(k)[index], multiprocessors)
    return Kernel.of(OP, IMPLEMENTATION, spec, m=m, n=n, k=k)


def transpose_of(m: int, n: int, k: int) -> Kernel:
    """The kernel that brings row-major scales of a into the layout that the product reads."""
    groups = -(-k // BLOCK_K)
    return Kernel.of(OP, IMPLEMENTATION, {"transpose_groups": groups}, m=m, n=n, k=k)


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

    def kernels(
        self, problem: Problem, low: int, high: int, mode: str, target: Target
    ) -> Iterable[Kernel]:
        b, a_scale = problem.arguments[2], problem.arguments[1]
        n, k = b.shape
        multiprocessors = _multiprocessors(target)
        if not (isinstance(n, int) and isinstance(k, int)):
            raise ValueError(f"b is {n} x {k}: its sizes must be known to enumerate kernels")
        counts = (
            np.arange(low, high + 1, dtype=np.int64)
            if mode == "full"
            else np.array(powers_and_boundaries(low, high, TILE_M), np.int64)
        )
        chosen = choose(counts, n, k, multiprocessors)
        found: dict[Kernel, None] = {}
        for index, first in zip(*np.unique(chosen, return_index=True)):
            found[_kernel(int(index), int(counts[first]), n, k, multiprocessors)] = None
        if _may_transpose(a_scale):
            found[transpose_of(low, n, k)] = None
        return found

    def environment(self, target: Target) -> Mapping[str, str]:
        return {
            "deep_gemm": f"{platform.package_version('deep_gemm')} {_library_hash()}",
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

        for kernel in kernels:
            transposes = "transpose_groups" in dict(kernel.spec)
            layout = "row_major" if transposes else "column_major_tma"
            deep_gemm.run_once(**dict(kernel.example), scale_layout=layout)


COMPILER = DeepGemm()


def _multiprocessors(target: Target) -> int:
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


# --- the name that DeepGEMM gives to a kernel ---------------------------------------------------------------


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
    if any(_on(f"DG_JIT_{name}") for name in ("DEBUG", "PTXAS_VERBOSE", "PTXAS_CHECK")):
        said.append("--ptxas-options=--verbose,--warn-on-local-memory-usage")
    if _on("DG_JIT_WITH_LINEINFO"):
        said.append("-Xcompiler -rdynamic -lineinfo")
    said += [f"-I{_root() / 'include'}", "--gpu-architecture=sm_90a"]
    said.append("--compiler-options=-fPIC,-O3,-fconcepts,-Wno-deprecated-declarations,-Wno-abi")
    said += ["-O3", "--expt-relaxed-constexpr", "--expt-extended-lambda"]
    return " ".join(said)


def _on(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def code(kernel: Kernel) -> str:
    """The lines that DeepGEMM writes for a kernel, to the byte."""
    spec = dict(kernel.spec)
    if groups := spec.get("transpose_groups"):
        header, values = "smxx_layout", [["512", "64", str(groups)]]
        function = "transpose_fp32"
    else:
        header = function = "sm90_fp8_gemm_1d2d"
        function += "_impl"
        values = _template(spec)
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
    swizzle = next(mode for mode in (128, 64, 32, 16) if block_n * 2 % mode == 0)
    return [
        ["cute::UMMA::Major::K"],
        ["0", "0", "0"],  # M, N and K at run time
        ["1"],
        [str(block_m), str(block_n), str(BLOCK_K)],
        ["128", "128", str(swizzle)],
        [str(spec["stages"])],
        ["128", "128" if block_m <= 64 else "256"],
        [str(spec["cluster"]), "true" if spec["multicast_a"] else "false"],
        [str(spec["multiprocessors"]), "GemmType::Normal"],
        ["cutlass::bfloat16_t"],
        ["epilogue::transform::EpilogueIdentity"],
    ]


def directory(kernel: Kernel) -> Path:
    """The folder in which DeepGEMM looks for a compiled kernel."""
    name = "transpose_fp32" if "transpose_groups" in dict(kernel.spec) else "sm90_fp8_gemm_1d2d"
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
def _library_hash() -> str:
    return hashlib.sha256((_root() / "_C.so").read_bytes()).hexdigest()[:16]


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
    sizes = f"M={m}, N={n}, K={k}"
    needed = _needed(m, n, k, transposes)
    unloaded = None if needed is None else [x for x in needed if (device, x) not in _loaded]
    if capturing and unloaded != []:
        raise RuntimeError(
            f"{OP}: DeepGEMM has not run {sizes} yet and may have to compile or load a kernel for it, "
            "which must not happen while a CUDA graph is captured; warm up (fusion_passes.warmup), or "
            "run the op once with these sizes, before the capture"
        )
    absent = [x for x in unloaded or () if not (directory(x) / "kernel.cubin").exists()]
    for kernel in absent:
        monitor.compiling(OP, IMPLEMENTATION, sizes, kernel.label)
    before = _listing() if monitor.armed() else None
    yield
    if before is not None:
        _report_surprises(before, {directory(x).name for x in absent}, sizes)
    if unloaded is not None:
        _loaded.update((device, x) for x in unloaded)


def _needed(m: int, n: int, k: int, transposes: bool) -> list[Kernel] | None:
    """The kernels of a problem; None where DeepGEMM is of a version whose choice is not known."""
    if platform.package_version("deep_gemm") not in VERSIONS or _on("DG_JIT_USE_NVRTC"):
        return None
    import deep_gemm

    kernels = [kernel_of(m, n, k, deep_gemm.get_num_sms())]
    return [*kernels, transpose_of(m, n, k)] if transposes else kernels


def _listing() -> set[str]:
    with contextlib.suppress(FileNotFoundError):
        return set(os.listdir(cache() / "cache"))
    return set()


def _report_surprises(before: set[str], expected: set[str], sizes: str) -> None:
    """Count what DeepGEMM compiled although it was not foreseen; another process may have done it as well."""
    for name in sorted(_listing() - before - expected):
        monitor.record(OP, IMPLEMENTATION, sizes, f"{name} (not foreseen)")
