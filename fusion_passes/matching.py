"""Finds a pattern's meaning in a user's graph.

Both sides are read through one pair of glasses (:mod:`fusion_passes.operations`): a node is an operation with
operands, and each operand is a *base* value plus an :class:`~fusion_passes.index_map.IndexMap` that says how
views, expands and slices in between rearrange it. Matching then has three steps:

1. *Shape-free*: operations, dtypes and constants are unified from the pattern's first output upwards,
   commutative operands in either order; leaves of the pattern capture values of the graph.
2. *Sizes*: every shape met on the way is an equation between a monomial of the pattern's size names
   (``num_tokens * hidden_size``) and an expression of the graph; they are solved for the names.
3. *Maps*: with the sizes known, the index maps of both sides must agree, operand by operand.

The pattern is traced once, over sizes that are distinct primes, so that each number in its trace factors
into size names without ambiguity. Nothing here adds a guard: sizes are compared as expressions.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fusion_passes import index_map
from fusion_passes.arithmetic import Arithmetic
from fusion_passes.compiled_pattern import CompiledPattern, Monomial, compile_pattern
from fusion_passes.fusion import Fusion, Pattern, Tensor
from fusion_passes.index_map import IndexMap, Size
from fusion_passes.mismatch import Mismatch, another, digits, named, part, product_of, short
from fusion_passes.operations import (
    COMMUTATIVE,
    Operation,
    describe,
    is_constant,
    is_tensor,
    read,
    shape_of,
    uncut,
)

aten = torch.ops.aten
ACTIVATION_DTYPES = (torch.bfloat16, torch.float16)


@dataclass
class Match:
    """A pattern found in a graph. ``rewrite`` functions read it and emit nodes through it."""

    fusion: Fusion
    compiled: CompiledPattern
    graph: fx.Graph
    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    arithmetic: Arithmetic | None = None
    sizes: dict[str, Size] = field(default_factory=dict)
    scalars: dict[str, float | fx.Node] = field(default_factory=dict)
    captured: dict[str, list[tuple[fx.Node, IndexMap, IndexMap]]] = field(default_factory=dict)
    maps: list[tuple[IndexMap, IndexMap, fx.Node]] = field(default_factory=list)
    equations: list[tuple[Monomial, Size, fx.Node]] = field(default_factory=list)

    @property
    def constants(self) -> Mapping[str, Any]:
        return self.compiled.pattern.constants

    @property
    def spelling(self) -> str:
        return self.compiled.pattern.name

    @property
    def limits(self) -> Mapping[fx.Node, int]:
        """For inputs that are indices, the number that they stay below."""
        return {}

    @property
    def outputs(self) -> list[fx.Node]:
        return [self.nodes[node] for node in self.compiled.outputs]

    @property
    def device(self) -> torch.device:
        return self.outputs[0].meta["val"].device

    def value(self, monomial: Monomial) -> tuple[Size, list[str]]:
        """The product of a monomial's known factors, and the names of the sizes that are not known yet."""
        number, names = monomial
        known = index_map.product(
            [number, *(self.sizes[name] for name in names if name in self.sizes)]
        )
        return known, [name for name in names if name not in self.sizes]

    def resolve(self, expression: str) -> Size:
        """The value in the graph of an expression over size names."""
        value, unknown = self.value(self.compiled.monomial(self.compiled.value(expression)))
        if unknown:
            raise ValueError(f"the size {unknown[0]} is not known in this match")
        return value

    def complete(self) -> None:
        """Find the outputs that are read from a tuple beside the first one; one that nobody reads is made."""
        for output in self.compiled.outputs:
            if output not in self.nodes and output.target is operator.getitem:
                source, index = self.nodes[output.args[0]], output.args[1]
                found = [
                    user
                    for user in source.users
                    if user.target is operator.getitem and user.args[1] == index
                ]
                if not found:
                    with self.graph.inserting_after(source):
                        found = [self.graph.call_function(operator.getitem, (source, index))]
                    found[0].meta["val"] = source.meta["val"][index]
                self.nodes[output] = found[0]

    def base(self, name: str) -> fx.Node:
        """The captured tensor before any view that the user's code took of it."""
        return self.captured[name][-1][0]

    def copy_from(self, other: Match) -> None:
        for name in ("nodes", "sizes", "scalars", "captured"):
            setattr(self, name, dict(getattr(other, name)))
        self.dtype, self.arithmetic = other.dtype, other.arithmetic
        self.maps, self.equations = list(other.maps), list(other.equations)

    def snapshot(self) -> Match:
        saved = Match(self.fusion, self.compiled, self.graph)
        saved.copy_from(self)
        return saved


