"""Times every way of running a case: ours, each implementation of the op, stock `torch.compile`, the others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from bench.case import Case, Inapplicable, Inputs, Thunk
from bench.results import Row
from bench.timer import Timer
from custom_ops import library

INDUCTOR = "inductor"
MAX_AUTOTUNE = "inductor_max_autotune"
PLUGIN = "plugin"
OURS = "ours"
COMPILED = (PLUGIN, INDUCTOR, MAX_AUTOTUNE)
"""The ways that compile a graph."""


@dataclass(frozen=True)
class Plan:
    """What to run: `fusions` is the plugin's setting where a case decides about no fusion of its own.

    stock: also stock `torch.compile`, which takes most of the time. implementations: also each implementation of the
    op, and not only the one that it chooses. others: also what a case has of other ways.
    """

    device: torch.device
    max_autotune: bool = True
    cold: bool = True
    fusions: str = "default"
    stock: bool = True
    implementations: bool = True
    others: bool = True


def measure(case: Case, plan: Plan, timer: Timer, copy_gbps: float) -> Row:
    """One row. A way that raises or returns something else is recorded as an error and not timed."""
    row = Row(
        case=case.name, sizes=dict(case.sizes), moved_bytes=case.moved_bytes, flops=case.flops
    )
    row.fusion = case.fusion if case.fusion in _registry() else None
    with torch.no_grad():
        inputs = case.inputs(plan.device)
        expected = case.plain(*inputs)
        for name, make in ways(case, plan, inputs):
            torch.compiler.reset()
            try:
                call = make()
                result = call()
                # Inductor drops roundings of eager's, so only what is ours is held against eager
                problem = case.check(expected, result) if name in (OURS, PLUGIN) else None
                if problem:
                    raise AssertionError(f"differs from eager: {problem}")
                if name == OURS:
                    row.chosen = _chosen(case, inputs)
                if name == PLUGIN:
                    row.fired = _fired()
                    if case.fusion and case.fusion not in row.fired:
                        raise AssertionError(f"the fusion {case.fusion} did not fire")
                row.warm_us[name] = timer.warm(call)
                if name in case.launched:
                    row.warm_us[f"{name}_launched"] = timer.launched(call)
                if plan.cold and (cold := timer.cold(call)) is not None:
                    row.cold_us[name] = cold
            except Inapplicable:
                continue
            except Exception as error:  # one way must not cost the others their device time
                row.errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:400]
        facts = case.facts(*inputs) if case.facts else {}
    row.finish(copy_gbps, case.targets)
    row.ratios |= facts
    return row


def ways(case: Case, plan: Plan, inputs: Inputs) -> Iterator[tuple[str, Callable[[], Thunk]]]:
    """Each way's name, and a function that makes it ready and returns the call to time."""
    if case.op and case.op_args:
        op = library.ops()[case.op]
        args, kwargs = case.op_args(*inputs)
        yield OURS, lambda: lambda: op(*args, **kwargs)
        bound, keywords = op._bind(args, kwargs)
        for each in op.implementations if plan.implementations else ():
            unsupported = each.unsupported and each.unsupported(*bound, **keywords)
            if each.name != "reference" and each.name in op.usable(plan.device) and not unsupported:
                yield (
                    each.name,
                    functools.partial(_direct, each, bound, keywords),
                )
    # an op alone, with no fusion of its name, is no work for the plugin
    if case.fusion in _registry() or not case.op:
        yield PLUGIN, lambda: _compiled(case, inputs, **_plugin(case, plan))
    if plan.stock:
        yield INDUCTOR, lambda: _compiled(case, inputs)
    if plan.stock and plan.max_autotune:
        yield MAX_AUTOTUNE, lambda: _compiled(case, inputs, mode="max-autotune-no-cudagraphs")
    for name, other in case.others.items() if plan.others else ():
        yield name, functools.partial(other, inputs)


def _direct(
    implementation: library.Implementation, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Thunk:
    return functools.partial(implementation.function, *args, **kwargs)


def _compiled(case: Case, inputs: Inputs, **how: Any) -> Thunk:
    compiled = torch.compile(case.plain, dynamic=False, fullgraph=True, **how)
    return lambda: compiled(*inputs)


def _plugin(case: Case, plan: Plan) -> dict[str, Any]:
    import fusion_passes
    from fusion_passes import backend

    fusion_passes.reset_reports()
    options: dict[str, Any] = {
        "fusions": ",".join((case.fusion, *case.beside)) if case.fusion else plan.fusions
    }
    if plan.device.type == "cpu":
        options["allow_reference"] = True  # nothing else runs there
    # the function, not its name: a checkout that is not installed has no entry point
    return {"backend": backend.fusion_passes, "options": options}


def _chosen(case: Case, inputs: Inputs) -> str:
    """The implementation behind `ours`."""
    assert case.op is not None
    assert case.op_args is not None
    args, kwargs = case.op_args(*inputs)
    implementation = library.ops()[case.op].choose(*args, **kwargs).implementation
    return implementation.name if implementation else ""


def _fired() -> dict[str, int]:
    import fusion_passes

    fired: dict[str, int] = {}
    for report in fusion_passes.reports():
        for name, count in report.matches.items():
            fired[name] = fired.get(name, 0) + count
    return fired


def _registry() -> dict[str, Any]:
    from fusion_passes.registered import registry

    return registry()
