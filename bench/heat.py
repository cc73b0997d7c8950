"""`python -m bench.heat`: where ours is ahead of stock `torch.compile`, over 1 to 65536 tokens and models' widths.

A point is a compilation and two short timings. Stock's graphs are compiled first, side by side (see `bench.ahead`), and
then each point takes a fraction of a second on an H100. The points come coarse ones first, each op at each width, so
that a run that is out of time has measured the whole range; then the others, small ones first, for there ours has
least to gain. A run goes on where an earlier one stopped: `--resume` names its file. With `--timers` several processes
compile and take turns on the GPU, which then waits for none of them. Inputs are drawn once and shared by all.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import gc
import importlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer

from bench import ahead, results
from bench.case import Case, drawn_before
from bench.heat_map import AHEAD, HEADS, SUITE, TOKENS, WIDTHS, measured, merged, summary
from bench.results import FOLDER, Row
from bench.suites import activation, normalization, quantization
from bench.timer import Call, HostTimer, Timer

AGAIN = 2
"""How often both sides of a point that is below are timed again, in turns: a loss is a claim about all of them."""
SAVED_EVERY = 5.0
"""Seconds."""
KEPT_BYTES = 8 << 30
"""Of the GPU's memory between two points: the next one needs up to 20 GiB."""
KEPT_BYTES_OF_MANY = 1 << 30
"""The same, by each of several processes."""
FASTEST = 2.5e6
"""Bytes in a microsecond, about: how many calls make a graph of a length."""


def _ops() -> dict[str, Callable[[int, int], Case]]:
    """Every quantization, alone and after each producer, and gates with nothing behind them.

    By the name of its case in the other suites.
    """
    found: dict[str, Callable[[int, int], Case]] = {}
    for scheme in quantization.SCHEMES:
        found[scheme.name] = partial(quantization.case, scheme)
    for scheme in quantization.FUSED:
        for norm in (normalization.rms_norm, normalization.add_rms_norm):
            found[f"{norm.__name__}_{scheme.name}"] = partial(normalization.fused, norm, scheme)
        for gate in activation.GATES:
            found[f"{gate.name}_{scheme.name}"] = partial(activation.fused, gate, scheme)
    for gate in activation.GATES:
        found[gate.name] = partial(activation.alone, gate)
    return found


OPS = _ops()
USUAL = (
    "group_quant",
    "group_quant_int8",
    "token_quant",
    "silu_mul_group_quant",
    "add_rms_norm_group_quant",
)
"""What is measured when nobody says what: the rest is `--op all`."""

app = typer.Typer(add_completion=False, help=__doc__)


