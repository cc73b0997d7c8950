"""`python -m bench.heat`: where ours is ahead of stock `torch.compile`, over 1 to 65536 tokens and models' widths.

A point is a compilation and two short timings, about a second on an H100. The points come coarse ones first, each op
at each width, so that a run that is out of time has measured the whole range, and what is left out are sizes between.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import results
from bench.case import Case
from bench.results import FOLDER, Row, Run
from bench.suites import activation, normalization, quantization
from bench.timer import Call, HostTimer, Timer

SUITE = "heat"
WIDTHS = (1024, 2048, 4096, 5120, 7168, 8192, 14336)
TOKENS = tuple(2**power for power in range(17))
AHEAD = 0.97
"""Of stock's speed: what is not below is not slower, up to the noise of a run."""
OPS: dict[str, Callable[[int, int], Case]] = {
    "group_quant": partial(quantization.case, quantization.GROUP),
    "group_quant_int8": partial(quantization.case, quantization.GROUP_INT8),
    "token_quant": partial(quantization.case, quantization.TOKEN),
    "silu_mul_group_quant": partial(activation.fused, activation.GATES[0], quantization.GROUP),
    "add_rms_norm_group_quant": partial(
        normalization.fused, normalization.add_rms_norm, quantization.GROUP
    ),
}

app = typer.Typer(add_completion=False, help=__doc__)


