"""What a compilation did: what fired where, what it saves, what almost fired and why not."""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import sympy

from custom_ops.jit.kernel import Problem
from fusion_passes import settings

__all__ = ["NearMiss", "Report", "Site", "add", "report", "reports", "reset_reports"]


@dataclass(frozen=True)
class Site:
    """One rewrite. ``bytes_saved``: an expression over the graph's sizes; ``bytes_saved_here``: at the sizes traced."""

    fusion: str
    module: str
    pattern: str = ""
    implementations: tuple[str, ...] = ()
    sizes: dict[str, str] = field(default_factory=dict)
    bytes_saved: str = "0"
    bytes_saved_here: int | None = None


@dataclass(frozen=True)
class NearMiss:
    """A place that a fusion recognized in part, or recognized and must not rewrite, and the reason."""

    fusion: str
    module: str
    node: str
    reason: str


@dataclass
class Report:
    """One compiled graph. Printing it gives a table; ``to_json`` everything.

    problems: the nodes whose implementation compiles kernels when it runs, for a warm-up.
    """

    graph: str = ""
    device: str = ""
    sites: list[Site] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    states: dict[str, tuple[bool, str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    nodes_before: int = 0
    nodes_after: int = 0
    from_cache: bool = False
    problems: list[Problem] = field(default_factory=list)

    @property
    def matches(self) -> dict[str, int]:
        """How often each fusion fired; a fusion that did not fire is not in it."""
        return dict(Counter(site.fusion for site in self.sites))

    @property
    def bytes_saved(self) -> dict[str, tuple[sympy.Expr, int | None]]:
        """Per fusion, the memory traffic saved in one call: over the graph's symbolic sizes, and at the sizes seen."""
        totals: dict[str, tuple[sympy.Expr, int | None]] = {}
        for site in self.sites:
            expression, here = totals.get(site.fusion, (sympy.Integer(0), 0))
            known = (
                None
                if here is None or site.bytes_saved_here is None
                else here + site.bytes_saved_here
            )
            totals[site.fusion] = (
                sympy.expand(expression + sympy.sympify(site.bytes_saved)),
                known,
            )
        return totals

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "matches": self.matches}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Report:
        data = json.loads(text)
        data.pop("matches", None)
        data["sites"] = [
            Site(**{**site, "implementations": tuple(site["implementations"])})
            for site in data["sites"]
        ]
        data["near_misses"] = [NearMiss(**miss) for miss in data["near_misses"]]
        data["problems"] = [Problem.from_json(problem) for problem in data.get("problems", [])]
        data["states"] = {name: (bool(on), why) for name, (on, why) in data["states"].items()}
        return cls(**data)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=140, color_system=None, markup=False)  # "[8, 128]" is no style
        with console.capture() as capture:
            for table in self._tables():
                console.print(table)
            if idle := self._idle:
                console.print(f"on, and fired nowhere: {', '.join(idle)}")
            for note in self.notes:
                console.print(f"note: {note}")
        return capture.get().rstrip()

    @property
    def _idle(self) -> list[str]:
        """The fusions that are on and did not fire: most of them, in most graphs, so that they get no row each."""
        return [name for name, (on, _) in self.states.items() if on and name not in self.matches]

    def _tables(self) -> Iterable[Any]:
        from rich.table import Table

        cached = ", from the cache" if self.from_cache else ""
        table = Table(
            title=f"{self.graph or 'graph'} on {self.device or '?'}: "
            f"{self.nodes_before} -> {self.nodes_after} nodes{cached}"
        )
        for column in ("fusion", "fired", "bytes saved", "at the sizes seen", "state"):
            table.add_column(column, overflow="fold")
        saved, idle = self.bytes_saved, set(self._idle)
        rows = [(name, *state) for name, state in self.states.items() if name not in idle]
        for name, on, why in sorted(rows, key=lambda row: not row[1]):  # what fired first
            expression, here = saved.get(name, ("", None))
            fired = str(self.matches.get(name, 0)) if on else "off"
            table.add_row(name, fired, str(expression), "" if here is None else f"{here:,}", why)
        yield table
        if self.near_misses:
            misses = Table(title="almost")
            for column in ("fusion", "where", "node", "why not"):
                misses.add_column(column, overflow="fold")
            for (fusion, reason), group in _grouped(self.near_misses).items():
                where = group[0].module + (f" and {len(group) - 1} more" if len(group) > 1 else "")
                misses.add_row(fusion, where, group[0].node, reason)
            yield misses


def _grouped(misses: Iterable[NearMiss]) -> dict[tuple[str, str], list[NearMiss]]:
    """By fusion and reason, whatever numbers the nodes in it have: the same place of each layer is one line."""
    alike: dict[tuple[str, str], list[NearMiss]] = {}
    for miss in misses:
        alike.setdefault((miss.fusion, re.sub(r"(?<=[a-z])_\d+\b", "", miss.reason)), []).append(
            miss
        )
    return {(fusion, found[0].reason): found for (fusion, _), found in alike.items()}


_lock = threading.Lock()
_reports: list[Report] = []


def add(new: Report) -> None:
    with _lock:
        _reports.append(new)


def publish(new: Report, destination: bool | Path) -> None:
    """What ``FUSION_PASSES_REPORT`` asks for: print the report, or write all reports so far to a file as JSON."""
    if destination is True:
        print(new)
    elif destination:
        text = "[" + ",\n".join(each.to_json() for each in reports()) + "]\n"
        with settings.naming("report", destination):
            write(Path(destination), text)


def write(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or nothing, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def report() -> Report:
    """The report of the latest compilation, with a note of what fired in the others.

    Raises LookupError when nothing was compiled yet.
    """
    with _lock:
        if not _reports:
            raise LookupError(
                "no graph was compiled with fusion_passes yet: call the compiled model first"
            )
        *others, latest = _reports
    if not others:
        return latest
    # a call may break into several graphs, the last of which has nothing to fuse
    fired = sum((Counter(other.matches) for other in others), Counter())
    what = ", ".join(f"{count} {name}" for name, count in fired.items()) or "nothing"
    note = f"the latest of {len(others) + 1} graphs; fired in the others (fusion_passes.reports()): {what}"
    return replace(latest, notes=[*latest.notes, note])


def reports() -> list[Report]:
    """All reports since the start or the last :func:`reset_reports`, oldest first."""
    with _lock:
        return list(_reports)


def reset_reports() -> None:
    with _lock:
        _reports.clear()
