"""Why a fusion did not fire where one could think it should.

A fusion names the operation that gives its subject away (``rsqrt`` for a norm, the cast to float8 for a
quantization). Where such an operation is left in the rewritten graph, each pattern is laid on it: upwards by the
matcher, then downwards reader by reader, until the graph and the pattern part. The pattern that came furthest
tells the reason.
"""

from __future__ import annotations

import contextlib

import torch
from torch import fx

from fusion_passes.arithmetic import MAX
from fusion_passes.compiled_pattern import CompiledPattern, compile_pattern
from fusion_passes.fusion import Fusion, Pattern, Tensor
from fusion_passes.matching import Matcher
from fusion_passes.mismatch import Mismatch
from fusion_passes.operations import (
    describe,
    escapes,
    is_constant,
    is_tensor,
    module_path,
    read,
    readers,
    transparent,
)
from fusion_passes.reporting import NearMiss

aten = torch.ops.aten
THRESHOLD = 0.5
"""The part of a pattern's operations that must be there before its absence is worth a line."""
USUAL = 48
"""How many spellings of one meaning are laid on a place that is none of them: the reason is the same for the rest."""

_MOVES = {
    aten.cat.default, aten.constant_pad_nd.default, aten.index.Tensor, aten.permute.default, aten.slice.Tensor,
}  # fmt: skip
_WHOLE = {"cast", "add", "sub", "aten.clamp_min.default", "aten.clamp_max.default"}


def explain(
    fusion: Fusion, graph: fx.Graph, canonical: bool = True, whole: bool = False
) -> list[NearMiss]:
    """The near misses of one fusion, or with ``canonical`` false of one meaning.

    whole: those alone where every operation of a pattern is, and a constraint or a shape of an input of the graph is
    what keeps it from being a match.
    """
    signs = [node for node in graph.nodes if gives_away(fusion, node)]
    # not traced without a need
    spellings = _usual(fusion, signs) if fusion.exclusive else fusion.patterns
    patterns = [compile_pattern(pattern, canonical) for pattern in spellings if signs]
    misses = []
    for node in signs:
        attempts = [
            a
            for p in patterns
            for s in p.operations
            if gives_away(fusion, s)
            for a in [_attempt(fusion, graph, p, s, node)]
        ]
        best = max(attempts, key=_nearness, default=None)
        if whole and not (best and _is_whole(best)):
            continue
        # nothing but a quantization casts to float8, or floats to int8, so that alone is worth a line
        alone = fusion.signature == "cast" and (
            node.meta["val"].dtype is torch.float8_e4m3fn or _is_of_floats(node)
        )
        enough = 1 if alone else THRESHOLD * (best.total if best else 0)
        if _wants_codes(fusion) and not _has_codes(node):
            continue  # nothing there is quantized
        if best is not None and best.progress >= enough and best.reason:
            misses.append(
                NearMiss(fusion.name, module_path(node), (best.node or node).name, best.reason)
            )
    return misses


def _usual(fusion: Fusion, signs: list[fx.Node]) -> list[Pattern]:
    """The first spellings of the dtypes that there are."""
    dtypes = {None, *(node.meta["val"].dtype for node in signs)}
    fitting = [p for p in fusion.patterns if _dtype_of(p) in dtypes]
    return fitting[:USUAL]


def _dtype_of(pattern: Pattern) -> torch.dtype | None:
    """The dtype of the codes that a spelling makes; None where it has none, or is no quantization."""
    return getattr(pattern.constants.get("spelling"), "dtype", None)


def _nearness(attempt: Mismatch) -> tuple[float, bool, int]:
    """What a place is most like: of patterns that are there to the same part, one that is whole, then the longest."""
    return attempt.progress / attempt.total, attempt.whole, attempt.progress


def _wants_codes(fusion: Fusion) -> bool:
    """Whether every pattern reads 8-bit codes."""
    return bool(fusion.patterns) and all(
        any(isinstance(spec, Tensor) and spec.dtype in MAX for spec in pattern.inputs.values())
        for pattern in fusion.patterns
    )


