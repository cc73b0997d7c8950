"""A meaning: a function that stands in a graph for as long as the passes run; Inductor never sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def meaning(
    kind: str, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a function as a meaning. It computes what the custom op of its name defines, so a rewrite can be run.

    kind: how its operands are read (see :class:`fusion_passes.operations.Operation`). fake: the outputs without data.
    """

    def mark(fn: Callable[..., Any]) -> Callable[..., Any]:
        fn.meaning_kind, fn.fake = kind, fake  # type: ignore[attr-defined]
        return fn

    return mark
