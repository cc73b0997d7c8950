"""Draws the newest rows of each device as PNGs: bandwidth, speed-up over tokens, whole layers, the map of sizes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import heat_map
from bench.results import RANKS, Row, Run, newest

OURS, STOCK, OTHER = "#0b6e99", "#b8b8b8", "#d98c3f"


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write the plots of every device; returns the paths. A plot without data is not drawn."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    from bench import moe_report

    paths = [*draw_heat(runs, folder), *moe_report.draw(runs, folder)]
    for device, pairs in newest(
        [run for run in runs if run.suite not in (heat_map.SUITE, RANKS)]
    ).items():
        rows = [row for _, row in pairs if row.ours_us and "tokens" in row.sizes]
        for name, plot in (("bandwidth", _bandwidth), ("speedup", _speedup), ("layer", _layer)):
            figure = plot(rows, device)
            if figure is not None:
                paths.append(folder / file_name(name, device))
                figure.savefig(paths[-1], dpi=144, bbox_inches="tight")
    return paths


def file_name(plot: str, device: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{plot}-{slug}.png"


def draw_heat(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Of each device with a map: how many times as fast as stock `torch.compile` each op is at each size."""
    paths = []
    for device, pairs in newest(heat_map.of(runs)).items():
        rows = [row for _, row in pairs if "of_inductor" in row.ratios]
        if rows:
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(folder / file_name("heat", device))
            _heat(rows, device).savefig(paths[-1], dpi=144, bbox_inches="tight")
    return paths


def _heat(rows: Sequence[Row], device: str) -> Any:
    """A panel for each op: widths over tokens, white where both are as fast, blue where ours is faster.

    An op of which less than half is measured, beside the one of which most is, has a line in the table only.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    points = Counter(row.case for row in rows)
    cases = [case for case, count in points.items() if 2 * count >= max(points.values())]
    rows = [row for row in rows if row.case in cases]
    tokens = sorted({row.sizes["tokens"] for row in rows})
    widths = sorted({row.sizes["width"] for row in rows})
    blue_if_ahead = LinearSegmentedColormap.from_list("ratio", ["#b5442e", "#ffffff", OURS])
    colours = blue_if_ahead.with_extremes(bad="#eeeeee")
    size = (2.2 + 0.46 * len(tokens), 0.6 + len(cases) * (0.7 + 0.27 * len(widths)))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(
        f"Times as fast as stock torch.compile, {device}", x=0.01, ha="left", fontsize=11
    )
    for axes, case in zip(figure.subplots(len(cases), 1, squeeze=False)[:, 0], cases, strict=True):
        found = {
            (row.sizes["width"], row.sizes["tokens"]): row.ratios["of_inductor"]
            for row in rows
            if row.case == case
        }
        # as logarithms: twice as fast and half as fast are as far from white
        shades = [
            [math.log2(found.get((width, count), math.nan)) for count in tokens] for width in widths
        ]
        axes.imshow(shades, cmap=colours, vmin=-1, vmax=1, aspect="auto", origin="lower")
        for (width, count), ratio in found.items():
            axes.text(
                tokens.index(count),
                widths.index(width),
                f"{ratio:.2f}",
                ha="center",
                va="center",
                fontsize=6,
                fontweight="bold" if ratio < heat_map.AHEAD else "normal",
                color="white" if abs(math.log2(ratio)) > 0.7 else "black",
            )
        axes.set_title(case.removeprefix("heat_"), loc="left", fontsize=9)
        axes.set_xticks(range(len(tokens)), [str(count) for count in tokens], fontsize=7)
        axes.set_yticks(range(len(widths)), [str(width) for width in widths], fontsize=7)
        axes.tick_params(length=0)
    axes.set_xlabel("tokens", fontsize=8)
    return figure


def _axes(title: str, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _bandwidth(rows: Sequence[Row], device: str) -> Any:
    """The largest size of each op: fraction of the copy bandwidth, ours beside stock `torch.compile`."""
    largest: dict[str, Row] = {}
    for row in rows:
        if "of_inductor" not in row.ratios or row.flops:
            continue
        if row.sizes["tokens"] >= largest.get(row.case, row).sizes["tokens"]:
            largest[row.case] = row
    if not largest:
        return None
    figure, axes = _axes(f"Fraction of copy bandwidth, {device}", (8, 0.6 + 0.5 * len(largest)))
    for index, row in enumerate(reversed(largest.values())):
        for offset, colour, share, label in (
            (0.2, OURS, row.ratios["of_copy"], "fusion-passes"),
            (-0.2, STOCK, row.ratios["of_copy"] / row.ratios["of_inductor"], "stock torch.compile"),
        ):
            axes.barh(
                index + offset, share, height=0.36, color=colour, label=None if index else label
            )
            axes.text(share + 0.01, index + offset, f"{share:.2f}", va="center", fontsize=8)
    axes.set_yticks(
        range(len(largest)), [row.label for row in reversed(largest.values())], fontsize=8
    )
    axes.set_xlim(0, 1.15)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _speedup(rows: Sequence[Row], device: str) -> Any:
    """Every op over token counts."""
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if "of_inductor" in row.ratios:
            lines.setdefault(row.case, []).append(row)
    lines = {name: line for name, line in lines.items() if len(line) > 1}
    if not lines:
        return None
    figure, axes = _axes(f"Speed-up over stock torch.compile, {device}", (8, 4.5))
    for name, line in lines.items():
        line.sort(key=lambda row: row.sizes["tokens"])
        axes.plot(
            [row.sizes["tokens"] for row in line],
            [row.ratios["of_inductor"] for row in line],
            marker="o",
            label=name,
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _layer(rows: Sequence[Row], device: str) -> Any:
    """Latency of whole layers over token counts."""
    line = sorted((row for row in rows if not row.chosen), key=lambda row: row.sizes["tokens"])
    line = [row for row in line if row.case.startswith("llama")]
    if len(line) < 2:
        return None
    figure, axes = _axes(f"Llama-3-8B-shaped decoder layer, block FP8, {device}", (8, 4.5))
    for way, colour, label in (
        ("plugin", OURS, "fusion-passes"),
        ("inductor", STOCK, "stock torch.compile, the same FP8 module"),
        ("bf16_inductor", OTHER, "stock torch.compile, bfloat16"),
    ):
        points = [(row.sizes["tokens"], row.warm_us[way]) for row in line if way in row.warm_us]
        axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens")
    axes.set_ylabel("microseconds")
    axes.legend(frameon=False, fontsize=8)
    return figure
