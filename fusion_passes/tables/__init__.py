"""Which fusions are on by default, per GPU architecture: distilled from ``bench/results`` by ``python -m bench tune``.

Where a fusion that is on was still behind, in tokens and widths, stands with it (``"behind"``): it leaves such places
to stock unless somebody asked for it by name (see slower.py).

An architecture without a table takes the nearest older one, or the oldest there is; so does a CPU, on which
nothing fires anyway unless references are allowed.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
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


def _overlap(a: Sequence[int | None], b: Sequence[int | None]) -> bool:
    return (a[0] or 0) <= (b[1] if b[1] is not None else sys.maxsize) and (b[0] or 0) <= (
        a[1] if a[1] is not None else sys.maxsize
    )