class Timed(Protocol):
    """A call that is ready to be timed, as often as is wanted."""

    def time(self) -> float:
        """Microseconds of a call."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class Clock(Protocol):
    """What a point is timed by: `first` runs a call, `ready` runs nothing."""

    name: str

    def first(self, call: Call) -> None: ...

    def ready(self, call: Call, least_us: float) -> Timed:
        """least_us: what it surely takes, about."""
        ...


class QuickTimer:
    """A CUDA graph of about a millisecond, replayed five times: the median of a call.

    Nothing runs while it is captured, so that only its replays need the GPU.
    """

    name = "CUDA graph of 1 ms, median of 5 replays, warm L2"

    def __init__(self, graph_us: float = 1000.0, replays: int = 5) -> None:
        self.graph_us, self.replays = graph_us, replays

    def first(self, call: Call) -> None:
        for _ in range(2):
            call()
        torch.cuda.synchronize()

    def ready(self, call: Call, least_us: float) -> Timed:
        count = max(1, min(200, int(self.graph_us / max(least_us, 1.0))))
        return _Captured(call, count, self.replays)

    def warm(self, call: Call, least_us: float = 1.0) -> float:
        self.first(call)
        timed = self.ready(call, least_us)
        try:
            return timed.time()
        finally:
            timed.close()


class _Captured:
    def __init__(self, call: Call, count: int, replays: int) -> None:
        self.count, self.replays = count, replays
        self.stream = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            self.graph.capture_begin()  # torch.cuda.graph collects garbage first, which takes longer than all of this
            try:
                for _ in range(count):
                    call()
            finally:
                self.graph.capture_end()

    def time(self) -> float:
        with torch.cuda.stream(self.stream):
            self.graph.replay()  # once before it is timed
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(self.replays + 1)]
            marks[0].record(self.stream)
            for mark in marks[1:]:
                self.graph.replay()
                mark.record(self.stream)
        torch.cuda.synchronize()
        spans = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
        return 1e3 * spans[len(spans) // 2] / self.count

    def close(self) -> None:
        self.graph.reset()  # its memory goes back now, and not when it is collected


class WallClock:
    """Of a CPU."""

    def __init__(self) -> None:
        self.timer = HostTimer(reps=1)
        self.name = self.timer.name

    def first(self, call: Call) -> None:
        call()

    def ready(self, call: Call, least_us: float) -> Timed:
        return _Repeated(self.timer, call)


@dataclasses.dataclass
class _Repeated:
    timer: HostTimer
    call: Call

    def time(self) -> float:
        return self.timer.warm(self.call)

    def close(self) -> None:
        pass


def points(
    ops: Sequence[str], widths: Sequence[int], tokens: Sequence[int]
) -> Iterator[tuple[str, int, int]]:
    """Op, tokens, width: every fourth power of two first, then the others, from the smallest tensor to the largest."""
    coarse = [count for count in sorted(tokens) if (count.bit_length() - 1) % 4 == 0]
    rest = [(count, width) for count in tokens if count not in coarse for width in widths]
    rest.sort(key=lambda size: (size[0] * size[1], size[0]))
    for count, width in (*((count, width) for count in coarse for width in widths), *rest):
        yield from ((op, count, width) for op in ops)


def compile_point(name: str, tokens: int, width: int, device: str) -> None:
    """Stock's graph of a point, into Inductor's cache on the disk; nothing is timed."""
    case = OPS[name](tokens, width)
    with (
        torch.no_grad(),
        ahead.room(case),
        ahead.unlaunched(),
        drawn_before(ahead.lent()),
    ):
        _stock(case)(*case.inputs(torch.device(device)))


def _stock(case: Case) -> Callable[..., Any]:
    # sizes as numbers: that is the fastest that stock can be, for a size that never changes
    return torch.compile(case.plain, dynamic=False, fullgraph=True)


def time_point(name: str, tokens: int, width: int, device: str) -> Row:
    """A row, by one of several processes that take turns on the GPU."""
    where = torch.device(device)
    row = measure(name, tokens, width, where, _clock(where))
    _give_back(where, KEPT_BYTES_OF_MANY)
    return row


def _clock(device: torch.device) -> Clock:
    return QuickTimer() if device.type == "cuda" else WallClock()


def measure(name: str, tokens: int, width: int, device: torch.device, clock: Clock) -> Row:
    """One row, `<op>` by the number of tokens and the width; a side that raises is an error and not timed.

    Others may use the GPU while this compiles and captures, and not while it launches.
    """
    from custom_ops import library

    case = OPS[name](tokens, width)
    row = Row(f"heat_{name}", {"tokens": tokens, "width": width}, moved_bytes=case.moved_bytes)
    row.fusion = case.fusion
    torch.compiler.reset()
    with torch.no_grad():
        with ahead.turn(), drawn_before(ahead.lent()):
            inputs = case.inputs(device)
        assert case.op is not None
        assert case.op_args is not None
        op = library.ops()[case.op]
        args, kwargs = case.op_args(*inputs)
        compiled = _stock(case)
        sides: dict[str, Call] = {
            "ours": lambda: op(*args, **kwargs),
            "inductor": lambda: compiled(*inputs),
        }
        with (
            contextlib.suppress(Exception),
            ahead.unlaunched(),
        ):  # it says so again when it is timed
            compiled(*inputs)
        _give_back(device, KEPT_BYTES_OF_MANY)
        with ahead.gate(case):
            _time(row, sides, clock)
        chosen = op.choose(*args, **kwargs).implementation
        row.chosen = chosen.name if chosen else ""
    return row


def _time(row: Row, sides: Mapping[str, Call], clock: Clock) -> None:
    """Into the row: as many calls of each side in a graph, so that what a replay costs is the same for both."""
    least_us = row.moved_bytes / FASTEST
    timed: dict[str, Timed] = {}
    times: dict[str, list[float]] = {side: [] for side in sides}

    @contextlib.contextmanager
    def noted(side: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # one side must not cost the other its device time
            row.errors[side] = f"{type(error).__name__}: {error}".splitlines()[0][:400]

    def both() -> None:
        for side, ready in timed.items():
            with noted(side):
                times[side].append(ready.time())

    with ahead.turn():  # stock picks one of several tiles by their times here
        for side, call in sides.items():
            with noted(side):
                clock.first(call)
    for side, call in sides.items():
        if side not in row.errors:
            with noted(side):
                timed[side] = clock.ready(call, least_us)
    with ahead.turn():
        both()
        if not row.errors and times["inductor"][0] < AHEAD * times["ours"][0]:
            for _ in range(AGAIN):
                both()
    for ready in timed.values():
        ready.close()
    row.warm_us = {side: statistics.median(found) for side, found in times.items() if found}


def _give_back(device: torch.device, kept: int) -> None:
    """The memory of a point: a capture cannot free what the allocator keeps, so it must not run into the limit."""
    if device.type == "cuda" and torch.cuda.memory_reserved(device) > kept:
        gc.collect()
        torch.cuda.empty_cache()


@app.command()
def heat(
    op: Annotated[
        list[str] | None, typer.Option(help=f"only these, or all: {', '.join(OPS)}")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="only these token counts")] = None,
    width: Annotated[list[int] | None, typer.Option(help="only these widths")] = None,
    minutes: Annotated[float, typer.Option(help="begin no point after so long, in all")] = 8.0,
    ahead_minutes: Annotated[
        float, typer.Option(help="compile stock's graphs side by side first, for no longer")
    ] = 2.5,
    processes: Annotated[int, typer.Option(help="how many compile; 0: one less than cores")] = 0,
    timers: Annotated[int, typer.Option(help="how many take turns to measure")] = 1,
    lend: Annotated[
        bool, typer.Option(help="draw inputs on a GPU once; processes open its memory, if they may")
    ] = True,
    resume: Annotated[
        list[Path] | None, typer.Option(help="a file of an earlier run, whose points are left out")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the JSON file and of plots/")] = FOLDER,
    draw: Annotated[
        bool, typer.Option(help="needs matplotlib; `bench plot` draws it later")
    ] = True,
    device: Annotated[str, typer.Option(help="cuda or cpu; what is there if not given")] = "",
    commit: Annotated[str, typer.Option(help="the commit, where git is not at hand")] = "",
) -> None:
    """Measure, write the JSON file and draw the map. Exits with 1 when a side raised."""
    names = list(OPS) if op == ["all"] else op or list(USUAL)
    for name in names:
        if name not in OPS:
            raise typer.BadParameter(
                f"no op {name!r}; accepted: all, {', '.join(OPS)}", param_hint="--op"
            )
    begun = saved = time.monotonic()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    earlier = [results.load(path) for path in resume or ()]
    every = list(points(names, width or WIDTHS, tokens or TOKENS))
    left = [point for point in every if point not in measured(earlier)]
    if lend and where.type == "cuda":
        ahead.lend(_random(where, left))
    if ahead_minutes > 0:
        print(_compiled_ahead(left, where, processes, 60 * ahead_minutes), file=sys.stderr)
    clock = _clock(where)
    session = results.describe(SUITE, where, clock.name, _copy_bandwidth(where))
    for run in earlier:
        if run.device["name"] != session.device["name"]:
            raise typer.BadParameter(
                f"measured on {run.device['name']!r}; accepted: files of {session.device['name']!r}",
                param_hint="--resume",
            )
    session.commit = commit or session.commit
    session.command = session.command.replace("-m bench", "-m bench.heat", 1)

    def got(row: Row) -> None:
        nonlocal saved
        row.finish(session.copy_gbps)
        session.rows.append(row)
        print(_line(row), file=sys.stderr, flush=True)
        if time.monotonic() - saved > SAVED_EVERY:  # a run that is cut off keeps what it has
            session.save(out)
            saved = time.monotonic()

    if timers > 1:
        task = importlib.import_module("bench.heat").time_point  # as in _compiled_ahead
        seconds = max(1.0, 60 * minutes - (time.monotonic() - begun))
        tasks = [partial(task, *point, str(where)) for point in left]
        for problem in ahead.run(tasks, timers, seconds, got).errors:
            print(problem, file=sys.stderr)
    else:
        for point in left:
            if time.monotonic() - begun > 60 * minutes:
                break
            row = measure(*point, where, clock)
            torch.compiler.reset()
            _give_back(where, KEPT_BYTES)
            got(row)
    whole = merged([*earlier, session])
    path = whole.save(out)
    for line in (HEADS, *summary(whole.rows)):
        print(" | ".join(line))
    print(f"{len(session.rows)} of {len(left)} points, written to {path}")
    if draw:
        from bench.plots import draw_heat  # needs matplotlib

        for picture in draw_heat([whole], out / "plots"):
            print(picture)
    raise typer.Exit(any(row.errors for row in session.rows))


def _compiled_ahead(
    left: Sequence[tuple[str, int, int]], device: torch.device, processes: int, seconds: float
) -> ahead.Done:
    from custom_ops import library

    # by name: run as a script, this module has another one, which a process would have to run to find the function
    task = importlib.import_module("bench.heat").compile_point
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        # the C++ library is built, if it has to be, by a compiler of its own
        built = beside.submit(library.load_cuda) if device.type == "cuda" else None
        done = ahead.run([partial(task, *point, str(device)) for point in left], processes, seconds)
        if built is not None:
            built.result()
    return done


def _random(
    device: torch.device, points: Sequence[tuple[str, int, int]]
) -> tuple[torch.Tensor, ...]:
    """What the inputs of all points are the beginnings of: a gate and its up, a residual, a weight."""
    most = max((count * width for _, count, width in points), default=1)
    sizes = (2 * most, most, max(WIDTHS))
    return tuple(torch.empty(n, dtype=torch.bfloat16, device=device).normal_() for n in sizes)


def _copy_bandwidth(device: torch.device) -> float:
    from bench.timer import timer_for

    timer: Timer = timer_for(device)
    return timer.copy_bandwidth()


def _line(row: Row) -> str:
    times = " ".join(f"{way} {us:.2f}" for way, us in row.warm_us.items())
    ratio = row.ratios.get("of_inductor", float("nan"))
    return f"{row.label}: {times} us, {ratio:.2f} {'; '.join(row.errors.values())}".rstrip()


if __name__ == "__main__":
    app(prog_name="python -m bench.heat")
