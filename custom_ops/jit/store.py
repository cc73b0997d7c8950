"""Which kernels are compiled: one marker file per kernel, written last, and checked against the files it names.

A marker says size and SHA-256 of every file of a kernel. It lies in `jit/<compiler>/<identity>.json` of the
cache directory, where the identity holds the versions, so that another DeepGEMM, toolkit, driver or GPU
architecture finds no marker, and a truncated file does not match its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from custom_ops import cuda_build
from custom_ops.jit.kernel import Compiler, Kernel, Target


class WaitedTooLong(TimeoutError):
    """Another process held a lock for longer than the time-out; the message names it."""


def root() -> Path:
    """Where markers and locks lie."""
    return cuda_build.cache_dir() / "jit"


def marker(compiler: Compiler, kernel: Kernel, target: Target) -> Path:
    return root() / compiler.name / f"{compiler.identity(kernel, target)}.json"


def is_compiled(compiler: Compiler, kernel: Kernel, target: Target) -> bool:
    """Whether a kernel is compiled for a target, and whole. Starts no process."""
    try:
        files = json.loads(marker(compiler, kernel, target).read_text())["files"]
        return all(_matches(Path(path), *wanted) for path, wanted in files.items())
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # absent, or not what we wrote
        return False


def _matches(path: Path, size: int, digest: str) -> bool:
    return path.stat().st_size == size and _sha256(path) == digest


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def mark(compiler: Compiler, kernel: Kernel, target: Target, files: Sequence[Path]) -> None:
    """Say that a kernel is compiled: the last step, and an atomic one."""
    contents = {
        "kernel": kernel.to_json(),
        "environment": dict(compiler.environment(target)),
        "files": {str(path): [path.stat().st_size, _sha256(path)] for path in files},
    }
    write(marker(compiler, kernel, target), json.dumps(contents, indent=1))


def write(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)  # for other users too, who may run what this one built
    os.replace(file.name, path)


@contextlib.contextmanager
def locked(name: str, doing: str, timeout: float) -> Iterator[None]:
    """Hold the lock `name` of this cache. It is the operating system's: who is killed lets go of it.

    doing: what this process holds it for, which is what others read when they wait too long.
    Raises WaitedTooLong, which names the holder: host, process, since when, and what for.
    """
    path = root() / "locks" / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = path.with_suffix(".owner")
    try:
        with FileLock(path, timeout=timeout):
            write(owner, json.dumps(_myself(doing)))
            try:
                yield
            finally:
                owner.unlink(missing_ok=True)
    except Timeout:
        raise WaitedTooLong(
            f"waited {timeout:.0f} s for {_who(owner)}; a larger timeout waits longer"
        ) from None


def now_doing(name: str, doing: str) -> None:
    """Tell those who wait for the lock `name` what its holder, this process, has come to."""
    owner = root() / "locks" / f"{name}.owner"
    with contextlib.suppress(OSError, ValueError):
        write(owner, json.dumps({**json.loads(owner.read_text()), "doing": doing}))


def is_free(name: str) -> bool:
    """Whether nobody holds the lock `name` at this moment."""
    lock = FileLock(root() / "locks" / f"{name}.lock", timeout=0)
    try:
        with lock:
            return True
    except Timeout:
        return False
    except OSError:  # no folder yet, hence no holder
        return True


def _myself(doing: str) -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "rank": os.environ.get("LOCAL_RANK", ""),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "doing": doing,
    }


def _who(owner: Path) -> str:
    try:
        who = json.loads(owner.read_text())
        rank = f" (local rank {who['rank']})" if who["rank"] else ""
        return (
            f"process {who['pid']}{rank} on {who['host']}, which since {who['since']} "
            f"is compiling {who['doing']}"
        )
    except (OSError, ValueError, KeyError):
        return f"a process that did not say who it is (it holds {owner.with_suffix('.lock')})"
