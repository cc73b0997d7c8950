"""Compiles many kernels at once: a process each, bounded by cores and memory, each kernel once for all.

On a node, one process holds the node's lock and compiles all that is missing; the others wait for it and then
find everything there. Below it a lock per kernel keeps two nodes apart that share the cache. A kernel is
compiled into a private folder, published by a rename, and marked last: whatever is killed or interrupted
leaves a cache in which every marked kernel is whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from custom_ops.jit import store
from custom_ops.jit.kernel import Compiler, Kernel, Target

# (kernels done, kernels in all, what was done last)
Progress = Callable[[int, int, str], None]
TIMEOUT = 1800.0
# How long the other ranks of a node leave the lock to rank 0, which is the one that prints progress.
HEAD_START = 1.0


class CompileError(RuntimeError):
    """Kernels that did not compile: the message has each with its command and the end of its output."""


@dataclass
class Outcome:
    """What one call did. seconds: of each compilation, by the kernel's label, as its process ran it."""

    compiled: list[Kernel] = field(default_factory=list)
    found: list[Kernel] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    workers: int = 0
    wall: float = 0.0


def compile_all(
    kernels: Sequence[Kernel],
    compilers: Mapping[str, Compiler],
    target: Target,
    *,
    workers: int | None = None,
    timeout: float = TIMEOUT,
    progress: Progress | None = None,
) -> Outcome:
    """Compile those kernels that are not compiled yet, in parallel, each once however many processes ask.

    compilers: by the name of the implementation. workers: processes at once; what cores and free memory
    allow if None. timeout: seconds to wait for another process. Where everything is compiled, no process is
    started and no lock is taken.

    Raises CompileError when kernels failed (after all the others are done), WaitedTooLong, and
    KeyboardInterrupt, which ends the running compilations and keeps what is done.
    """
    start = time.monotonic()
    deadline = start + timeout
    outcome = Outcome()
    distinct = list(dict.fromkeys(kernels))
    missing = [k for k in distinct if not _is_compiled(k, compilers, target)]
    missing = [k for k in missing if not _adopt(k, compilers, target)]
    if missing:
        lock = f"node-{socket.gethostname()}"
        _let_rank_0_go_first(lock)
        what = f"{len(missing)} kernels"
        with store.locked(lock, what, _left(deadline)):
            missing = [k for k in missing if not _is_compiled(k, compilers, target)]
            _Build(compilers, target, deadline, lock, progress, outcome, len(distinct)).run(
                missing, workers
            )
    outcome.found = [k for k in distinct if k not in set(outcome.compiled)]
    outcome.wall = time.monotonic() - start
    return outcome


def _is_compiled(kernel: Kernel, compilers: Mapping[str, Compiler], target: Target) -> bool:
    return store.is_compiled(compilers[kernel.implementation], kernel, target)


def _adopt(kernel: Kernel, compilers: Mapping[str, Compiler], target: Target) -> bool:
    """Mark a kernel that is compiled already, but not by a warm-up."""
    compiler = compilers[kernel.implementation]
    files = compiler.existing(kernel, target)
    if files:
        store.mark(compiler, kernel, target, files)
    return bool(files)


def _let_rank_0_go_first(lock: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return
    end = time.monotonic() + HEAD_START
    while time.monotonic() < end and store.is_free(lock):
        time.sleep(0.05)


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def worker_count(kernels: int, memory: int) -> int:
    """How many compilations run at once: no more than cores, than fit into free memory, than there are."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, free_memory() // memory, kernels))


def free_memory() -> int:
    """Bytes that this process may still use: what the system has free, or its control group if less."""
    free = 1 << 62
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = int(next(x for x in lines if x.startswith("MemAvailable:")).split()[1]) << 10
    with contextlib.suppress(OSError, ValueError):  # no limit reads "max"
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        free = min(free, int((group / "memory.max").read_text()) - used)
    return max(free, 0)


class _Build:
    """One run over the missing kernels, by the process that holds the node's lock."""

    def __init__(
        self,
        compilers: Mapping[str, Compiler],
        target: Target,
        deadline: float,
        lock: str,
        progress: Progress | None,
        outcome: Outcome,
        total: int,
    ) -> None:
        self.compilers, self.target, self.deadline = compilers, target, deadline
        self.lock, self.progress, self.outcome, self.total = lock, progress, outcome, total
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.stopped = False
        self.guard = threading.Lock()

    def run(self, missing: Sequence[Kernel], workers: int | None) -> None:
        if not missing:
            return
        memory = max(self.compilers[k.implementation].memory for k in missing)
        self.outcome.workers = workers or worker_count(len(missing), memory)
        self._report(self.total - len(missing), "")
        failures: list[str] = []
        pool = ThreadPoolExecutor(self.outcome.workers, thread_name_prefix="jit")
        try:  # from the first job on: Ctrl-C may come before the last one
            jobs: dict[Future[float | None], Kernel] = {
                pool.submit(self._one, kernel): kernel for kernel in missing
            }
            self._collect(jobs, failures, self.total - len(missing))
        except BaseException:  # Ctrl-C above all: the children are in sessions of their own
            self._stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        if failures:
            raise CompileError(
                f"{len(failures)} of {len(missing)} kernels failed to compile:\n"
                + "\n".join(failures)
            )

    def _collect(
        self, jobs: dict[Future[float | None], Kernel], failures: list[str], done: int
    ) -> None:
        pending = set(jobs)
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for job in finished:
                kernel = jobs[job]
                try:
                    seconds = job.result()
                except store.WaitedTooLong:
                    raise
                except (CompileError, OSError) as error:
                    failures.append(str(error))
                    continue
                if seconds is not None:
                    self.outcome.compiled.append(kernel)
                    self.outcome.seconds[kernel.label] = seconds
                done += 1
                self._report(done, kernel.label)
                left = [jobs[each].label for each in pending]
                store.now_doing(self.lock, ", ".join(left[:3]) + (", ..." if left[3:] else ""))

    def _report(self, done: int, what: str) -> None:
        if self.progress:
            self.progress(done, self.total, what)

    def _one(self, kernel: Kernel) -> float | None:
        """Compile, publish and mark one kernel; its seconds, or None if another node did it meanwhile."""
        compiler = self.compilers[kernel.implementation]
        identity = compiler.identity(kernel, self.target)
        with store.locked(identity, kernel.label, _left(self.deadline)):
            if store.is_compiled(compiler, kernel, self.target):
                return None
            parent = compiler.private(kernel) or store.root() / "private"
            parent.mkdir(parents=True, exist_ok=True)
            for leaving in parent.glob(f"{identity}-*"):  # of writers that were killed
                shutil.rmtree(leaving, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(dir=parent, prefix=f"{identity}-"))
            try:
                start = time.monotonic()
                self._execute(compiler.command(kernel, folder, self.target), kernel)
                files = compiler.publish(kernel, folder, self.target)
                store.mark(compiler, kernel, self.target, files)
                return time.monotonic() - start
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _execute(self, command: Sequence[str], kernel: Kernel) -> None:
        with self.guard:
            if self.stopped:
                raise CompileError(f"{kernel.label}: stopped")
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running[child.pid] = child
        output, _ = child.communicate()
        with self.guard:
            del self.running[child.pid]
        if child.returncode:
            raise CompileError(
                f"{kernel.label}: exit code {child.returncode}\n  command: {' '.join(command)}\n"
                + output.decode(errors="replace")[-4000:]
            )

    def _stop(self) -> None:
        with self.guard:
            self.stopped = True
            for pid in self.running:  # each leads a group of its own: what it started ends with it
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
