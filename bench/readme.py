"""The generated parts of README.md and docs/: between `<!-- begin: NAME -->` and `<!-- end: NAME -->`."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from bench import heat_map, moe_report, pages
from bench.results import FOLDER, RANKS, ROOT, Row, Run, load_all, newest

README = ROOT / "README.md"
DOCS = ROOT / "docs"
NO_RESULTS = (
    "No results are committed yet: `make bench` on a machine with an NVIDIA GPU writes them."
)
NAMES = r"<!-- begin: (\w+) -->\n"


def documents() -> dict[Path, str]:
    """The text of every file that has generated parts."""
    return {path: path.read_text() for path in (README, *sorted(DOCS.glob("*.md")))}


def render(texts: Mapping[Path, str]) -> dict[Path, str]:
    """The texts with every generated part made anew. Raises ValueError for one that is missing, unknown or there twice.

    A path in a part is one of the repository; in a file of `docs/` it goes up first.
    """
    found = Counter(name for text in texts.values() for name in re.findall(NAMES, text))
    wanted = Counter([*PARTS])
    if wrong := sorted((found - wanted) + (wanted - found)):
        raise ValueError(
            f"README.md and docs/ need each of the generated parts {sorted(PARTS)} once; missing, unknown or repeated: "
            f"{wrong}"
        )
    return {path: _render(text, path) for path, text in texts.items()}


def _render(text: str, path: Path) -> str:
    up = "../" * (len(path.relative_to(ROOT).parts) - 1)
    for name in re.findall(NAMES, text):
        made = re.sub(r"\]\((?=bench/)", f"]({up}", PARTS[name]())
        part = f"<!-- begin: {name} -->\n{made}\n<!-- end: {name} -->"
        pattern = rf"<!-- begin: {name} -->\n.*?<!-- end: {name} -->"
        text = re.sub(pattern, part.replace("\\", r"\\"), text, flags=re.DOTALL)
    return text


def toggles() -> str:
    """Every shipped fusion by its page, and whether it is on by default: the short table of the README."""
    from fusion_passes.registered import registry

    rows = []
    for page in pages.PAGES:
        states: dict[str, list[str]] = {"on": [], "off": []}
        for fusion in registry().values():
            if pages.of_name(fusion.name) is page:
                on = [arch for arch in _archs() if fusion.default_state(arch)[0]]
                state = "off" if not on else "on" if on == _archs() else f"on for {', '.join(on)}"
                states.setdefault(state, []).append(f"`{fusion.name}`")
        where, off, *some = (
            f"{', '.join(names)}" if state in ("on", "off") else f"({state}) {', '.join(names)}"
            for state, names in states.items()
        )
        link = f"[{page.title}](docs/{page.name}.md)"
        rows.append((link, "; ".join(each for each in (where, *some) if each), off))
    return table(("family", "on by default", "off until named"), rows)


def fusions(page: pages.Page) -> str:
    """Every shipped fusion of a page; third-party ones of this machine have no place there."""
    from fusion_passes.registered import registry

    rows = [
        (
            f"`{fusion.name}`",
            fusion.summary,
            *("on" if fusion.default_state(arch)[0] else "off" for arch in _archs()),
        )
        for fusion in registry().values()
        if pages.of_name(fusion.name) is page
    ]
    return table(("fusion", "what it does", *(f"`{arch}`" for arch in _archs())), rows)


def _archs() -> list[str]:
    from fusion_passes.tables import load

    return [f"sm_{version}" for version in sorted(load())]


def environment() -> str:
    from fusion_passes.settings import environment_table

    return table(
        ("variable", "accepted", "meaning"),
        [(f"`{name}`", *rest) for name, *rest in environment_table()],
    )


def ops(page: pages.Page) -> str:
    from custom_ops import library

    rows = []
    for op in library.ops().values():
        if pages.of_name(op.name) is page:
            names = ", ".join(implementation.name for implementation in op.implementations)
            rows.append((f"`{op.name}`", (op.public.__doc__ or "").split("\n")[0], names))
    return table(
        ("op of `custom_ops`", "what it computes", "implementations, preferred first"), rows
    )


def headlines() -> str:
    """Per suite and GPU: how many rows stand beside stock, and how far ahead they are."""
    ahead: dict[tuple[pages.Page, str, str], list[float]] = {}
    for device, pairs in newest(
        [run for run in _measured() if run.suite != heat_map.SUITE]
    ).items():
        for run, row in pairs:
            page = pages.of_suite(run.suite)
            if page is not None and run.suite != RANKS and "of_inductor" in row.ratios:
                ahead.setdefault((page, run.suite, device), []).append(row.ratios["of_inductor"])
    rows = [
        (
            f"[{suite}](docs/{page.name}.md)",
            device.removeprefix("NVIDIA "),
            str(len(ratios)),
            *(f"{figure:.2f}" for figure in (statistics.median(ratios), min(ratios), max(ratios))),
        )
        for (page, suite, device), ratios in ahead.items()
    ]
    if not rows:
        return NO_RESULTS
    return table(("suite", "GPU", "sizes", "median", "least", "most"), sorted(rows))


def _timed(pairs: Iterable[tuple[Run, Row]]) -> bool:
    return any(row.ours_us for _, row in pairs)


def _measured() -> list[Run]:
    return [run for run in load_all() if run.device["arch"] != "cpu"]


def performance(page: pages.Page | None = None) -> str:
    """Of the suites of one page, or of all, per GPU: the kernels against stock `torch.compile` and the copy bandwidth,
    then the whole layers.
    """

    runs = [run for run in _measured() if page in (None, pages.of_suite(run.suite))]
    own = (heat_map.SUITE, RANKS)
    devices = newest([run for run in runs if run.suite not in own])
    parts = [_device(name, pairs) for name, pairs in devices.items() if _timed(pairs)]
    parts += [_map(name, pairs) for name, pairs in newest(heat_map.of(runs)).items()]
    for name, pairs in newest(moe_report.of(runs)).items():
        parts += moe_report.section(name, [row for _, row in pairs], FOLDER / "plots", table)
    ranks = newest([run for run in runs if run.suite == RANKS])
    parts += [_ranks(name, pairs) for name, pairs in ranks.items()]
    return "\n\n".join(parts) or NO_RESULTS


def _map(name: str, pairs: Sequence[tuple[Run, Row]]) -> str:
    """What `python -m bench.heat` drew, and its figures."""
    from bench.plots import file_name

    rows = [row for _, row in pairs]
    counts = sorted(row.sizes["tokens"] for row in rows)
    measured = Counter(row.case for row in rows)
    every = len(heat_map.WIDTHS) * len(heat_map.TOKENS)
    whole = sum(count >= every for count in measured.values())
    picture = (FOLDER / "plots" / file_name("heat", name)).relative_to(ROOT)
    return "\n\n".join(
        (
            f"Ours against stock `torch.compile` on an {name}, {counts[0]} to {counts[-1]} tokens, by width; "
            f"{len(rows)} points of {len(measured)} ops, {whole} of them at all {every}. Where one is below "
            f"{heat_map.AHEAD}, the fusion leaves tokens and widths like it to stock by default:",
            table(heat_map.HEADS, [(f"`{op}`", *rest) for op, *rest in heat_map.summary(rows)]),
            f"![how many times as fast as stock, by tokens and width]({picture})",
        )
    )


def _ranks(name: str, pairs: Sequence[tuple[Run, Row]]) -> str:
    """What goes between GPUs, and the whole layers around it."""
    rows = [
        (
            f"`{row.case}`",
            f"{row.sizes.get('tokens', '')}",
            f"{row.ours_us:.1f}",
            ", ".join(f"{way} {time:.1f}" for way, time in row.warm_us.items() if way != "ours"),
            "; ".join(row.errors.values()),
        )
        for _, row in pairs
        if row.ours_us
    ]
    ranks = max(row.sizes["ranks"] for _, row in pairs)
    head = f"Experts on {ranks} {name}, in microseconds; tokens are those of one rank:"
    return f"{head}\n\n{table(('', 'tokens', 'ours', 'others', 'what is wrong'), rows)}"


def _device(name: str, pairs: Sequence[tuple[Run, Row]]) -> str:
    latest = max((run for run, _ in pairs), key=lambda run: run.date)
    rows = [row for _, row in pairs if row.ours_us]
    kernels = [row for row in rows if row.chosen]
    models = [row for row in rows if not row.chosen]
    torch = latest.versions["torch"]
    head = (
        f"{name}, torch {torch}, {latest.date[:10]}: medians in microseconds, warm L2, CUDA graphs."
    )
    parts = [head]
    if kernels:
        columns = (
            "kernel",
            "ours",
            "stock `torch.compile`",
            "ratio",
            "of copy bandwidth",
            "TFLOP/s",
        )
        ahead = [row.ratios["of_inductor"] for row in kernels if "of_inductor" in row.ratios]
        middle = f", {statistics.median(ahead):.2f} times stock in the median" if ahead else ""
        parts += [
            f"<details><summary>{len(kernels)} kernels{middle}</summary>",
            table(columns, [_kernel(row) for row in kernels]),
            "</details>",
        ]
    if models:
        heads = ("model", "ours", "stock `torch.compile`", "ratio", "bfloat16, stock")
        parts.append(table(heads, [_model(row) for row in models]))
    return "\n\n".join(parts)


def _times(row: Row) -> tuple[str, ...]:
    return (
        f"`{row.label}`",
        f"{row.ours_us:.1f}",
        f"{row.inductor_us:.1f}" if row.inductor_us else "",
        f"{row.ratios['of_inductor']:.2f}" if "of_inductor" in row.ratios else "",
    )


def _kernel(row: Row) -> tuple[str, ...]:
    return (
        *_times(row),
        "" if row.flops else f"{row.ratios['of_copy']:.2f}",
        f"{row.ratios['tflops']:.0f}" if row.flops else "",
    )


def _model(row: Row) -> tuple[str, ...]:
    bf16 = row.warm_us.get("bf16_inductor")
    return (*_times(row), f"{bf16:.1f}" if bf16 else "")


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    head = tuple(columns)
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


PARTS: dict[str, Callable[[], str]] = {
    "toggles": toggles,
    "headlines": headlines,
    "environment": environment,
    **{f"fusions_{page.name}": partial(fusions, page) for page in pages.PAGES},
    **{f"ops_{page.name}": partial(ops, page) for page in pages.PAGES},
    **{f"performance_{page.name}": partial(performance, page) for page in pages.PAGES},
}
