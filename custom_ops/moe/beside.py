"""Work on a second stream beside that of the current one. Captured, it is a fork and a join of the CUDA graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")


def beside(first: Callable[[], A], second: Callable[[], B], device: torch.device) -> tuple[A, B]:
    """first() on the current stream and second() on another one, which starts when all before it is done; the current
    stream goes on when both are done. One after the other where the device has no streams.

    What second() allocates belongs to the other stream. It may be used and dropped on the current one: whoever gets its
    memory there next has waited, here, for all that was asked of the current stream before.
    """
    if device.type != "cuda":
        return first(), second()
    current, other = torch.cuda.current_stream(device), _other(device)
    other.wait_stream(current)
    with torch.cuda.stream(other):
        theirs = second()
    ours = first()
    current.wait_stream(other)
    return ours, theirs


@functools.cache
def _other(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