class Matcher:
    """Unifies one compiled pattern with one place of a graph, remembering how far it came."""

    def __init__(
        self, fusion: Fusion, compiled: CompiledPattern, graph: fx.Graph, patient: bool = False
    ) -> None:
        self.match = Match(fusion, compiled, graph)
        self.compiled = compiled
        self.patient = patient  # look at every operand of a matmul, to say how much of it is there
        self.failure = Mismatch(-1, len(compiled.operations), None, "")

    def run(self, pattern_node: fx.Node, node: fx.Node) -> bool:
        """Unify everything above (and including) a node of the pattern; True when all three steps agree."""
        return self._unify(pattern_node, node) and self._solve() and self._compare_maps()

    def _fail(self, node: fx.Node | None, reason: str) -> bool:
        progress = len(self.match.nodes)
        if progress > self.failure.progress:
            self.failure = Mismatch(progress, len(self.compiled.operations), node, reason)
        return False

    def _unify(self, pattern_node: fx.Node, node: fx.Node) -> bool:
        known = self.match.nodes.get(pattern_node)
        if known is not None and not is_constant(pattern_node):
            return known is node or self._fail(
                node, f"{named(node)} is not the {named(known)} used elsewhere in it"
            )
        expected, found = describe(pattern_node), describe(node)
        assert expected is not None
        if found is None or found.name != expected.name:
            return self._fail(node, another(pattern_node, expected, node, found))
        if found.attributes != expected.attributes:
            return self._fail(
                node, f"{short(found.name)} has {found.attributes}, expected {expected.attributes}"
            )
        typed = is_tensor(pattern_node) and not _is_quantized(pattern_node)
        if typed and not self._same_dtype(pattern_node.meta["val"].dtype, node):
            return False
        if len(found.operands) != len(expected.operands):
            return self._fail(node, f"{short(found.name)} has {len(found.operands)} operands")
        self.match.nodes[pattern_node] = node
        orders = [found.operands]
        if expected.name in COMMUTATIVE:
            orders.append(found.operands[::-1])
        before = self.match.snapshot()
        for order in orders:
            found_operands = (
                self._operand(pattern_node, expected, p, node, t)
                for p, t in zip(expected.operands, order, strict=True)
            )
            patient = self.patient and expected.kind == "opaque"
            if all(list(found_operands) if patient else found_operands):
                return True
            if patient and self.failure.progress < len(self.match.nodes):
                self.failure = replace(self.failure, progress=len(self.match.nodes))
            self.match.copy_from(before)
        del self.match.nodes[pattern_node]
        return False

    def _same_dtype(self, expected: torch.dtype, node: fx.Node) -> bool:
        found = node.meta["val"].dtype
        if expected is torch.bfloat16:  # stands for the activation dtype
            if self.match.dtype is None and found in ACTIVATION_DTYPES:
                self.match.dtype = found
            return found == self.match.dtype or self._fail(
                node,
                f"{named(node)} is {found}, expected {self.match.dtype or 'bfloat16 or float16'}",
            )
        return found == expected or self._fail(
            node, f"{named(node)} is {found}, expected {expected}"
        )

    def _operand(
        self,
        pattern_reader: fx.Node,
        operation: Operation,
        expected: Any,
        reader: fx.Node,
        found: Any,
    ) -> bool:
        if not isinstance(expected, fx.Node):
            return self._constant(expected, reader, found)
        if not is_tensor(expected):  # a tuple, read by getitem
            return (
                isinstance(found, fx.Node) and not is_tensor(found) and self._unify(expected, found)
            ) or self._fail(reader, f"{named(reader)} reads {named(found)}")
        if not is_tensor(found):
            return self._fail(reader, f"{named(reader)} has {found!r} where a tensor is expected")
        pointwise = operation.kind == "pointwise"
        chain = read(found, shape_of(reader) if pointwise else None)
        pattern_chain = read(expected, shape_of(pattern_reader) if pointwise else None)
        pattern_base, pattern_map = pattern_chain[-1]
        if operation.kind in ("opaque", "rowwise") and not self._shapes(
            operation.kind, expected, reader, found
        ):
            return False
        if operation.kind == "reduction":
            self._reduction(operation, reader)
        base, mapping = chain[-1]
        if (
            pointwise
            and _is_widened(reader, base)
            and (widened := _cast_from_16_bits(pattern_base))
        ):
            # a float32 operand widens one of 16 bits, as a cast of it would
            narrow, inner = read(widened, shape_of(pattern_base))[-1]
            composed = index_map.compose(pattern_map or ((1, True),), inner)
            assert composed is not None, "sizes of a pattern are products of primes"
            pattern_base, pattern_map = narrow, composed
            pattern_chain = [*pattern_chain, (narrow, composed)]
        if pattern_base in self.compiled.leaves:
            return self._capture(self.compiled.leaves[pattern_base], pattern_map, chain)
        if uncut([node for node, _ in chain])[1] != uncut([node for node, _ in pattern_chain])[1]:
            return self._fail(
                reader,
                f"{named(reader)} reads only a part of {named(base)}: {part(found, base)}",
            )
        if not is_constant(base):
            self.match.maps.append((pattern_map, mapping, reader))
        return self._unify(pattern_base, base)

    def _shapes(self, kind: str, expected: fx.Node, reader: fx.Node, found: fx.Node) -> bool:
        expected_shape, shape = shape_of(expected), shape_of(found)
        if kind == "rowwise":
            expected_shape, shape = expected_shape[-1:], shape[-1:]
        if len(shape) != len(expected_shape):
            return self._fail(
                reader,
                f"{named(reader)} reads a {len(shape)}-D tensor, expected {len(expected_shape)}-D",
            )
        for size, value in zip(expected_shape, shape, strict=True):
            self.match.equations.append((self.compiled.monomial(size), value, reader))
        return True

    def _reduction(self, operation: Operation, reader: fx.Node) -> None:
        theirs = describe(reader)
        assert theirs is not None
        for kept in (False, True):
            size = index_map.product([s for s, k in operation.digits if k is kept])
            value = index_map.product([s for s, k in theirs.digits if k is kept])
            self.match.equations.append((self.compiled.monomial(size), value, reader))
        self.match.maps.append((operation.digits, theirs.digits, reader))

    def _constant(self, expected: Any, reader: fx.Node, found: Any) -> bool:
        if isinstance(expected, Arithmetic) and isinstance(found, Arithmetic):
            self.match.arithmetic = found  # a pattern's stands for any
            return True
        name = self.compiled.scalar_name(expected)
        if name is None:
            if (
                isinstance(expected, int)
                and isinstance(found, int)
                and self.compiled.is_size(expected)
            ):
                self.match.equations.append((self.compiled.monomial(expected), found, reader))
                return True
            return (not isinstance(found, fx.Node) and found == expected) or self._fail(
                reader, f"{named(reader)} has {named(found)}, expected {expected!r}"
            )
        if is_tensor(found):
            if found.meta["val"].dim() != 0:
                return self._fail(
                    reader,
                    f"{name} is a tensor of {found.meta['val'].dim()} dimensions, not a number",
                )
            if found.meta["val"].device.type != "cpu":
                return self._fail(
                    reader, f"{name} is on a GPU, and reading it would wait for the GPU"
                )
            # a cast to 16 bits rounds, and is part of the value
            while (
                (operation := describe(found)) is not None
                and operation.name == "cast"
                and found.meta["val"].dtype in (torch.float32, torch.float64)
            ):
                found = operation.operands[0]
        elif not isinstance(found, (int, float)):
            return self._fail(reader, f"{name} is {found!r}, expected a number")
        known = self.match.scalars.setdefault(name, found)
        return known == found or self._fail(reader, f"{name} is {found} here and {known} elsewhere")

    def _capture(
        self, name: str, pattern_map: IndexMap, chain: list[tuple[fx.Node, IndexMap]]
    ) -> bool:
        spec = self.compiled.pattern.inputs[name]
        assert isinstance(spec, Tensor)
        if not self._same_dtype(spec.dtype or torch.bfloat16, chain[0][0]):
            return False
        new = [(node, mapping, pattern_map) for node, mapping in chain]
        known = self.match.captured.setdefault(name, new)
        return known[-1][0] is chain[-1][0] or self._fail(
            chain[0][0], f"{name} is not one value: {named(known[-1][0])} and {named(chain[-1][0])}"
        )

    def _solve(self) -> bool:
        match, sizes = self.match, self.match.sizes
        root = self.compiled.outputs[0]
        if root in match.nodes:
            numel = index_map.product(shape_of(root))
            match.equations.append(
                (
                    self.compiled.monomial(numel),
                    index_map.product(shape_of(match.nodes[root])),
                    match.nodes[root],
                )
            )
        pending = list(match.equations)
        while pending:
            left = []
            for monomial, value, node in pending:
                known, unknown = match.value(monomial)
                if not unknown:
                    if not index_map.same_size(known, value):
                        known_as = f"{product_of(monomial)} is {known}, but " if monomial[1] else ""
                        expected = "" if monomial[1] else f", expected {known}"
                        return self._fail(node, f"{known_as}{named(node)} has {value}{expected}")
                elif len(unknown) == 1 and (size := index_map.divide(value, known)) is not None:
                    sizes[unknown[0]] = size
                else:
                    left.append((monomial, value, node))
            if len(left) == len(pending) and not self._bind_trailing():
                break
            pending = left
        # a size that only counts the rows of an input needs no value; one that matters shows up in the maps
        while self._bind_trailing():
            pass
        return True

    def _bind_trailing(self) -> bool:
        """Sizes that no operation fixes follow from the widest trailing dimension that a captured value has."""
        for name, chain in self.match.captured.items():
            spec = self.compiled.pattern.inputs[name]
            assert isinstance(spec, Tensor)
            known, unknown = self.match.value(
                self.compiled.monomial(self.compiled.value(spec.shape[-1]))
            )
            if len(unknown) != 1:
                continue
            nodes, _ = uncut([node for node, *_ in chain])
            sizes = [shape_of(node)[-1] for node in nodes if node.meta["val"].dim()]
            fixed = [size for size in sizes if isinstance(size, int)]
            size = index_map.divide(max(fixed) if fixed else sizes[0], known) if sizes else None
            if size is not None:
                self.match.sizes[unknown[0]] = size
                return True
        return False

    def resolved(self, pattern_map: IndexMap) -> IndexMap:
        """A map of the pattern with the graph's sizes in it; what is not known counts as 1."""
        return index_map.collapse(
            [
                (self.match.value(self.compiled.monomial(size))[0], kept)
                for size, kept in pattern_map
            ]
        )

    def _compare_maps(self) -> bool:
        if self.compiled.outputs[0] not in self.match.nodes:
            return True  # a partial match, made to explain a near miss, leaves some sizes open
        for pattern_map, mapping, node in self.match.maps:
            if not index_map.same_map(self.resolved(pattern_map), mapping):
                return self._fail(
                    node,
                    f"{named(node)} reads its operand as {digits(mapping)}, "
                    f"expected {digits(self.resolved(pattern_map))}",
                )
        for name, chain in self.match.captured.items():
            fitting = [c for c in chain if index_map.same_map(self.resolved(c[2]), c[1])]
            if not fitting:
                node, mapping, pattern_map = chain[0]
                return self._fail(
                    node,
                    f"{name} is read as {digits(mapping)}, expected {digits(self.resolved(pattern_map))}",
                )
            self.match.captured[name] = fitting
        return True


