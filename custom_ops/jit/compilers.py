"""The compilers by implementation. One for grouped products or FlashInfer's modules is added with `register`."""

from __future__ import annotations

import importlib

from custom_ops.jit.kernel import Compiler

# Implementation -> "module:object", imported when a graph needs it.
_shipped = {
    "deep_gemm": "custom_ops.jit.deep_gemm:COMPILER",
    "cuda": "custom_ops.jit.cuda:COMPILER",
}
# Implementations that compile while they run, and that nobody can enumerate yet: a plan says so.
_uncovered = {
    "triton": "specializations of Triton kernels are not enumerated, the first call of each compiles it",
}
_registered: dict[str, Compiler] = {}


def register(implementation: str, compiler: Compiler) -> None:
    """Say who compiles for an implementation, by the name that it has in its op.

    Raises ValueError for a name that has a compiler already.
    """
    if implementation in _shipped or implementation in _registered:
        raise ValueError(f"implementation {implementation!r} has a compiler already")
    _registered[implementation] = compiler


def unregister(implementation: str) -> None:
    """Take back what `register` did."""
    del _registered[implementation]


def uncovered(implementation: str) -> str | None:
    """Why the kernels of an implementation cannot be compiled ahead although it has some, or None."""
    return None if implementation in _registered else _uncovered.get(implementation)


def find(implementation: str) -> Compiler | None:
    """The compiler of an implementation, or None where it compiles nothing while it runs."""
    if implementation in _registered:
        return _registered[implementation]
    if (target := _shipped.get(implementation)) is None:
        return None
    module, _, name = target.partition(":")
    compiler = getattr(importlib.import_module(module), name)
    assert isinstance(compiler, Compiler)
    return compiler
