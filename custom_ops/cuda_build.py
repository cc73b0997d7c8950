"""Builds the CUDA C++ kernels of `csrc/` once, and loads them as the ops of `custom_ops_cuda`.

A build is one shared library for one GPU architecture, in a directory of the cache whose name is its
key: the architecture, torch's and the toolkit's versions, and a hash of the sources and the flags.
The library holds its own CUDA runtime and talks to torch through the stable ABI only.

Any number of processes may start cold at once: the first takes a lock and compiles into a private
directory, which is checksummed and then renamed into place; the others wait and find it there. The lock is
the operating system's, so that a builder that is killed lets go of it, and its leavings are removed by the
next. A library that does not match its checksum is built again.

Importing this module compiles nothing and does not initialise CUDA.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from custom_ops import monitor, platform

LIBRARY = "custom_ops_cuda.so"
MANIFEST = "manifest.json"
CSRC = Path(__file__).parent / "csrc"

# What the sources are written for; an architecture here has been compiled in the tests.
TESTED_ARCHS = ("8.0", "9.0a", "10.0a")
MINIMUM_CAPABILITY = (8, 0)

# No --use_fast_math: it flushes subnormals and replaces divisions, and codes would differ from eager's.
# TORCH_TARGET_VERSION is 2.11, the oldest torch that is supported: newer headers then offer no more.
FLAGS = (
    "-O3",
    "-std=c++17",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
)

Progress = Callable[[int, int, str], None]


class BuildError(RuntimeError):
    """A compiler failed; the message holds its command and its output."""


@dataclass(frozen=True)
class Status:
    """What the CUDA C++ kernels have here.

    nvcc, toolkit: the compiler and its version, None without one. cache_dir: where builds go. arch: of
    the current GPU, None without one. built: names of the valid builds for these sources and this torch.
    why_not: why the kernels cannot be used here, None if they can.
    """

    nvcc: Path | None
    toolkit: str | None
    cache_dir: Path
    arch: str | None
    built: tuple[str, ...]
    why_not: str | None


def sources() -> list[Path]:
    """Every file that a build depends on."""
    return sorted(p for p in CSRC.iterdir() if p.suffix in (".cu", ".cuh", ".h", ".cpp"))


def cache_dir() -> Path:
    """`CUSTOM_OPS_CACHE_DIR`, or `custom_ops` in the user's cache directory."""
    if given := os.environ.get("CUSTOM_OPS_CACHE_DIR"):
        return Path(given).expanduser().absolute()
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "custom_ops"
    try:
        return Path.home() / ".cache" / "custom_ops"
    except RuntimeError:  # a user without a home, as in a container that runs under any number
        return Path(tempfile.gettempdir()) / f"custom_ops-{os.getuid()}"


