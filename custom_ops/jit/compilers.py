"""The compilers by implementation; `register` adds one."""

from __future__ import annotations

import importlib

from custom_ops.jit.kernel import Compiler

# Implementation -> "module:object", imported when a graph needs it.
_shipped = {
    "deep_gemm": "custom_ops.jit.deep_gemm:COMPILER",
    "cuda": "custom_ops.jit.cuda:COMPILER",
    "triton": "custom_ops.jit.triton:COMPILER",
    "flashinfer": "custom_ops.jit.flashinfer:COMPILER",
}
# Runs whatever PyTorch has.
_NOTHING = "reference"
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


def find(implementation: str) -> Compiler | None:
    """The compiler of an implementation's kernels, or None if it has none."""
    if implementation in _registered:
        return _registered[implementation]
    if (target := _shipped.get(implementation)) is None:
        return None
    module, _, name = target.partition(":")
    compiler = getattr(importlib.import_module(module), name)
    assert isinstance(compiler, Compiler)
    return compiler


def enumerator(op: str, implementation: str) -> Compiler | None:
    """Who says which kernels an op reaches through an implementation; None where nothing is compiled.

    The implementation's own compiler if it knows the op. If not, the op is traced: it may compile with any of them.
    """
    compiler = find(implementation)
    if compiler is not None and compiler.knows(op):
        return compiler
    return None if implementation == _NOTHING else find("triton")