class QuickTimer:
    """A CUDA graph of about two milliseconds, replayed seven times: the median of a call."""

    name = "CUDA graph of 2 ms, median of 7 replays, warm L2"

    def __init__(self, graph_us: float = 2000.0, replays: int = 7) -> None:
        self.graph_us, self.replays = graph_us, replays

    def warm(self, call: Call) -> float:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            once = self._replayed(call, 1, stream)
            count = max(1, min(200, int(self.graph_us / max(once, 1.0))))
            return self._replayed(call, count, stream)

    def _replayed(self, call: Call, count: int, stream: torch.cuda.Stream) -> float:
        """Microseconds of a call, of a graph of ``count`` of them."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()  # torch.cuda.graph collects garbage first, which takes longer than all of this
        for _ in range(count):
            call()
        graph.capture_end()
        graph.replay()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(self.replays + 1)]
        marks[0].record(stream)
        for mark in marks[1:]:
            graph.replay()
            mark.record(stream)
        torch.cuda.synchronize()
        spans = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
        return 1e3 * spans[len(spans) // 2] / count


def points(
    ops: Sequence[str], widths: Sequence[int], tokens: Sequence[int]
) -> Iterator[tuple[str, int, int]]:
    """Op, tokens, width: every fourth power of two first, then those half-way, then the rest."""
    left = sorted(tokens)
    for step in (4, 2, 1):
        now = [count for count in left if (count.bit_length() - 1) % step == 0]
        left = [count for count in left if count not in now]
        yield from ((op, count, width) for count in now for width in widths for op in ops)


def measure(name: str, tokens: int, width: int, device: torch.device, clock: Any) -> Row:
    """One row, `<op>` by the number of tokens and the width; a side that raises is an error and not timed."""
    case = OPS[name](tokens, width)
    row = Row(f"heat_{name}", {"tokens": tokens, "width": width}, moved_bytes=case.moved_bytes)
    torch.compiler.reset()
    with torch.no_grad():
        inputs = case.inputs(device)
        assert case.op is not None
        assert case.op_args is not None
        from custom_ops import library

        op = library.ops()[case.op]
        args, kwargs = case.op_args(*inputs)
        compiled = torch.compile(case.plain, dynamic=False, fullgraph=True)
        sides: dict[str, Call] = {
            "ours": lambda: op(*args, **kwargs),
            "inductor": lambda: compiled(*inputs),
        }
        for side, call in sides.items():
            try:
                row.warm_us[side] = clock.warm(call)
            except Exception as error:  # one side must not cost the other its device time
                row.errors[side] = f"{type(error).__name__}: {error}".splitlines()[0][:400]
        chosen = op.choose(*args, **kwargs).implementation
        row.chosen = chosen.name if chosen else ""
    return row


def summary(rows: Sequence[Row]) -> list[tuple[str, str, str, str]]:
    """Of each op: points, the part of them that is not slower, the median, and the worst."""
    found = []
    for case in dict.fromkeys(row.case for row in rows):
        timed = [row for row in rows if row.case == case and "of_inductor" in row.ratios]
        if not timed:
            continue
        timed.sort(key=lambda row: row.ratios["of_inductor"])
        ahead = sum(row.ratios["of_inductor"] >= AHEAD for row in timed)
        worst, middle = timed[0], timed[len(timed) // 2]
        found.append(
            (
                case.removeprefix("heat_"),
                f"{ahead} of {len(timed)}",
                f"{middle.ratios['of_inductor']:.2f}",
                f"{worst.ratios['of_inductor']:.2f} at {worst.sizes['tokens']} x {worst.sizes['width']}",
            )
        )
    return found


HEADS = ("op", f"not below {AHEAD}", "median", "least")


@app.command()
def heat(
    op: Annotated[list[str] | None, typer.Option(help=f"only these: {', '.join(OPS)}")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="only these token counts")] = None,
    width: Annotated[list[int] | None, typer.Option(help="only these widths")] = None,
    minutes: Annotated[float, typer.Option(help="begin no point after so long")] = 8.0,
    out: Annotated[Path, typer.Option(help="folder of the JSON file and of plots/")] = FOLDER,
    draw: Annotated[
        bool, typer.Option(help="needs matplotlib; `bench plot` draws it later")
    ] = True,
    device: Annotated[str, typer.Option(help="cuda or cpu; what is there if not given")] = "",
    commit: Annotated[str, typer.Option(help="the commit, where git is not at hand")] = "",
) -> None:
    """Measure, write the JSON file and draw the map. Exits with 1 when a side raised."""
    unknown = [name for name in op or () if name not in OPS]
    if unknown:
        raise typer.BadParameter(
            f"no op {unknown[0]!r}; accepted: {', '.join(OPS)}", param_hint="--op"
        )
    begun = time.monotonic()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    clock: Any = QuickTimer() if where.type == "cuda" else HostTimer(reps=1)
    session = results.describe(SUITE, where, clock.name, _copy_bandwidth(where))
    session.commit = commit or session.commit
    session.command = session.command.replace("-m bench", "-m bench.heat", 1)
    every = list(points(op or list(OPS), width or WIDTHS, tokens or TOKENS))
    for name, count, columns in every:
        if time.monotonic() - begun > 60 * minutes:
            break
        row = measure(name, count, columns, where, clock)
        row.finish(session.copy_gbps)
        session.rows.append(row)
        print(_line(row), file=sys.stderr, flush=True)
        if len(session.rows) % 35 == 0:  # a run that is cut off keeps what it has
            session.save(out)
    path = session.save(out)
    for line in (HEADS, *summary(session.rows)):
        print(" | ".join(line))
    print(f"{len(session.rows)} of {len(every)} points, written to {path}")
    if draw:
        from bench.plots import draw_heat

        for picture in draw_heat([session], out / "plots"):
            print(picture)
    raise typer.Exit(any(row.errors for row in session.rows))


def _copy_bandwidth(device: torch.device) -> float:
    from bench.timer import timer_for

    timer: Timer = timer_for(device)
    return timer.copy_bandwidth()


def _line(row: Row) -> str:
    times = " ".join(f"{way} {us:.2f}" for way, us in row.warm_us.items())
    ratio = row.ratios.get("of_inductor", float("nan"))
    return f"{row.label}: {times} us, {ratio:.2f} {'; '.join(row.errors.values())}".rstrip()


def of(runs: Sequence[Run]) -> list[Run]:
    """Those runs that are maps."""
    return [run for run in runs if run.suite == SUITE]


if __name__ == "__main__":
    app(prog_name="python -m bench.heat")
