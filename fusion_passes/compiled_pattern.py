"""A pattern as the matcher uses it: traced once, its numbers decomposed into size names, its leaves named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import sympy
import torch

from fusion_passes import torch_internals
from fusion_passes.fusion import Pattern, Scalar, SizeOf, Tensor
from fusion_passes.index_map import Size
from fusion_passes.operations import Operation, describe, read, transparent

# sizes and scalars of a trace: distinct, and like no constant that a pattern could hold
_PRIMES = (1009, 1013, 1019, 1021, 1031, 1033, 1039, 1049)
_SCALARS = (0.12345678, 0.23456789, 0.34567891, 0.45678912)

Monomial = tuple[int, tuple[str, ...]]
"""A number times size names: ``(128, ("num_tokens", "num_groups"))``."""


class CompiledPattern:
    """A pattern's trace, in which every number is a product of size names and every leaf has a name."""

    def __init__(self, pattern: Pattern, canonical: bool = True) -> None:
        self.pattern = pattern
        specs = pattern.inputs.values()
        expressions = [
            e
            for spec in specs
            for e in (
                spec.shape
                if isinstance(spec, Tensor)
                else (spec.name,)
                if isinstance(spec, SizeOf)
                else ()
            )
        ]
        names = dict.fromkeys(
            str(s) for e in expressions for s in sorted(sympy.sympify(e).free_symbols, key=str)
        )
        self.sizes = dict(zip(names, _PRIMES, strict=False))
        if len(names) > len(_PRIMES):
            raise ValueError(
                f"pattern {pattern.name!r} has {len(names)} sizes; accepted: up to {len(_PRIMES)}"
            )
        self._values = {e: int(sympy.sympify(e).subs(self.sizes)) for e in expressions}
        scalars = [name for name, spec in pattern.inputs.items() if isinstance(spec, Scalar)]
        self.scalars = dict(zip(scalars, _SCALARS, strict=False))
        if len(scalars) > len(_SCALARS):
            raise ValueError(
                f"pattern {pattern.name!r} has {len(scalars)} scalars; accepted: up to {len(_SCALARS)}"
            )
        tensors = {name: spec for name, spec in pattern.inputs.items() if isinstance(spec, Tensor)}
        self.graph = torch_internals.trace_pattern(
            lambda *args: pattern.fn(**self._arguments(dict(zip(tensors, args, strict=True)))),
            [
                (tuple(self.value(e) for e in spec.shape), spec.dtype or torch.bfloat16)
                for spec in tensors.values()
            ],
        )
        if canonical:
            from fusion_passes.canonical import recognition

            recognition.recognize(self.graph)
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        self.leaves = dict(zip(placeholders, tensors, strict=True))
        outputs = next(node for node in self.graph.nodes if node.op == "output").args[0]
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        self.outputs = [read(node, None)[-1][0] for node in outputs]
        self.operations = [
            node for node in self.graph.nodes if describe(node) and transparent(node) is None
        ]

    def _arguments(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        specs = self.pattern.inputs.items()
        sizes = {name: self.sizes[spec.name] for name, spec in specs if isinstance(spec, SizeOf)}
        return {**tensors, **self.scalars, **sizes}

    def value(self, expression: str) -> int:
        return self._values[expression]

    def monomial(self, size: Size) -> Monomial:
        """A number of the trace as a product of size names."""
        names, rest = [], int(size)
        for name, prime in self.sizes.items():
            while rest and rest % prime == 0:
                names.append(name)
                rest //= prime
        return rest, tuple(names)

    def is_size(self, number: int) -> bool:
        return bool(number) and any(number % prime == 0 for prime in self.sizes.values())

    def scalar_name(self, value: Any) -> str | None:
        if isinstance(value, float):
            for name, sentinel in self.scalars.items():
                if math.isclose(value, sentinel, rel_tol=1e-6):
                    return name
        return None

    @cached_property
    def anchor(self) -> Operation:
        operation = describe(self.outputs[0])
        if operation is None:
            raise ValueError(
                f"pattern {self.pattern.name!r}: its first output is one of its inputs"
            )
        return operation


_compiled: dict[tuple[int, bool], tuple[Pattern, CompiledPattern]] = {}


def compile_pattern(pattern: Pattern, canonical: bool = True) -> CompiledPattern:
    """Trace a pattern, once a process; ``canonical``: and bring it to the form that graphs are brought to."""
    key = (id(pattern), canonical)
    entry = _compiled.get(key)
    if entry is None or entry[0] is not pattern:
        entry = _compiled[key] = (pattern, CompiledPattern(pattern, canonical))
    return entry[1]
