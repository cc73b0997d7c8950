"""Runs both sides of a rewrite on the same random inputs and compares them.

Used on the spot by ``FUSION_PASSES_VERIFY`` and by ``fusion_passes.testing``. The comparison follows the semantics
of DESIGN.md: quantized codes and rounded values may differ by one step in at most a few places per ten thousand,
as the order of a sum moves a value across a rounding boundary; everything larger is a different computation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fusion_passes import torch_internals
from fusion_passes.matching import Match
from fusion_passes.operations import describe
from fusion_passes.places import Place

FLIPPED = 1e-3
"""Accepted part of values that differ by one rounding step. Sums over random rows flip about 1e-4 of them."""
ACCUMULATED = 2.0**-6
"""Accepted norm of the difference over the norm of the result, for outputs of a matrix product in 8-bit floats."""


class Differs(Exception):
    """Both sides of a rewrite were run and are not the same computation."""


def check(match: Match | Place, replacements: Sequence[fx.Node]) -> None:
    """Raises :class:`Differs` where the replacement of a match computes something else.

    Both sides run on random inputs of the sizes that the graph was traced with, on its device.
    """
    inputs = list(dict.fromkeys(_free_inputs(match, replacements)))
    with torch_internals.real_tensors():
        values = {node: _random(node, match.graph, match.limits.get(node)) for node in inputs}
        if any(value is None for value in values.values()):
            raise Differs(
                "an input has a size that is not known while compiling, so nothing could be run"
            )
        before = _run(match.outputs, dict(values))
        after = _run(replacements, dict(values))
        accumulated = any(
            operation.kind == "opaque" for operation in map(describe, match.nodes) if operation
        )
        tolerance = ACCUMULATED
        if isinstance(match, Place):
            before, after = (list(match.comparable(values)) for values in (before, after))
            tolerance = match.tolerance or ACCUMULATED
        for output, old, new in zip(match.outputs, before, after):
            problem = difference(old, new, accumulated, tolerance)
            if problem:
                raise Differs(f"{output.name}: {problem}")


def difference(
    expected: torch.Tensor,
    actual: torch.Tensor,
    accumulated: bool = False,
    tolerance: float = ACCUMULATED,
) -> str | None:
    """A sentence on how ``actual`` is not what the semantics allow, or None.

    accumulated: whether the values are sums of a matrix product, whose operands eager rounds and a kernel does not.
    tolerance: of these, as the norm of the difference over that of the result.
    """
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return f"{tuple(actual.shape)} {actual.dtype}, expected {tuple(expected.shape)} {expected.dtype}"
    if expected.numel() == 0:
        return None
    a, b = expected.double(), actual.double()
    if not torch.equal(a.isnan(), b.isnan()):
        return f"NaN in {int((a.isnan() != b.isnan()).sum())} places on one side only"
    finite = a.isfinite() & b.isfinite()
    if not torch.equal(a[~finite & ~a.isnan()], b[~finite & ~a.isnan()]):
        return "infinities differ"
    a, b = a[finite], b[finite]
    moved = a != b
    if expected.dtype is torch.float32:  # the last bit of a scale is not a flipped code
        moved = (a - b).abs() > torch.maximum(a.abs(), b.abs()) * 2.0**-22
    share = float(moved.double().mean()) if a.numel() else 0.0
    # two steps in 16 bits: a value is rounded, multiplied and rounded again (a norm's weight, silu's gate)
    step = {torch.float8_e4m3fn: 2.0**-3, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}.get(
        expected.dtype, 2.0**-6
    )
    tiny = {torch.int8: 1.0, torch.float8_e4m3fn: 2.0**-9, torch.float16: 2.0**-23}.get(
        expected.dtype, 0.0
    )
    within = (a - b).abs() <= torch.maximum(a.abs(), b.abs()) * step + tiny
    if bool(within.all()) and share * a.numel() <= max(FLIPPED * a.numel(), 4):
        return None
    if accumulated and float((a - b).norm()) <= tolerance * float(a.norm()):
        return None
    far, largest = int((~within).sum()), float((a - b).abs().max())
    return f"{share:.2%} of the values differ, {far} by more than the accepted steps, by at most {largest:.4g}"


def _free_inputs(match: Match | Place, replacements: Sequence[fx.Node]) -> list[fx.Node]:
    """Where the walk up from either side stops: at what the match captured, and at the graph's own inputs."""
    captured = {chain[-1][0] for chain in match.captured.values()}
    captured |= {value for value in match.scalars.values() if isinstance(value, fx.Node)}
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [*match.outputs, *replacements]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in captured or node.op != "call_function":
            found.append(node)
        else:
            stack.extend(node.all_input_nodes)
    return found


def _random(node: fx.Node, graph: fx.Graph, limit: int | None = None) -> object:
    fake = node.meta.get("val")
    if isinstance(fake, (torch.SymInt, int)):
        return torch_internals.size_hint(torch_internals.size_to_expr(fake), graph)
    if not isinstance(fake, torch.Tensor):
        return None
    shape = [
        torch_internals.size_hint(torch_internals.size_to_expr(size), graph) for size in fake.shape
    ]
    if any(size is None for size in shape):
        return None
    # one generator per node, so that a failure is the same in each run
    generator = torch.Generator().manual_seed(sum(map(ord, node.name)))
    if limit is not None:
        drawn = torch.randint(
            limit, [int(size) for size in shape if size is not None], generator=generator
        )
        return drawn.to(fake.dtype).to(fake.device)
    if fake.dim() == 0:
        return torch.full((), 1e-5, dtype=fake.dtype, device=fake.device)
    value = torch.randn([int(size) for size in shape if size is not None], generator=generator)
    if fake.dtype is torch.float32:
        value = value.abs() + 0.1  # scales are positive
    return value.to(fake.dtype).to(fake.device)


def _run(outputs: Sequence[fx.Node], values: dict[fx.Node, object]) -> list[torch.Tensor]:
    def evaluate(node: fx.Node) -> object:
        if node not in values:
            for source in node.all_input_nodes:
                evaluate(source)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
        return values[node]

    with torch.no_grad():
        results = [evaluate(node) for node in outputs]
    return [result for result in results if isinstance(result, torch.Tensor)]
