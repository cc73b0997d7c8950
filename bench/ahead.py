"""Compiles the graphs of a bench before any of them is timed, in several processes.

Compiling is most of a bench's time, needs one core and hardly the GPU; timing needs the GPU for itself. So the graphs
are compiled first, side by side, into Inductor's cache on the disk, which every process of a user shares, and the
process that times finds them there. What it does not find it compiles itself: nothing here changes a result.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copyreg
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from bench.case import Case

if TYPE_CHECKING:
    from bench.measure import Plan

LARGE = 1 << 30
"""Bytes of traffic from which on only LARGE_AT_A_TIME cases are built side by side: their inputs fill the GPU."""
LARGE_AT_A_TIME = 3

_large: Any = None
"""In a worker: the semaphore of those cases."""
_turn: Any = None
"""In a worker: the lock of the GPU."""
_lent: tuple[torch.Tensor, ...] = ()
"""Random values on the GPU, which all processes read: see `lend`."""


@dataclass
class Done:
    """What came of it: graphs compiled, the first lines of errors, and the seconds that all of it took."""

    compiled: int = 0
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        said = f"compiled {self.compiled} ahead in {self.seconds:.0f} s"
        return f"{said}, {len(self.errors)} not: {self.errors[0]}" if self.errors else said


def run(
    tasks: Sequence[Callable[[], Any]],
    processes: int = 0,
    seconds: float = 120.0,
    got: Callable[[Any], None] | None = None,
) -> Done:
    """Call each task in one of the processes, for no longer than `seconds`; what is left then is not called.

    tasks: functions of modules, or partials of them, which are sent to the processes by name.
    processes: 0 stands for one on each core but one.
    got: takes what a task returned, here, as soon as it is there.
    """
    _make_keys_alike()
    done = Done()
    begun = time.monotonic()
    count = processes or max(1, len(os.sched_getaffinity(0)) - 1)
    context = multiprocessing.get_context("spawn")  # a forked process cannot use the parent's GPU
    pool = concurrent.futures.ProcessPoolExecutor(
        min(count, max(1, len(tasks))),
        mp_context=context,
        initializer=_begin,
        initargs=(context.Semaphore(LARGE_AT_A_TIME), context.Lock(), _lent),
    )
    futures = [pool.submit(task) for task in tasks]
    try:
        for future in concurrent.futures.as_completed(futures, timeout=seconds):
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                done.errors.append(f"{type(error).__name__}: {error}".splitlines()[0][:400])
                break
            if error is None:
                done.compiled += 1
                if got is not None:
                    got(future.result())
            else:
                done.errors.append(f"{type(error).__name__}: {error}".splitlines()[0][:400])
    except concurrent.futures.TimeoutError:  # the built-in one from Python 3.11 on
        done.errors.append(f"{sum(not each.done() for each in futures)} left after {seconds:g} s")
    finally:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.join(max(0.0, min(5.0, begun + seconds + 5.0 - time.monotonic())))
            if worker.is_alive():
                worker.kill()
                worker.join()
    done.seconds = time.monotonic() - begun
    return done


def lend(values: Sequence[torch.Tensor]) -> None:
    """Give these to every process of later calls of `run`: to draw the inputs of a large case takes longer than it."""
    global _lent
    _lent = tuple(values)


def lent() -> tuple[torch.Tensor, ...]:
    """What was lent to this process, or by it."""
    return _lent


def _begin(large: Any, turn: Any, values: tuple[torch.Tensor, ...]) -> None:
    global _large, _turn
    _large, _turn = large, turn
    lend(values)
    sys.stdout = sys.stderr  # what is printed here is no table
    import torch._inductor.compile_fx  # noqa: F401
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # there is a process for each core already
    _make_keys_alike()
    gc.freeze()  # a collection passes over what was imported


def _make_keys_alike() -> None:
    """Let a graph have one key in all processes that came here.

    A key is a hash of pickles, and a memory format is pickled as a name in the first module in `sys.modules` that has
    `torch`: that may be the script that was started, so a process of another script would find nothing. PyTorch says
    the same of its layouts in this way.
    """
    copyreg.pickle(torch.memory_format, _pickled)


def _pickled(memory_format: torch.memory_format) -> tuple[Callable[..., Any], tuple[str]]:
    return _memory_format, (str(memory_format).removeprefix("torch."),)


def _memory_format(name: str) -> Any:
    return getattr(torch, name)


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    pass


@contextlib.contextmanager
def unlaunched() -> Iterator[None]:
    """Inductor's Triton kernels are compiled and not launched: what a launch costs, here others would wait for.

    It is a launch that picks one of several tiles by their times, and stores it: that has to happen alone on the GPU.
    Nor are grouped products, which would read as offsets what nobody has written, and end the process.
    """
    import torch._inductor.kernel.mm_grouped  # noqa: F401 (it is what knows of them)
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._inductor.select_algorithm import extern_kernels

    with (
        mock.patch.object(CachingAutotuner, "run", _nothing),
        mock.patch.object(extern_kernels, "_grouped_mm", _unwritten),
    ):
        yield


def _unwritten(rows: torch.Tensor, weight: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
    return rows.new_empty(rows.shape[0], weight.shape[2])


def turn() -> contextlib.AbstractContextManager[Any]:
    """To hold while the GPU is used by a process that times on it: in a worker, one of them at a time."""
    return contextlib.nullcontext() if _turn is None else _turn


def gate(case: Case) -> contextlib.AbstractContextManager[Any]:
    """To hold while there are results of a case on the GPU: in a worker, few of them at a time if it is large."""
    return _large if _large is not None and case.moved_bytes > LARGE else contextlib.nullcontext()


@contextlib.contextmanager
def room(case: Case) -> Iterator[None]:
    """Waits until the inputs of a case surely fit on the GPU, and gives their memory back after it."""
    with gate(case):
        try:
            yield
        finally:
            torch.compiler.reset()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


def compile_cases(
    labels: Sequence[tuple[str, str]], plan: Plan, tiny: bool, seconds: float, processes: int = 0
) -> Done:
    """Compile what `bench run` would compile of these cases, each named by its suite and its label."""
    from custom_ops import library

    begun = time.monotonic()
    if plan.device.type == "cuda":
        library.load_cuda()  # once, and not by each of the processes
    tasks = [partial(compile_case, suite, label, plan, tiny) for suite, label in labels]
    return run(tasks, processes, max(1.0, seconds - (time.monotonic() - begun)))


def compile_case(suite: str, label: str, plan: Plan, tiny: bool) -> None:
    """Compile a case for stock, with the plugin and by Triton; a way that raises will say so when it is timed."""
    from bench import measure

    case = _cases(suite, tiny)[label]
    with torch.no_grad(), room(case), unlaunched():
        inputs = case.inputs(plan.device)
        for way, make in measure.ways(case, plan, inputs):
            if way in (*measure.COMPILED, "triton"):
                torch.compiler.reset()
                with contextlib.suppress(Exception):
                    make()()


@lru_cache
def _cases(suite: str, tiny: bool) -> dict[str, Case]:
    from bench.suites import suites

    return {case.label: case for case in suites()[suite](tiny)}
