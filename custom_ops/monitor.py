"""Counts JIT compilations that happen although a warm-up was done, and refuses them where they must not happen.

An implementation asks here before it compiles: nothing is recorded until a warm-up has finished (`arm`).
Then each compilation is an event, logged once per kernel; with `strict` it is an error before it starts. In a
CUDA graph capture it is an error at any time. Triton asks through a hook (`jit.triton.watch_triton`), which sees the
kernels of this package only: other people's are not ours to warm up, and Inductor's are compiled with their graph.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch

log = logging.getLogger("custom_ops.jit")


class JitError(RuntimeError):
    """A kernel would have been compiled where that is not allowed."""


@dataclass(frozen=True)
class JitEvent:
    """A compilation after warm-up: which op, for which sizes, which kernel, and when (seconds since 1970)."""

    op: str
    implementation: str
    sizes: str
    kernel: str
    time: float


# Modules whose Triton kernels are watched.
WATCHED = ("custom_ops.",)

# What each call of an op runs through, with the op as `self` and its positional arguments as `args`.
entry_points: set[CodeType] = set()

_guard = threading.Lock()
_events: list[JitEvent] = []
_logged: set[str] = set()
_armed = False
_strict = False


def arm(strict: bool = False) -> None:
    """From now on compilations are events; with `strict`, errors."""
    global _armed, _strict
    _armed, _strict = True, strict


def disarm() -> None:
    """Compilations are what they were before a warm-up: expected. Forgets the events."""
    global _armed, _strict
    with _guard:
        _armed = _strict = False
        _events.clear()
        _logged.clear()


def armed() -> bool:
    return _armed


def events() -> tuple[JitEvent, ...]:
    """The compilations since warm-up, oldest first."""
    with _guard:
        return tuple(_events)


def compiling(op: str, implementation: str, sizes: str, kernel: str) -> None:
    """An implementation is about to compile a kernel. Raises JitError if the warm-up is strict."""
    if not _armed:
        return
    if _strict:
        raise JitError(
            f"{op}: {implementation} would compile {kernel} for {sizes}, which the warm-up did not cover "
            "(FUSION_PASSES_WARMUP_STRICT); warm up for a range of tokens that holds these sizes"
        )
    record(op, implementation, sizes, kernel)


def record(op: str, implementation: str, sizes: str, kernel: str) -> None:
    """Count a compilation that happened, or is about to."""
    if not _armed:
        return
    with _guard:
        _events.append(JitEvent(op, implementation, sizes, kernel, time.time()))
        known = f"{implementation} {kernel}" in _logged
        _logged.add(f"{implementation} {kernel}")
    if not known:
        log.warning("%s: %s compiles %s for %s after warm-up", op, implementation, kernel, sizes)


def triton_compiling(kernel: str, specialization: str) -> None:
    """Triton is about to compile a kernel, named with its module. Raises JitError like `compiling`, or in a capture."""
    if not kernel.startswith(WATCHED):
        return
    op, sizes = calling()
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise JitError(
            f"{op}: Triton has not compiled {kernel} for {sizes} yet, which must not happen while a CUDA graph is "
            "captured; warm up (fusion_passes.warmup), or run the op once with these sizes, before the capture"
        )
    compiling(op, "triton", sizes, specialization)


def calling() -> tuple[str, str]:
    """The op of this package that this thread is in, and the sizes it was called with: of the innermost one."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code in entry_points:
            op, args = frame.f_locals["self"], frame.f_locals["args"]
            return op.name, ", ".join(filter(None, map(_size_of, op.signature.parameters, args)))
        frame = frame.f_back  # type: ignore[assignment]
    return "custom_ops", "unknown sizes"


def _size_of(name: str, value: Any) -> str:
    return f"{name}={list(value.shape)}" if hasattr(value, "shape") else ""
