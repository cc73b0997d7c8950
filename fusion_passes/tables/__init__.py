"""Which fusions are on by default, per GPU architecture: distilled from ``bench/results`` by ``python -m bench tune``.

Where a fusion that is on was still behind, in tokens and widths, stands with it (``"behind"``): it leaves such places
to stock unless somebody asked for it by name (see slower.py).

An architecture without a table takes the nearest older one, or the oldest there is; so does a CPU, on which
nothing fires anyway unless references are allowed.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import torch

from custom_ops import platform


def arch_of(device: torch.device) -> str:
    """``"sm_90"`` and the like for a GPU, ``"cpu"`` for a CPU."""
    capability = platform.cuda_capability(device) if device.type == "cuda" else None
    return "sm_{}{}".format(*capability) if capability else device.type


@functools.cache
def load() -> dict[int, dict[str, Any]]:
    """Every shipped table by its SM version (90 for ``sm_90``)."""
    tables = {}
    for entry in resources.files(__name__).iterdir():
        if entry.name.endswith(".json"):
            table = json.loads(entry.read_text())
            tables[int(table["arch"].removeprefix("sm_"))] = table
    return tables


def nearest(arch: str) -> dict[str, Any] | None:
    tables = load()
    if not tables:
        return None
    version = int(arch.removeprefix("sm_")) if arch.startswith("sm_") else max(tables)
    older = [known for known in tables if known <= version]
    return tables[max(older) if older else min(tables)]


def default_state(name: str, arch: str) -> tuple[bool, str]:
    """Whether a fusion is on by default on an architecture, and the sentence that says why."""
    table = nearest(arch)
    row = (table or {}).get("fusions", {}).get(name)
    if table is None or row is None:
        return False, f"no measurement of {name} is in the tables"
    return bool(row["on"]), f"{row['why']} ({table['arch']} table)"


NOISE = 0.97
"""What a run may be below stock by chance."""

Bounds = tuple[int, int | None]
"""The least and the largest value of a size; None where there is no largest."""


def slower(
    name: str, arch: str, dtype: torch.dtype | None, tokens: Bounds, width: Bounds
) -> str | None:
    """The sentence that says where a fusion is slower than stock, if it is anywhere within the bounds of a place.

    dtype: of the codes that it makes. A graph for many token counts runs for each of them, so one that is behind is
    enough. Nothing was measured on a CPU, where every fusion is as its table says.
    """
    if arch == "cpu" or dtype is None:
        return None
    row = (nearest(arch) or {}).get("fusions", {}).get(name, {})
    for region in row.get("behind", ()):
        if (
            region["dtype"] == str(dtype).removeprefix("torch.")
            and _overlap(tokens, region["tokens"])
            and _overlap(width, region["width"])
        ):
            return f"is slower than stock there: {region['why']}"
    return None


def slower_nearby(name: str, arch: str, sizes: Mapping[str, Any], tokens: Bounds) -> str | None:
    """The sentence of the row, nearest to a place, that says that a fusion is slower than stock; None where none does.

    sizes: those of the place but for tokens, by their names in the rows; what is no number has to be the row's.
    Nearest: by the ratios of all sizes; of two as near, the slower. Of a graph for many token counts each of those that
    were measured is tried, and both ends. Nothing was measured on a CPU.
    """
    if arch == "cpu":
        return None
    table = nearest(arch) or {}
    numbers = {key: value for key, value in sizes.items() if isinstance(value, int)}
    words = {key: value for key, value in sizes.items() if key not in numbers}
    rows = [
        row
        for row in table.get("fusions", {}).get(name, {}).get("rows", ())
        if all(row.get(key) == word for key, word in words.items())
        and all(key in row for key in (*numbers, "tokens"))
    ]
    counts = {row["tokens"] for row in rows if _overlap(tokens, (row["tokens"], row["tokens"]))}
    counts |= {tokens[0]} if tokens[1] is None else {tokens[0], tokens[1]}
    behind = []
    for count in sorted(counts) if rows else ():
        here = {**numbers, "tokens": count}
        row = min(rows, key=lambda row: (round(_distance(row, here), 6), row["speedup"]))
        if row["speedup"] < NOISE:
            behind.append(row)
    if not behind:
        return None
    slowest = min(behind, key=lambda row: row["speedup"])
    at = ", ".join(f"{key} {slowest[key]}" for key in ("tokens", *sizes))
    return f"is slower than stock there: {slowest['speedup']:.2f} times stock torch.compile at {at}"


def _distance(row: Mapping[str, Any], sizes: Mapping[str, int]) -> float:
    return sum(abs(math.log(max(size, 1) / max(row[key], 1))) for key, size in sizes.items())


def _overlap(a: Sequence[int | None], b: Sequence[int | None]) -> bool:
    return (a[0] or 0) <= (b[1] if b[1] is not None else sys.maxsize) and (b[0] or 0) <= (
        a[1] if a[1] is not None else sys.maxsize
    )
