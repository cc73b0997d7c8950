"""What a map of sizes is: the rows of `bench.heat`, put together of several runs and summed up.

Apart from what measures them, for the tables, plots and pages that read them.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from bench.results import Row, Run

SUITE = "heat"
WIDTHS = (1024, 2048, 4096, 5120, 7168, 8192, 14336)
TOKENS = tuple(2**power for power in range(17))
AHEAD = 0.97
"""Of stock's speed: what is not below is not slower, up to the noise of a run."""
HEADS = ("op", f"not below {AHEAD}", "median", "least")


def of(runs: Sequence[Run]) -> list[Run]:
    """Those runs that are maps."""
    return [run for run in runs if run.suite == SUITE]


def merged(runs: Sequence[Run]) -> Run:
    """One map of several of one device: of a point that was measured more than once, the median of each side.

    What it says of where it comes from is the last run's, with the commits of all and how many there were.
    """
    last = max(runs, key=lambda run: run.date)
    with_rows = [run for run in runs if run.rows]
    if len(with_rows) <= 1:
        return dataclasses.replace(last, rows=[row for run in runs for row in run.rows])
    found: dict[tuple[Any, ...], list[Row]] = {}
    for run in with_rows:
        for row in run.rows:
            if "of_inductor" in row.ratios:
                found.setdefault(row.key, []).append(row)
    whole = dataclasses.replace(
        last,
        commit=", ".join(dict.fromkeys(run.commit for run in with_rows)),
        command=f"{last.command} (merged of {len(with_rows)} runs, medians)",
        copy_gbps=statistics.median(run.copy_gbps for run in with_rows),
        rows=[],
    )
    for rows in found.values():
        times = {
            side: statistics.median(row.warm_us[side] for row in rows)
            for side in ("ours", "inductor")
        }
        row = dataclasses.replace(rows[-1], warm_us=times, ratios={}, errors={})
        row.finish(whole.copy_gbps)
        whole.rows.append(row)
    return whole


def measured(runs: Sequence[Run]) -> set[tuple[str, int, int]]:
    """The points of earlier maps where both sides were timed."""
    return {
        (row.case.removeprefix(f"{SUITE}_"), row.sizes["tokens"], row.sizes["width"])
        for run in of(runs)
        for row in run.rows
        if "of_inductor" in row.ratios
    }


def summary(rows: Sequence[Row]) -> list[tuple[str, str, str, str]]:
    """Of each op: points, the part of them that is not slower, the median, and the worst."""
    found = []
    for case in dict.fromkeys(row.case for row in rows):
        timed = [row for row in rows if row.case == case and "of_inductor" in row.ratios]
        if not timed:
            continue
        timed.sort(key=lambda row: row.ratios["of_inductor"])
        ahead = sum(row.ratios["of_inductor"] >= AHEAD for row in timed)
        worst, middle = timed[0], timed[len(timed) // 2]
        found.append(
            (
                case.removeprefix("heat_"),
                f"{ahead} of {len(timed)}",
                f"{middle.ratios['of_inductor']:.2f}",
                f"{worst.ratios['of_inductor']:.2f} at {worst.sizes['tokens']} x {worst.sizes['width']}",
            )
        )
    return found
