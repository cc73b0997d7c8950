"""`python -m bench run | show | compare | plot | tune | readme`, and what is measured apart from the suites."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import results
from bench.results import FOLDER, Row, Run

if TYPE_CHECKING:
    import torch

    from bench.suites.moe import Model
    from bench.timer import Timer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
# a log has no width of its own, and eighty columns fold the tables
console = Console(width=None if sys.stdout.isatty() else 200)

Folder = Annotated[Path, typer.Option("--results", help="folder of the JSON files")]


@app.command()
def run(
    suite: Annotated[list[str] | None, typer.Option(help="only these suites")] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(help="only cases whose label holds this text, or one of these"),
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="only these token counts")] = None,
    out: Annotated[Path, typer.Option(help="folder for the JSON files")] = FOLDER,
    max_autotune: Annotated[
        bool, typer.Option(help="also max-autotune, which compiles for long")
    ] = True,
    cold: Annotated[bool, typer.Option(help="also with a cold L2")] = True,
    stock: Annotated[bool, typer.Option(help="also stock torch.compile")] = True,
    implementations: Annotated[
        bool, typer.Option(help="also each implementation of an op, not only the chosen one")
    ] = True,
    others: Annotated[bool, typer.Option(help="also the other ways of a case")] = True,
    fusions: Annotated[str, typer.Option(help="the plugin's fusions for whole models")] = "default",
    device: Annotated[str, typer.Option(help="cuda or cpu; what is there if not given")] = "",
    tiny: Annotated[bool, typer.Option(help="tiny sizes, to test the harness")] = False,
    ahead_minutes: Annotated[
        float,
        typer.Option(help="compile the graphs of all cases side by side first, for no longer"),
    ] = 0.0,
    minutes: Annotated[float, typer.Option(help="begin no case after so long, in all")] = 1e9,
    commit: Annotated[str, typer.Option(help="the commit, where git is not at hand")] = "",
) -> None:
    """Measure. Exits with 1 when a case raised, gave a wrong result or missed its target."""
    import torch

    from bench import ahead
    from bench.measure import Plan, measure
    from bench.suites import suites
    from bench.timer import timer_for

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    timer = timer_for(where)
    plan = Plan(where, max_autotune, cold, fusions, stock, implementations, others)
    known = suites()
    for name in suite or known:
        if name not in known:
            raise typer.BadParameter(
                f"no suite {name!r}; accepted: {', '.join(known)}", param_hint="--suite"
            )
    begun = time.monotonic()
    selected = {
        name: [
            each
            for each in known[name](tiny)
            if any(text in each.label for text in case or ("",))
            and (not tokens or each.sizes.get("tokens") in tokens)
        ]
        for name in suite or known
    }
    if ahead_minutes > 0:
        labels = [(name, each.label) for name, cases in selected.items() for each in cases]
        done = ahead.compile_cases(labels, plan, tiny, 60 * ahead_minutes)
        console.print(str(done), markup=False)
    failed = False
    for name, cases in selected.items():
        if tiny:  # the targets are for full sizes
            cases = [dataclasses.replace(each, targets=()) for each in cases]
        if not cases:
            continue
        session = results.describe(name, where, timer.name, timer.copy_bandwidth())
        session.commit = commit or session.commit
        for each in track(cases, description=name, console=Console(stderr=True)):
            if time.monotonic() - begun > 60 * minutes:
                break
            session.rows.append(measure(each, plan, timer, session.copy_gbps))
            path = session.save(out)  # after each row: a run that is cut off keeps what it has
        if not session.rows:
            continue
        _print(session, session.rows)
        console.print(f"written to {path}")
        failed |= any(row.errors or row.missed for row in session.rows)
    raise typer.Exit(failed)


@app.command()
def show(folder: Folder = FOLDER) -> None:
    """Print the newest row of each case."""
    for device, pairs in results.newest(results.load_all(folder)).items():
        for suite in dict.fromkeys(run.suite for run, _ in pairs):
            rows = [(run, row) for run, row in pairs if run.suite == suite]
            _print(rows[-1][0], [row for _, row in rows])
        console.print(f"{device}: {len(pairs)} cases")


@app.command()
def compare(before: Path, after: Path, slower: Annotated[float, typer.Option()] = 1.03) -> None:
    """Compare the rows of two result files. Exits with 1 when ours got slower by more than --slower."""
    old, new = results.load(before), results.load(after)
    table = Table("case", "before us", "after us", "after / before")
    old_rows = {row.key: row for row in old.rows}
    worse = False
    for row in new.rows:
        previous = old_rows.get(row.key)
        if previous is None or not previous.ours_us or not row.ours_us:
            continue
        ratio = row.ours_us / previous.ours_us
        worse |= ratio > slower
        table.add_row(row.label, f"{previous.ours_us:.2f}", f"{row.ours_us:.2f}", f"{ratio:.3f}")
    console.print(table)
    raise typer.Exit(worse)


@app.command()
def plot(folder: Folder = FOLDER, out: Annotated[Path, typer.Option()] = FOLDER / "plots") -> None:
    """Draw the newest rows as PNGs."""
    from bench.plots import draw

    for path in draw(results.load_all(folder), out):
        console.print(path)


@app.command()
def tune(
    folder: Folder = FOLDER,
    out: Annotated[Path | None, typer.Option()] = None,
    family: Annotated[str, typer.Option(help="only this family's tables: moe")] = "",
) -> None:
    """Distil the results into the tables that ship: which fusions are on by default, what is fastest where."""
    from bench.tuning import FAMILIES, TABLES, write

    if family and family not in FAMILIES:
        raise typer.BadParameter(
            f"no family {family!r}; accepted: {', '.join(FAMILIES)}", param_hint="--family"
        )
    for path in write(results.load_all(folder), out or TABLES, family):
        console.print(path)


@app.command()
def moe(
    model: Annotated[list[str] | None, typer.Option(help="only these blocks")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="only these: bf16, fp8_block")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="only these token counts")] = None,
    experts: Annotated[str, typer.Option(help="by these experts, not by what is chosen")] = "",
    profile: Annotated[bool, typer.Option(help="time each part; draw PNGs")] = True,
    kernels: Annotated[bool, typer.Option(help="list the kernels (needs a GPU)")] = False,
    memory: Annotated[bool, typer.Option(help="peak memory by chunk (needs a GPU)")] = False,
    blocks: Annotated[bool, typer.Option(help="time whole blocks, stock and ours")] = False,
    out: Annotated[Path, typer.Option(help="folder for the JSON file and plots")] = FOLDER,
    device: Annotated[str, typer.Option(help="cuda or cpu; what is there if not given")] = "",
    tiny: Annotated[bool, typer.Option(help="tiny sizes, to test the harness")] = False,
    commit: Annotated[str, typer.Option(help="the commit, where git is not at hand")] = "",
) -> None:
    """Where the time of mixtures of experts goes: part by part, against the floor."""
    import torch

    from bench import moe as mixtures
    from bench.suites.moe import TOKENS
    from bench.timer import timer_for

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    timer = timer_for(where)
    session = results.describe("moe_profile", where, timer.name, 0.0)
    session.commit = commit or session.commit
    chosen = [
        (each, kind)
        for each in mixtures.models(model, tiny)
        for kind in each.dtypes
        if not dtype or kind in dtype
    ]
    if blocks:
        names = mixtures.models(model, False)
        _blocks(names, dtype or (), tokens or (), where, timer, out, commit, tiny)
    with torch.no_grad():
        if profile:
            counts = tokens or ((4,) if tiny else TOKENS)
            rows = mixtures.add(
                session,
                (mixtures.profile(*b, n, where, timer, experts) for b in chosen for n in counts),
                out,
            )
            console.print(mixtures.profile_table(rows))
            for path in mixtures.draw(rows, session.device["name"], out / "plots"):
                console.print(path)
        if kernels:
            for each, kind in chosen:
                for count in tokens or TOKENS:
                    console.print(mixtures.kernels(each, kind, count, where, experts))
        if memory:
            peaks = (row for b in chosen for row in mixtures.memory(*b, where))
            console.print(mixtures.memory_table(mixtures.add(session, peaks, out)))


def _blocks(
    models: list[Model],
    dtypes: Sequence[str],
    tokens: Sequence[int],
    device: torch.device,
    timer: Timer,
    out: Path,
    commit: str,
    tiny: bool,
) -> None:
    """Whole blocks, as rows of the suite "moe"."""
    from bench import moe as mixtures
    from bench import moe_blocks

    cases = moe_blocks.cases(models, dtypes, tokens, tiny)
    console.print(str(moe_blocks.compile_ahead(cases, device, 150.0, tiny)))
    session = results.describe("moe", device, timer.name, timer.copy_bandwidth())
    session.commit = commit or session.commit
    rows = moe_blocks.rows(cases, device, timer, session.copy_gbps)
    console.print(moe_blocks.table(mixtures.add(session, rows, out)))


@app.command("expert-parallel")
def expert_parallel(
    part: Annotated[list[str] | None, typer.Option(help="only these parts")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="only these, for whole layers")] = None,
    ranks: Annotated[int, typer.Option(help="processes; one for each GPU if not given")] = 0,
    steps_seconds: Annotated[float, typer.Option(help="how long to take random steps")] = 60.0,
    out: Annotated[Path, typer.Option(help="folder for the JSON file")] = FOLDER,
    device: Annotated[str, typer.Option(help="cuda or cpu; what is there if not given")] = "",
    tiny: Annotated[bool, typer.Option(help="tiny sizes, to test the harness")] = False,
    commit: Annotated[str, typer.Option(help="the commit, where git is not at hand")] = "",
) -> None:
    """Dispatch, combine and layers over the GPUs of this host. Exits with 1 when a row is wrong or too slow."""
    import torch

    from bench import expert_parallel as ep
    from bench import expert_parallel_world as world

    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name in part or ():
        if name not in ep.PARTS:
            raise typer.BadParameter(
                f"no part {name!r}; accepted: {', '.join(ep.PARTS)}", param_hint="--part"
            )
    plan = world.Plan(
        where,
        ranks or (torch.cuda.device_count() if where == "cuda" else 2),
        tuple(part or ep.PARTS),
        world.TINY if tiny else world.Sizes(),
        steps_seconds,
        out,
        commit,
        tuple(tokens or ()),
    )
    session, path = ep.measure(plan)
    _print(session, session.rows)
    console.print(f"written to {path}")
    raise typer.Exit(any(row.errors or row.missed for row in session.rows))


@app.command("compile-time")
def compile_time(
    layers: int = 32,
    repeats: int = 3,
    out: Annotated[Path, typer.Option(help="folder for the JSON file")] = FOLDER,
) -> None:
    """Compile a Llama of --layers on the CPU with the plugin and with stock Inductor, from empty caches."""
    import torch

    from bench import compile_time as compiling

    timer = "wall clock of the first call less a warm one, empty caches, median"
    session = results.describe("compile", torch.device("cpu"), timer, 0.0)
    for scheme in compiling.SCHEMES:
        seconds = compiling.measure(scheme, layers, repeats)
        micros = {"plugin": 1e6 * seconds["fusion_passes"], "inductor": 1e6 * seconds["inductor"]}
        ratios = {"of_inductor": micros["inductor"] / micros["plugin"]}
        session.rows.append(
            Row(f"compile_llama_{scheme}", {"layers": layers}, warm_us=micros, ratios=ratios)
        )
    path = session.save(out)
    _print(session, session.rows)
    console.print(f"written to {path}")


@app.command()
def warmup(
    out: Annotated[Path, typer.Option(help="folder for the JSON file")] = FOLDER,
    serial_seconds: Annotated[
        float, typer.Option(help="how long to compile one by one; scaled to all kernels after that")
    ] = 45.0,
    commit: Annotated[str, typer.Option(help="the commit, where git is not at hand")] = "",
) -> None:
    """Measure JIT warm-up on a GPU, in about five minutes. Exits with 1 when a bar is missed."""
    from bench import warmup as warming

    session, path = warming.measure(
        out, serial_seconds, commit, lambda name, answer: console.print(name, answer, markup=False)
    )
    _print(session, session.rows)
    console.print(f"written to {path}")
    raise typer.Exit(any(row.errors or row.missed for row in session.rows))


@app.command()
def readme(
    check: Annotated[bool, typer.Option("--check", help="fail when a page is stale")] = False,
) -> None:
    """Write the generated tables of README.md and docs/: fusions, settings, ops, performance."""
    from bench.readme import documents, render

    texts = documents()
    stale = {path: fresh for path, fresh in render(texts).items() if fresh != texts[path]}
    if check and stale:
        names = ", ".join(str(path.relative_to(FOLDER.parent.parent)) for path in stale)
        console.print(f"{names}: stale, run `make readme`")
        raise typer.Exit(1)
    for path, fresh in stale.items():
        path.write_text(fresh)


def _print(run: Run, rows: list[Row]) -> None:
    title = f"{run.suite} on {run.device['name']}, copy {run.copy_gbps:.0f} GB/s, {run.date}"
    ways = list(dict.fromkeys(way for row in rows for way in row.warm_us))
    table = Table(title=title)
    for column in (
        "case",
        *(f"{way} us" for way in ways),
        "of copy",
        "of inductor",
        "TFLOP/s",
        "targets",
    ):
        table.add_column(column, justify="left" if column in ("case", "targets") else "right")
    for row in rows:
        times = [f"{row.warm_us[way]:.2f}" if way in row.warm_us else "" for way in ways]
        ratios = [
            f"{row.ratios[key]:.{digits}f}" if key in row.ratios else ""
            for key, digits in (("of_copy", 3), ("of_inductor", 3), ("tflops", 0))
        ]
        verdict = "; ".join(row.missed) or ("met" if row.targets else "")
        table.add_row(row.label, *times, *ratios, verdict)
    console.print(table)
    for row in rows:
        for way, error in row.errors.items():
            console.print(f"{row.label}: {way}: {error}", style="red", markup=False)


if __name__ == "__main__":
    app(prog_name="python -m bench")
