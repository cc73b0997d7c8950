"""Which implementation of a matrix product is fastest where, per GPU architecture: measured, never guessed at run time.

`python -m bench tune` distils `bench/results` into one JSON file per architecture. An architecture without one takes
the nearest older one, or the oldest there is; a product that was not measured takes the nearest N x K that was, by
the ratio of the sizes, and the least measured number of tokens that is not below its own (or the largest one).
Without any table nothing is preferred, and an op keeps its own order.
"""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import dataclass, field
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Best:
    """What won. implementation: its name. tile: the fastest of the Triton tiles, "" where none was measured.

    exact: whether this very N x K was measured, and not only the nearest to it.
    """

    implementation: str
    tile: str
    exact: bool = field(default=True, compare=False)


@functools.cache
def load() -> dict[int, dict[str, Any]]:
    """Every shipped table by its SM version (90 for `sm_90`)."""
    tables = {}
    for entry in resources.files(__name__).iterdir():
        if re.fullmatch(r"sm_\d+\.json", entry.name):
            table = json.loads(entry.read_text())
            tables[int(table["arch"].removeprefix("sm_"))] = table
    return tables


def nearest(capability: tuple[int, int]) -> dict[str, Any] | None:
    """The table for a compute capability, or None where there is no table at all."""
    tables = load()
    version = 10 * capability[0] + capability[1]
    older = [known for known in tables if known <= version]
    return tables[max(older) if older else min(tables)] if tables else None


@functools.lru_cache(maxsize=4096)
def best(op: str, kind: str, capability: tuple[int, int], m: int, n: int, k: int) -> Best | None:
    """The winner for a product of M x K by K x N, or None where nothing of its kind was measured.

    kind: what else of the arguments matters, in the words of the op, such as "int8 token".
    """
    table = nearest(capability)
    rows = (table or {}).get(op, {}).get(kind, [])
    if not rows:
        return None

    def distance(row: dict[str, Any]) -> float:
        return abs(math.log(max(n, 1) / row["n"])) + abs(math.log(max(k, 1) / row["k"]))

    place = min(rows, key=lambda row: (distance(row), row["n"], row["k"]))
    here = [row for row in rows if (row["n"], row["k"]) == (place["n"], place["k"])]
    above = [row for row in here if row["m"] >= m]
    row = min(above, key=lambda r: r["m"]) if above else max(here, key=lambda r: r["m"])
    return Best(row["implementation"], row["tile"], (row["n"], row["k"]) == (n, k))
