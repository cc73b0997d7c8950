"""JIT warm-up: from the graphs compiled so far to the kernels that their token counts reach, compiled ahead.

    fusion_passes.warmup(max_num_tokens=8192)        # after compiling; or FUSION_PASSES_WARMUP=full
    print(fusion_passes.warmup_plan(max_num_tokens=8192))

The pass manager notes each node that runs an implementation which compiles (`problem_of`); a graph that Inductor
took from its cache has its notes in the stored report. A plan is what those notes come to: a list of distinct
kernels, which can be printed, kept as JSON, and replayed on a machine that has no GPU and no model.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import fx

from custom_ops import jit, monitor, platform
from custom_ops.jit import building, compilers, store
from custom_ops.jit import target as target_module
from custom_ops.jit.building import Outcome, Progress
from custom_ops.jit.kernel import MODES, Kernel, NotCovered, Operand, Problem, Target
from custom_ops.jit.triton import watch_triton
from custom_ops.library import Op
from custom_ops.monitor import JitEvent
from custom_ops.scales import has_layout
from fusion_passes import reporting, torch_internals
from fusion_passes import settings as settings_module
from fusion_passes.reporting import Report
from fusion_passes.settings import Settings

__all__ = ["JitEvent", "WarmupPlan", "jit_events", "warmup", "warmup_plan"]

FORMAT = 1


@dataclass(frozen=True)
class WarmupPlan:
    """The distinct kernels that a range of token counts reaches. Printing it gives a table.

    versions: of what decided on the kernels, by implementation; a plan holds for these only. notes: what in the
    graphs could not be enumerated, and why.
    """

    mode: str
    min_num_tokens: int
    max_num_tokens: int
    target: Target
    kernels: tuple[Kernel, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def is_compiled(self, kernel: Kernel) -> bool:
        """Whether a kernel of the plan is compiled for the plan's target, and whole."""
        return store.is_compiled(_compiler(kernel.implementation), kernel, self.target)

    def to_json(self) -> str:
        data = {
            "format": FORMAT,
            "mode": self.mode,
            "min_num_tokens": self.min_num_tokens,
            "max_num_tokens": self.max_num_tokens,
            "target": asdict(self.target),
            "versions": self.versions,
            "notes": list(self.notes),
            "kernels": [kernel.to_json() for kernel in self.kernels],
        }
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> WarmupPlan:
        """Raises ValueError for what `to_json` did not write."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(f"its format is {data['format']!r}; accepted: {FORMAT}")
            return cls(
                data["mode"],
                data["min_num_tokens"],
                data["max_num_tokens"],
                Target(**data["target"]),
                tuple(Kernel.from_json(each) for each in data["kernels"]),
                data["versions"],
                tuple(data["notes"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a warm-up plan: {type(error).__name__}: {error}") from None

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        where = self.target.name or self.target.arch
        table = Table(
            title=f"{len(self.kernels)} kernels for {self.min_num_tokens} to {self.max_num_tokens} tokens "
            f"on {where} ({self.mode})"
        )
        for column in ("op", "implementation", "kernel", "reached by", "compiled"):
            table.add_column(column, overflow="fold")
        for kernel in self.kernels:
            spec, example = (
                ", ".join(f"{name}={value}" for name, value in pairs)
                for pairs in (kernel.spec, kernel.example)
            )
            try:
                compiled = "yes" if self.is_compiled(kernel) else ""
            except (RuntimeError, OSError):  # its compiler is not installed here
                compiled = "?"
            table.add_row(kernel.op, kernel.implementation, spec, example, compiled)
        console = Console(width=140, color_system=None, markup=False)
        with console.capture() as capture:
            console.print(table)
            for note in self.notes:
                console.print(f"note: {note}")
        return capture.get().rstrip()


def warmup_plan(
    max_num_tokens: int | None = None, min_num_tokens: int = 1, mode: str = "full"
) -> WarmupPlan:
    """What `warmup` with the same arguments would compile. Compiles nothing.

    Of the graphs since the start or the last `reset_reports()`. Raises ValueError for a bad range or mode.
    """
    settings = settings_module.current()
    high = settings.warmup_max_num_tokens if max_num_tokens is None else max_num_tokens
    return _plan(reporting.reports(), min_num_tokens, high, mode)


def warmup(
    max_num_tokens: int | None = None,
    min_num_tokens: int = 1,
    mode: str = "full",
    *,
    plan: WarmupPlan | None = None,
    load: bool | None = None,
    workers: int | None = None,
    timeout: float | None = None,
    strict: bool | None = None,
    progress: bool | Progress | None = None,
) -> Outcome:
    """Compile every kernel that min_num_tokens to max_num_tokens tokens reach in the graphs compiled so far.

    Args:
        max_num_tokens: the setting `warmup_max_num_tokens` if None. A graph whose own range is smaller keeps it.
        mode: "full", or "relax" for the kernels of the powers of two and tile boundaries only.
        plan: compile this instead. It may be for another machine's GPU: nothing is loaded then.
        load: also load the kernels into this process, by one run each, so that a first call does not have to,
            and a CUDA graph capture can have them. Where there is a GPU that the plan is for, if None.
        workers: processes at once; what the cores and the free memory allow if None.
        timeout: seconds to wait for another process that is compiling; the setting `warmup_timeout` if None.
        strict: whether a later compilation is an error; the setting `warmup_strict` if None.
        progress: a bar on stderr (if None, where that is a terminal), or a function of (done, total, what).
    Returns:
        What was compiled, what was found compiled, and the seconds.
    Raises:
        ValueError: a bad range or mode, or a plan that was made with other versions.
        CompileError: kernels that did not compile; all others did.
        WaitedTooLong: another process held the lock until the time-out; names it.
    """
    settings = settings_module.current()
    if plan is None:
        plan = warmup_plan(max_num_tokens, min_num_tokens, mode)
    elif plan.mode not in MODES:
        raise ValueError(f"plan.mode is {plan.mode!r}; accepted: {', '.join(MODES)}")
    for note in plan.notes:
        warnings.warn(f"warm-up: {note}", stacklevel=2)
    return _run(
        plan,
        settings,
        load=load,
        workers=workers,
        timeout=timeout,
        strict=strict,
        progress=progress,
    )


def jit_events() -> tuple[JitEvent, ...]:
    """The JIT compilations since the last warm-up: none, if it covered what the model was called with."""
    return monitor.events()


def at_end_of_compilation(report: Report, settings: Settings) -> None:
    """What `FUSION_PASSES_WARMUP` asks for: warm up for the graph of one report, and say so in it."""
    if any(problem.implementation != "cuda" for problem in report.problems):
        _watch_triton()  # even without a warm-up: nothing may compile in a CUDA graph capture
    if settings.warmup == "skip":
        return
    with torch_internals.real_tensors(), torch.no_grad():
        plan = _plan([report], 1, settings.warmup_max_num_tokens, settings.warmup)
        report.notes += [f"warm-up: {note}" for note in plan.notes]
        for note in plan.notes:
            warnings.warn(f"warm-up: {note}", stacklevel=2)
        outcome = _run(plan, settings)
    report.notes.append(
        f"warm-up ({settings.warmup}): {len(outcome.compiled)} kernels compiled, "
        f"{len(outcome.found)} found compiled, in {outcome.wall:.1f} s"
    )


def problem_of(
    op: Op, implementation: str, args: Sequence[Any], kwargs: Mapping[str, Any], graph: fx.Graph
) -> Problem | None:
    """A node as a problem; None if its implementation compiles nothing. Adds no guard."""
    if compilers.enumerator(op.name, implementation) is None:
        return None
    fake_args, fake_kwargs = fx.node.map_arg(
        (tuple(args), dict(kwargs)), lambda node: node.meta["val"]
    )
    bound, keywords = op._bind(fake_args, fake_kwargs)
    rows = math.prod(torch_internals.size_to_expr(size) for size in bound[0].shape[:-1])
    arguments = tuple(_argument(value) for value in (*bound, *keywords.values()))
    return Problem(
        op.name,
        implementation,
        arguments,
        torch_internals.size_bounds(rows, graph),
        not _is_int(rows),
    )


def _argument(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_argument, value))
    if isinstance(value, torch.SymInt):
        return _size(value)
    if not isinstance(value, torch.Tensor):
        return value if isinstance(value, (bool, int, float, type(None))) else str(value)
    shape, stride = (tuple(map(_size, of)) for of in (value.shape, value.stride()))
    scales = value.dtype == torch.float32 and value.dim() > 1
    layout = "column_major_tma" if scales and has_layout(value, "column_major_tma") else ""
    dtype = str(value.dtype).removeprefix("torch.")
    return Operand(dtype, shape, stride, layout, _size(value.storage_offset()))


def _size(size: Any) -> int | str:
    expression = torch_internals.size_to_expr(size)
    return expression if _is_int(expression) else str(expression)


def _is_int(size: Any) -> bool:
    return isinstance(size, int)


def _plan(reports: Sequence[Report], low: int, high: int, mode: str) -> WarmupPlan:
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; accepted: {', '.join(MODES)}")
    if not 1 <= low <= high:
        raise ValueError(
            f"min_num_tokens is {low} and max_num_tokens is {high}; accepted: 1 <= min <= max"
        )
    problems = list(dict.fromkeys(problem for report in reports for problem in report.problems))
    target = target_module.here()
    kernels: dict[Kernel, None] = {}
    versions: dict[str, str] = {}
    notes: dict[str, None] = {}
    for problem in problems:
        compiler = compilers.enumerator(problem.op, problem.implementation)
        if compiler is None or (compiler.name == "triton" and target.arch == "cpu"):
            continue  # nothing is compiled: on a CPU Triton only interprets
        if reason := compiler.why_not(target):
            notes[f"{problem.op} on {problem.implementation} is not covered: {reason}"] = None
            continue
        if (rows := problem.range(low, high)) is None:
            continue
        try:
            found = compiler.kernels(problem, *rows, mode, target)
        except ValueError as unknown:
            notes[f"{problem.op} on {problem.implementation} is not covered: {unknown}"] = None
            found = unknown.kernels if isinstance(unknown, NotCovered) else ()
        kernels |= dict.fromkeys(found)
    for kernel in kernels:
        name = kernel.implementation
        versions[name] = versions.get(name) or _compiler(name).version()
    return WarmupPlan(mode, low, high, target, tuple(kernels), versions, tuple(notes))


def _compiler(implementation: str) -> jit.Compiler:
    compiler = compilers.find(implementation)
    if compiler is None:
        raise ValueError(f"no compiler is known for the implementation {implementation!r}")
    return compiler


def _run(
    plan: WarmupPlan,
    settings: Settings,
    *,
    load: bool | None = None,
    workers: int | None = None,
    timeout: float | None = None,
    strict: bool | None = None,
    progress: bool | Progress | None = None,
) -> Outcome:
    strict = settings.warmup_strict if strict is None else strict
    if strict and plan.notes:
        raise jit.JitError(
            f"a strict warm-up has to cover everything: {'; '.join(plan.notes)} (FUSION_PASSES_WARMUP_STRICT)"
        )
    named = dict.fromkeys(kernel.implementation for kernel in plan.kernels)
    known = {name: _compiler(name) for name in named}
    for name, compiler in known.items():
        if reason := compiler.why_not(plan.target):
            raise ValueError(f"plan: {name} cannot compile here: {reason}")
        if plan.versions.get(name) != compiler.version():
            raise ValueError(
                f"plan: it was made for {name} {plan.versions.get(name)!r}, here is "
                f"{compiler.version()!r}; make a new plan with warmup_plan()"
            )
    with _bar(progress) as advance:
        outcome = building.compile_all(
            plan.kernels,
            known,
            plan.target,
            workers=workers,
            timeout=settings.warmup_timeout if timeout is None else timeout,
            progress=advance,
        )
    here = torch.cuda.is_available() and plan.target == target_module.here()
    if load or (load is None and here):
        for name, compiler in known.items():
            compiler.load([kernel for kernel in plan.kernels if kernel.implementation == name])
    _watch_triton()
    monitor.arm(strict)
    return outcome


def _watch_triton() -> None:
    """On a CPU Triton compiles nothing."""
    if torch.cuda.is_available() and platform.has_triton() and not platform.triton_interpret():
        watch_triton()


@contextlib.contextmanager
def _bar(progress: bool | Progress | None) -> Iterator[Progress | None]:
    """A progress bar on stderr that appears when there is something to compile."""
    if callable(progress):
        yield progress
        return
    if progress is None:
        progress = sys.stderr.isatty()
    if not progress:
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import (
        Progress as Bar,
    )

    columns = (
        TextColumn("warm-up"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.description}"),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = None

        def advance(done: int, total: int, what: str) -> None:
            nonlocal task
            if task is None:
                task = bar.add_task(what, total=total, completed=done)
            bar.update(task, completed=done, total=total, description=what)

        yield advance