def _has_codes(node: fx.Node) -> bool:
    """Whether the operands of a node are made of 8-bit codes, by pointwise operations and by moving them."""
    stack, seen = list(node.all_input_nodes), {node}
    while stack:
        operand = stack.pop()
        if operand in seen or not is_tensor(operand):
            continue
        seen.add(operand)
        if operand.meta["val"].dtype in MAX:
            return True
        operation = describe(operand)
        pointwise = operation is not None and operation.kind == "pointwise"
        if pointwise or operand.target in _MOVES or transparent(operand) is not None:
            stack += operand.all_input_nodes
    return False


def _is_of_floats(cast: fx.Node) -> bool:
    """Whether a cast is of floats, or of whole numbers that were, as where a zero point is added to those."""
    stack, seen = [cast.args[0]], set()
    while stack:
        node = stack.pop()
        if node in seen or not is_tensor(node):
            continue
        seen.add(node)
        if node.meta["val"].dtype.is_floating_point:
            return True
        operation = describe(node)
        if operation is not None and (operation.name in _WHOLE or transparent(node) is not None):
            stack += operation.operands
    return False


def _is_whole(attempt: Mismatch) -> bool:
    given = attempt.node is not None and attempt.node.op in ("placeholder", "get_attr")
    return attempt.whole or (given and attempt.progress == attempt.total)


def gives_away(fusion: Fusion, node: fx.Node) -> bool:
    """Whether a node is what every spelling of a fusion's subject contains."""
    operation = describe(node)
    if operation is None or operation.name not in fusion.signature.split():
        return False
    if operation.name != "cast":
        return True
    # a zero point of 0 is cast, too
    return node.meta["val"].dtype in MAX and not is_constant(read(node.args[0], None)[-1][0])


def _attempt(
    fusion: Fusion, graph: fx.Graph, compiled: CompiledPattern, start: fx.Node, node: fx.Node
) -> Mismatch:
    """Lay the pattern on ``node`` with its operation ``start``, and walk down as far as it fits."""
    matcher = Matcher(fusion, compiled, graph, patient=True)
    if not matcher.run(start, node):
        return matcher.failure
    reached, place = start, node
    while reached is not compiled.outputs[0]:
        expected = next(readers(reached), None)
        if expected is None:
            break
        found = list(readers(place))
        operation, alike = describe(expected), ""
        for reader in found:
            further = Matcher(fusion, compiled, graph)
            if further.run(expected, reader):
                matcher, reached, place = further, expected, reader
                break
            if further.failure.progress > matcher.failure.progress:
                matcher.failure = further.failure
            theirs = describe(reader)
            if operation and theirs and theirs.name == operation.name:
                alike = (
                    further.failure.reason
                )  # the operation is there, and something is wrong with it
        else:
            wanted = (
                operation.name.split(".")[1]
                if operation and "." in operation.name
                else operation and operation.name
            )
            names = ", ".join(reader.name for reader in found) or "the graph's output"
            reason = alike or f"{place.name} is read by {names}, where the fusion expects {wanted}"
            if matcher.failure.progress > len(matcher.match.nodes):
                reason = matcher.failure.reason
            return Mismatch(len(matcher.match.nodes), len(compiled.operations), place, reason)
    total = len(compiled.operations)
    if reached is compiled.outputs[0]:  # all of it is there
        for inner, user in escapes(matcher.match.nodes.values(), matcher.match.outputs):
            if not fusion.allow_shared:
                reason = f"{inner.name} inside of it is also used by {user.name}"
                return Mismatch(total, total, inner, reason, whole=True)
        # what a third party's constraint raises, the rewrite has met and reported
        with contextlib.suppress(Exception):
            for constraint in fusion.constraints:
                if not constraint.holds(matcher.match):
                    reason = constraint.reason(matcher.match)
                    return Mismatch(total, total, node, reason, whole=True)
    return Mismatch(0, total, node, "")