def _is_widened(reader: fx.Node, operand: fx.Node) -> bool:
    """Whether an operation computes in float32 what one of its operands has in 16 bits, without a cast of it."""
    dtypes = reader.meta["val"].dtype, operand.meta["val"].dtype
    return dtypes[0] is torch.float32 and dtypes[1] in ACTIVATION_DTYPES and not _is_cast(reader)


def _cast_from_16_bits(node: fx.Node) -> fx.Node | None:
    """What a node of a pattern casts to float32, where that has the activation dtype."""
    if not _is_cast(node) or node.meta["val"].dtype is not torch.float32:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source if source.meta["val"].dtype is torch.bfloat16 else None


def _is_cast(node: fx.Node) -> bool:
    return node.target is torch.ops.prims.convert_element_type.default


def _is_quantized(node: fx.Node) -> bool:
    """Whether a value of a pattern is what a quantization returned, whose dtype is up to its arithmetic."""
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, fx.Node) and any(isinstance(a, Arithmetic) for a in source.args)


def candidates(graph: fx.Graph, compiled: CompiledPattern) -> Iterator[fx.Node]:
    """The nodes at which a match of the pattern could end."""
    wanted, dtype = compiled.anchor, compiled.outputs[0].meta["val"].dtype
    quantized = _is_quantized(compiled.outputs[0])
    for node in graph.nodes:
        if node.op != "call_function" or not is_tensor(node):
            continue
        found = node.meta["val"].dtype
        generic = quantized or (dtype is torch.bfloat16 and found in ACTIVATION_DTYPES)
        if found == dtype or generic:
            operation = describe(node)
            if operation is not None and operation.name == wanted.name:
                yield node


_last_match: dict[
    str, Pattern
] = {}  # a model spells one thing one way: the order of attempts, never the result


def find(fusion: Fusion, graph: fx.Graph, node: fx.Node, canonical: bool = True) -> Match | None:
    """The match of any of the fusion's patterns that ends at a node."""
    patterns = fusion.patterns
    last = _last_match.get(fusion.name) if fusion.exclusive else None
    for first in (True, False):
        for pattern in [p for p in patterns if p is last] if first else patterns:
            matcher = Matcher(fusion, compile_pattern(pattern, canonical), graph)
            if not matcher.run(matcher.compiled.outputs[0], node):
                continue
            if first and not all(
                constraint.holds(matcher.match) for constraint in fusion.constraints
            ):
                continue
            _last_match[fusion.name] = pattern
            matcher.match.complete()
            return matcher.match
    return None
