"""The generated parts of README.md: between `<!-- begin: NAME -->` and `<!-- end: NAME -->`."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence

from bench import heat, moe_report
from bench.results import FOLDER, RANKS, ROOT, Row, Run, load_all, newest

README = ROOT / "README.md"
NO_RESULTS = (
    "No results are committed yet: `make bench` on a machine with an NVIDIA GPU writes them."
)


def render(text: str) -> str:
    """README text with every generated part made anew. Raises ValueError for a missing or unknown part."""
    found = re.findall(r"<!-- begin: (\w+) -->\n", text)
    if sorted(found) != sorted(PARTS):
        raise ValueError(f"README.md has the generated parts {found}, wanted {sorted(PARTS)}")
    for name, make in PARTS.items():
        part = f"<!-- begin: {name} -->\n{make()}\n<!-- end: {name} -->"
        pattern = rf"<!-- begin: {name} -->\n.*?<!-- end: {name} -->"
        text = re.sub(pattern, part.replace("\\", r"\\"), text, flags=re.DOTALL)
    return text


def fusions() -> str:
    """Every shipped fusion; third-party ones of this machine have no place in the README."""
    from fusion_passes.registered import registry
    from fusion_passes.tables import load

    archs = [f"sm_{version}" for version in sorted(load())]
    rows = [
        (
            f"`{fusion.name}`",
            fusion.summary,
            *("on" if fusion.default_state(arch)[0] else "off" for arch in archs),
        )
        for fusion in registry().values()
    ]
    return table(("fusion", "what it does", *(f"`{arch}`" for arch in archs)), rows)


def environment() -> str:
    from fusion_passes.settings import environment_table

    return table(
        ("variable", "accepted", "meaning"),
        [(f"`{name}`", *rest) for name, *rest in environment_table()],
    )


def ops() -> str:
    from custom_ops import library

    rows = []
    for op in library.ops().values():
        names = ", ".join(implementation.name for implementation in op.implementations)
        rows.append((f"`{op.name}`", (op.public.__doc__ or "").split("\n")[0], names))
    return table(
        ("op of `custom_ops`", "what it computes", "implementations, preferred first"), rows
    )


def performance() -> str:
    """Per GPU: the kernels against stock `torch.compile` and the copy bandwidth, then the whole layers."""
    runs = [run for run in load_all() if run.device["arch"] != "cpu"]
    devices = newest([run for run in runs if run.suite not in (heat.SUITE, RANKS)])
    maps = newest(heat.of(runs))
    parts = [_device(name, pairs) for name, pairs in devices.items()]
    parts += [_map(name, pairs) for name, pairs in maps.items()]
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
    every = len({row.case for row in rows}) * len(heat.WIDTHS) * len(heat.TOKENS)
    picture = (FOLDER / "plots" / file_name("heat", name)).relative_to(ROOT)
    return "\n\n".join(
        (
            f"Ours against stock `torch.compile` on an {name}, {counts[0]} to {counts[-1]} tokens, by width; "
            f"{len(rows)} of the {every} points of the map are measured. Where one is below {heat.AHEAD}, the fusion "
            "leaves tokens and widths like it to stock by default:",
            table(heat.HEADS, [(f"`{op}`", *rest) for op, *rest in heat.summary(rows)]),
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
    "fusions": fusions,
    "environment": environment,
    "ops": ops,
    "performance": performance,
}
