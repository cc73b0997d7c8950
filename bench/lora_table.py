"""`python -m bench.lora_table [results folder]`: distils the lora suite into custom_ops/tables/lora_sm_90.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import results
from bench.results import FOLDER, ROOT, Row, Run
from custom_ops.lora.ways import WAYS

TABLE = ROOT / "custom_ops" / "tables" / "lora_sm_90.json"
NEAR = 0.05  # what the state of a GPU turns from one run to the next
KINDS = {
    "lora_linear_single": "single",
    "lora_linear_single_float32": "single float32",
    "lora_linear": "batch",
    "lora_named_single": "single",
    "lora_named_single_float32": "single float32",
    "lora_named_batch": "batch",
}


def has_ways(row: Row) -> bool:
    """Whether a row is of the lora suite, with the ways of a linear layer timed one by one."""
    return row.case in KINDS and any(name.startswith("way ") for name in row.warm_us)


def ways_of(row: Row) -> dict[str, float]:
    """The microseconds of each way that there still is: results name some that were not kept."""
    times = {f"way {way}": way for way in WAYS}
    return {times[name]: us for name, us in row.warm_us.items() if name in times}


def overturns(row: Row, before: Row) -> bool:
    """Whether a later row of a size takes the place of one before it: not if it only turns what is near each other."""
    now, then = ways_of(row), ways_of(before)
    first = min(then, key=then.__getitem__)
    if not now.keys() <= then.keys() or first not in now:
        return True
    best = min(now.values())
    return now[first] == best or now[first] > best * (1 + NEAR)


def distil(pairs: Sequence[tuple[Run, Row]]) -> dict[str, Any]:
    """A row for each kind and size, with the microseconds of each way; the row of ways that is measured last decides.

    Unless it has the same ways in another order, and the fastest of before within `NEAR`: then that one stays. Batches
    of one size differ in their adapters, which a call does not know: the slowest of them counts for each way.
    """
    measured = [(run, row) for run, row in pairs if has_ways(row)]
    if not measured:
        raise ValueError("results: there is no row of the lora suite")
    # one size may have been measured under two names of a case
    newest: dict[tuple[Any, ...], Row] = {}
    for _, row in sorted(measured, key=lambda pair: pair[0].date):
        size = KINDS[row.case], *sorted(row.sizes.items())
        if size not in newest or overturns(row, newest[size]):
            newest[size] = row
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in newest.values():
        n, k, rank, m = (row.sizes[name] for name in ("n", "k", "rank", "tokens"))
        us = times.setdefault((KINDS[row.case], n, k, rank, m), {})
        for way, time in ways_of(row).items():
            us[way] = max(us.get(way, 0.0), round(time, 2))
    latest = max((run for run, _ in measured), key=lambda run: run.date)
    rows = [
        dict(zip(("kind", "n", "k", "rank", "m"), key)) | {"us": us}
        for key, us in sorted(times.items())
        if us
    ]
    return {
        "arch": latest.device["arch"],
        "device": latest.device["name"],
        "commit": latest.commit,
        "rows": rows,
    }


def main(folder: Path = FOLDER) -> None:
    pairs = [(run, row) for run in results.load_all(folder) for row in run.rows]
    TABLE.write_text(json.dumps(distil(pairs), indent=1) + "\n")
    print(TABLE.relative_to(ROOT))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
