"""What `python -m bench moe` measured, of the newest rows of each device: its pictures, and its part of docs/moe.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench import moe, moe_shared
from bench.results import ROOT, Row, Run, newest

SUITES = ("moe_profile", moe_shared.SUITE)
PROFILE, MEMORY = "moe_profile_", "moe_memory_"
Tabulate = Callable[[Iterable[str], Iterable[Iterable[str]]], str]


def of(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.suite in SUITES]


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """A picture for each block that was profiled; returns the paths."""
    paths = []
    for device, pairs in newest(of(runs)).items():
        paths += moe.draw(_cases([row for _, row in pairs], PROFILE), device, folder)
    return paths


def _cases(rows: Sequence[Row], prefix: str) -> list[Row]:
    return [row for row in rows if row.case.startswith(prefix)]


def section(device: str, rows: Sequence[Row], folder: Path, table: Tabulate) -> list[str]:
    """Paragraphs of Markdown: the parts of each block, the memory of a long call, shared experts on a second stream.

    folder: of the pictures. table: makes one of its heads and rows.
    """
    parts = []
    if profiles := _cases(rows, PROFILE):
        heads = (*moe.PARTS, "block", "floor", "of floor", "align + permute", "experts hit")
        parts += [
            f"Mixtures of experts on an {device}, router included, by our ops: microseconds of each part alone and of "
            "the block, each in a CUDA graph. The floor is the weights of the experts that are hit, read once at 3.0 "
            "TB/s, or the operations at 790 TFLOP/s (1580 in FP8):",
            table(("block", "tokens", "experts by", *heads), map(_profile, profiles)),
        ]
        pictures = (moe.picture(row.case, device) for row in profiles)
        links = [
            f"[{path.stem}]({(folder / path).relative_to(ROOT)})"
            for path in dict.fromkeys(pictures)
        ]
        parts.append(f"As pictures: {', '.join(links)}.")
    if memory := _cases(rows, MEMORY):
        parts += [
            "Memory of one call of `fused_moe` beyond its arguments, in MiB, by `CUSTOM_OPS_MOE_CHUNK_TOKENS`:",
            table(("block", "tokens", "chunk", "peak", "of it the result"), map(_memory, memory)),
        ]
    if shared := _cases(rows, moe_shared.SUITE):
        parts += [
            "Shared experts after the routed ones, and on a second stream beside them:",
            table(("block", "tokens", *moe_shared.WAYS, "ratio"), map(_shared, shared)),
        ]
    return parts


def _profile(row: Row) -> tuple[str, ...]:
    times, ratios = row.warm_us, row.ratios
    return (
        f"`{row.case.removeprefix(PROFILE)}`",
        str(row.sizes["tokens"]),
        f"`{next(iter(row.fired))}`",
        *(f"{times[part]:.1f}" for part in (*moe.PARTS, "block")),
        f"{ratios['floor_us']:.1f}",
        f"{ratios['of_floor']:.2f}",
        f"{100 * ratios['align_and_permute']:.0f}%",
        f"{ratios['experts_hit']:.0f}",
    )


def _memory(row: Row) -> tuple[str, ...]:
    sizes = (row.sizes["tokens"], row.sizes["chunk"])
    mib = (row.ratios[f"{name}_mib"] for name in ("peak", "output"))
    return (
        f"`{row.case.removeprefix(MEMORY)}`",
        *map(str, sizes),
        *(f"{amount:.0f}" for amount in mib),
    )


def _shared(row: Row) -> tuple[str, ...]:
    return (
        f"`{row.case.removeprefix(moe_shared.SUITE + '_')}`",
        str(row.sizes["tokens"]),
        *(f"{row.warm_us[way]:.1f}" for way in moe_shared.WAYS),
        f"{row.ratios['beside']:.2f}",
    )
