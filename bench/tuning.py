"""Distils results into `fusion_passes/tables/<arch>.json`: which fusions are on by default, and the rows that say so.

A fusion is on where it is ahead of stock `torch.compile`: never below 0.97 of it (the noise of a run), and
above 1 somewhere. A fusion with cases of its own is judged by those, any other by the models in which it
fired. The time of the plugin counts, not that of the bare op.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import ROOT, Row, Run, newest

TABLES = ROOT / "fusion_passes" / "tables"
NOISE = 0.97


def write(runs: Sequence[Run], folder: Path) -> list[Path]:
    """One table per GPU architecture in the results; returns the paths."""
    from fusion_passes.fusion import registry

    paths = []
    on_gpus = [run for run in runs if run.device["arch"] != "cpu"]
    for arch in dict.fromkeys(run.device["arch"] for run in on_gpus):
        devices = newest([run for run in on_gpus if run.device["arch"] == arch])
        table = distil([pair for pairs in devices.values() for pair in pairs], list(registry()))
        path = folder / f"{arch}.json"
        path.write_text(json.dumps(table, indent=1) + "\n")
        paths.append(path)
    return paths


def distil(pairs: Sequence[tuple[Run, Row]], fusions: Sequence[str]) -> dict[str, Any]:
    latest = max((run for run, _ in pairs), key=lambda run: run.date)
    return {
        "arch": latest.device["arch"],
        "device": ", ".join(dict.fromkeys(run.device["name"] for run, _ in pairs)),
        "commit": latest.commit,
        "fusions": {name: verdict(name, [row for _, row in pairs]) for name in fusions},
    }


def verdict(fusion: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Whether a fusion is on, the sentence that says why, and the rows behind it."""
    own = [row for row in rows if row.fusion == fusion]
    judged = [
        row for row in (own or rows) if fusion in row.fired or (own and "plugin" in row.errors)
    ]
    # what failed on one device of the architecture counts as measured where another has the same sizes
    measured = {row.key for row in judged if "plugin_of_inductor" in row.ratios}
    judged = [
        row for row in judged if "plugin_of_inductor" in row.ratios or row.key not in measured
    ]
    if not judged:
        return {"on": False, "why": "not measured", "rows": []}
    speedups = [round(row.ratios.get("plugin_of_inductor", 0.0), 3) for row in judged]
    evidence = [
        {"case": row.case, **row.sizes, "speedup": speedup}
        for row, speedup in zip(judged, speedups)
    ]
    on = min(speedups) >= NOISE and max(speedups) > 1.0
    if broken := [row for row in judged if "plugin_of_inductor" not in row.ratios]:
        why = f"{broken[0].label} was not measured"
    else:
        span = f"{min(speedups):.2f} to {max(speedups):.2f} times stock torch.compile"
        sizes = sorted(row.sizes["tokens"] for row in judged)
        why = f"{'ahead' if on else 'not ahead'}: {span} at {sizes[0]} to {sizes[-1]} tokens"
    return {"on": on, "why": why, "rows": evidence}
