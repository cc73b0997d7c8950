"""Draws the newest rows of each device as PNGs: bandwidth, speed-up over tokens, latency of whole layers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import Row, Run, newest

OURS, STOCK, OTHER = "#0b6e99", "#b8b8b8", "#d98c3f"


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write the plots of every device; returns the paths. A plot without data is not drawn."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for device, pairs in newest(runs).items():
        rows = [row for _, row in pairs if row.ours_us and "tokens" in row.sizes]
        for name, plot in (("bandwidth", _bandwidth), ("speedup", _speedup), ("layer", _layer)):
            figure = plot(rows, device)
            if figure is not None:
                slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
                paths.append(folder / f"{name}-{slug}.png")
                figure.savefig(paths[-1], dpi=144, bbox_inches="tight")
    return paths


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
        if not row.flops and row.sizes["tokens"] >= largest.get(row.case, row).sizes["tokens"]:
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
