"""Which fusions are on by default, per GPU architecture: distilled from ``bench/results`` by ``python -m bench tune``.

An architecture without a table takes the nearest older one, or the oldest there is; so does a CPU, on which
nothing fires anyway unless references are allowed.
"""

from __future__ import annotations

import functools
import json
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