def cannot_write(folder: Path) -> str | None:
    """Why nothing can be kept in a folder, which is made where it does not exist; None if something can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror}); set CUSTOM_OPS_CACHE_DIR"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} cannot be written to; set CUSTOM_OPS_CACHE_DIR"
    return None


def current_arch() -> str | None:
    """The architecture of the current GPU as nvcc spells it, such as "9.0a"; None without a GPU."""
    capability = platform.cuda_capability()
    if capability is None:
        return None
    major, minor = capability
    return f"{major}.{minor}" + ("a" if major >= 9 else "")


def why_not() -> str | None:
    """Why the CUDA C++ kernels cannot be used here; None if they can (they may still have to be built)."""
    capability, arch = platform.cuda_capability(), current_arch()
    if capability is None or arch is None:
        return "there is no CUDA GPU here"
    if capability < MINIMUM_CAPABILITY:
        return f"they need compute capability 8.0 or newer, this GPU has {arch}"
    if platform.toolkit() is None and _find(arch) is None:
        return (
            "there is no nvcc to build them with (set CUDA_HOME, or put nvcc on PATH), and "
            f"{cache_dir()} holds no build for {arch} and torch {torch.__version__}"
        )
    if (problem := cannot_write(cache_dir())) is not None and _find(arch) is None:
        return problem
    return None


def status() -> Status:
    """What there is to build with, and what has been built."""
    toolkit = platform.toolkit()
    return Status(
        nvcc=toolkit.nvcc if toolkit else None,
        toolkit=toolkit.version if toolkit else None,
        cache_dir=cache_dir(),
        arch=current_arch(),
        built=tuple(p.name for p in sorted(cache_dir().glob(f"sm_*-{_key()}")) if _valid(p)),
        why_not=why_not(),
    )


def load() -> None:
    """Load the kernels for the current GPU, building them first if there is no valid build.

    Raises RuntimeError with the reason if they cannot be used here, BuildError if compiling fails, JitError if they
    would be built after a strict warm-up.
    """
    if reason := why_not():
        raise RuntimeError(f"the CUDA C++ kernels cannot be used: {reason}")
    arch = current_arch()
    assert arch is not None
    built = _find(arch)
    if built is None:
        op, sizes = monitor.calling()
        monitor.compiling(op, "cuda", sizes, _name(arch))
        built = build([arch]) / _name(arch)
    _load(built)


@functools.cache
def _load(directory: Path) -> None:
    torch.ops.load_library(directory / LIBRARY)


def build(archs: Sequence[str] | None = None, progress: Progress | None = None) -> Path:
    """Build what is missing for these architectures ("8.0", "9.0a", ...), and return the cache directory.

    archs: those of the current GPU if None. progress: called with (steps done, steps in total, what was
    done last). Raises RuntimeError without nvcc or without a GPU to take the architecture from,
    ValueError for a misspelt architecture, BuildError with the compiler's output if it fails.
    """
    if archs is None:
        arch = current_arch()
        if arch is None:
            raise RuntimeError(
                "archs: there is no GPU here to take it from; name some, such as '9.0a'"
            )
        archs = [arch]
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d[af]?", arch):
            raise ValueError(f"archs: {arch!r} is no architecture; accepted: '8.0', '9.0a', ...")
    if platform.toolkit() is None:
        raise RuntimeError("there is no nvcc to build with: set CUDA_HOME, or put nvcc on PATH")

    compiled = [p for p in sources() if p.suffix in (".cu", ".cpp")]
    missing = [arch for arch in dict.fromkeys(archs) if not _valid(cache_dir() / _name(arch))]
    steps = _Steps(len(missing) * (len(compiled) + 1), progress)
    cache_dir().mkdir(parents=True, exist_ok=True)
    for arch in missing:
        target = cache_dir() / _name(arch)
        with FileLock(f"{target}.lock"):
            if _valid(target):  # another process built it while this one waited
                steps.done(len(compiled) + 1, f"{arch} (by another process)")
            else:
                _publish(target, arch, compiled, steps)
    return cache_dir()


class _Steps:
    def __init__(self, total: int, progress: Progress | None):
        self.count, self.total, self.progress = 0, total, progress

    def done(self, steps: int, what: str) -> None:
        self.count += steps
        if self.progress:
            self.progress(self.count, self.total, what)


def _key() -> str:
    """What the content of a build depends on, its architecture aside. Ends in the toolkit's version.

    Without a toolkit any version will do, if it was built ahead: a `*`, for a glob.
    """
    digest = hashlib.sha256("\0".join(FLAGS).encode())
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    toolkit = platform.toolkit()
    version = toolkit.version if toolkit else "*"
    return f"{digest.hexdigest()[:16]}-torch{torch.__version__}-cuda{version}"


def _name(arch: str) -> str:
    return f"sm_{arch.replace('.', '')}-{_key()}"


def _find(arch: str) -> Path | None:
    """A valid build for an architecture, or None."""
    return next((p for p in sorted(cache_dir().glob(_name(arch)), reverse=True) if _valid(p)), None)


def _valid(directory: Path) -> bool:
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        return manifest["sha256"] == _checksum(directory / LIBRARY)
    except (OSError, ValueError, KeyError):  # absent, truncated, or not what we wrote
        return False


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _publish(target: Path, arch: str, compiled: Sequence[Path], steps: _Steps) -> None:
    """Compile into a private directory and rename it to `target`. The caller holds the lock."""
    for leaving in target.parent.glob(f".{target.name}-*"):  # of builders that were killed
        shutil.rmtree(leaving, ignore_errors=True)
    private = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        compile_library(private / LIBRARY, arch, compiled, steps.done)
        manifest = {
            "sha256": _checksum(private / LIBRARY),
            "arch": arch,
            "torch": torch.__version__,
        }
        (private / MANIFEST).write_text(json.dumps(manifest))
        shutil.rmtree(target, ignore_errors=True)  # a build that was found invalid
        os.replace(private, target)
    finally:
        shutil.rmtree(private, ignore_errors=True)


def compile_library(
    library: Path,
    arch: str,
    compiled: Sequence[Path],
    done: Callable[[int, str], None] = lambda steps, what: None,
) -> None:
    """Compile each source in parallel and link them into one shared library. Raises BuildError."""
    objects = {source: library.parent / f"{source.name}.o" for source in compiled}
    with ThreadPoolExecutor(len(objects)) as pool:
        jobs = {
            pool.submit(_run, [*_nvcc(arch), "-c", str(source), "-o", str(target)]): source
            for source, target in objects.items()
        }
        for job in as_completed(jobs):
            job.result()
            done(1, f"{jobs[job].name} for {arch}")
    root = Path(torch.__file__).parent / "lib"
    torch_libraries = [p for p in ("torch_cpu", "torch_cuda") if (root / f"lib{p}.so").exists()]
    # torch's libraries are in the process before this one, so that it needs no path to them. The CUDA
    # runtime is linked in (nvcc's default): no soname of another toolkit version can get in the way.
    link = [f"-L{root}", *(f"-l{name}" for name in torch_libraries)]
    _run([*_nvcc(arch), "-shared", "-o", str(library), *map(str, objects.values()), *link])
    for target in objects.values():
        target.unlink()
    done(1, f"{library.name} for {arch}")


def _nvcc(arch: str) -> list[str]:
    toolkit = platform.toolkit()
    assert toolkit is not None
    number = arch.replace(".", "")
    include = Path(torch.__file__).parent / "include"
    return [
        str(toolkit.nvcc),
        *FLAGS,
        f"-gencode=arch=compute_{number},code=sm_{number}",
        "-isystem",
        str(include),
    ]


def _run(command: list[str]) -> None:
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if answer.returncode:
        raise BuildError(
            f"building the CUDA kernels failed with exit code {answer.returncode}\n"
            f"  command: {' '.join(command)}\n{answer.stdout[-8000:]}"
        )
