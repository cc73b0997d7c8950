"""Eager is the oracle, float64 the judge: both sides of a fusion on the same inputs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from fusion_passes import manager, settings, torch_internals, verify
from fusion_passes.fusion import Fusion, Pattern, Scalar, SizeOf, Tensor
from fusion_passes.operations import describe
from fusion_passes.reporting import Report

_ROUNDING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
SLACK = 1.02
"""How much further than eager a fused result may be from float64, as the order of sums differs."""


@dataclass
class Result:
    """Both sides of one graph. ``judge`` holds the outputs with every 16- and 32-bit rounding left out."""

    before: fx.GraphModule
    after: fx.GraphModule
    report: Report
    expected: list[torch.Tensor]
    actual: list[torch.Tensor]
    judge: list[torch.Tensor]


def random_inputs(
    pattern: Pattern,
    sizes: Mapping[str, int],
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    scalars: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments for a pattern: normal tensors of its shapes, positive float32 scales, small scalars.

    sizes: a value for each size name of the pattern. scalars: values for its scalars (1e-6 where not given).
    Raises ValueError where ``sizes`` lacks one.
    """
    needed = {
        str(symbol)
        for spec in pattern.inputs.values()
        for expression in (
            spec.shape if isinstance(spec, Tensor) else getattr(spec, "name", "1").split()
        )
        for symbol in sympy.sympify(expression).free_symbols
    }
    if lacking := sorted(needed - set(sizes)):
        raise ValueError(
            f"sizes has no {', '.join(lacking)}; pattern {pattern.name!r} needs {', '.join(sorted(needed))}"
        )
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = {}
    for name, spec in pattern.inputs.items():
        if isinstance(spec, Tensor):
            shape = [int(sympy.sympify(expression).subs(dict(sizes))) for expression in spec.shape]
            value = torch.randn(shape, generator=generator)
            if spec.dtype is torch.float32:
                value = value.abs() + 0.05
            inputs[name] = value.to(spec.dtype or dtype).to(device)
        elif isinstance(spec, SizeOf):
            inputs[name] = sizes[spec.name]
        elif isinstance(spec, Scalar):
            inputs[name] = (scalars or {}).get(name, 1e-6)
    return inputs


def fuse(
    fn: Callable[..., Any],
    *args: Any,
    only: Sequence[Fusion] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Result:
    """Trace a call to one graph, rewrite a copy of it, and run both eagerly.

    only: the fusions to run (even unregistered ones); None runs those that the settings have on.
    Raises AssertionError when the call traces to more than one graph.
    """
    results = fuse_graphs(fn, *args, only=only, dynamic=dynamic, **kwargs)
    assert len(results) == 1, f"the call traces to {len(results)} graphs"
    return results[0]


def fuse_graphs(
    fn: Callable[..., Any],
    *args: Any,
    only: Sequence[Fusion] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> list[Result]:
    """As :func:`fuse`, for a call that breaks into several graphs: a result for each that was run."""
    graphs = torch_internals.capture(fn, *args, dynamic=dynamic, **kwargs)
    return [_rewritten(graph, only) for graph in graphs if "inputs" in graph.meta]


def _rewritten(before: fx.GraphModule, only: Sequence[Fusion] | None) -> Result:
    after = fx.GraphModule(before, copy.copy(before.graph))
    after.graph = fx.Graph(after)
    output = after.graph.graph_copy(before.graph, {})
    after.graph.output(output)
    report = manager.run(
        after.graph, settings.current().model_copy(update={"allow_reference": True}), only
    )
    after.recompile()

    def inputs() -> list[Any]:  # a graph may write to them
        return [i.clone() if isinstance(i, torch.Tensor) else i for i in before.meta["inputs"]]

    with torch.no_grad():
        expected, actual = list(before(*inputs())), list(after(*inputs()))
        judge = list(_Float64(before).run(*inputs()))
    return Result(before, after, report, expected, actual, judge)


def assert_fusion_equivalent(
    fusion: Fusion,
    fn: Callable[..., Any] | None = None,
    *args: Any,
    sizes: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    scalars: Mapping[str, float] | None = None,
    seed: int = 0,
    matches: int = 1,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> list[Result]:
    """Assert that a fusion fires and changes nothing that the semantics do not allow.

    Without ``fn``: for each of the fusion's patterns, on random inputs of the given ``sizes`` (by size name). With
    ``fn``: on ``fn(*args, **kwargs)``, a function or module that contains the fusion's meaning in any spelling.

    Asserted: it fires ``matches`` times; shapes, dtypes and strides of the outputs are the same; values differ by no
    more than :func:`fusion_passes.verify.difference` allows; no output is further from float64 than eager's; the
    rewritten graph has no copy that the original had not.
    """
    if fn is None and not fusion.patterns:
        raise ValueError(f"{fusion.name} has no patterns to make an example of: give fn")
    results = []
    if fn is not None:
        results.append(fuse(fn, *args, only=[fusion], dynamic=dynamic, **kwargs))
    else:
        for pattern in fusion.patterns:
            inputs = random_inputs(
                pattern, sizes or {}, dtype=dtype, device=device, scalars=scalars, seed=seed
            )
            tensors = {
                name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)
            }
            rest = {name: value for name, value in inputs.items() if name not in tensors}
            # the numbers are constants of the graph, as the attributes of a module are
            call = functools.partial(_call, pattern.fn, tuple(tensors), rest)
            results.append(fuse(call, *tensors.values(), only=[fusion], dynamic=dynamic))
    for result in results:
        _assert_equivalent(fusion, result, matches)
    return results


def _call(
    fn: Callable[..., Any], names: Sequence[str], rest: Mapping[str, Any], *values: Any
) -> Any:
    return fn(**dict(zip(names, values, strict=True)), **rest)


def _assert_equivalent(fusion: Fusion, result: Result, matches: int) -> None:
    fired = result.report.matches.get(fusion.name, 0)
    assert fired == matches, (
        f"{fusion.name} fired {fired} times, expected {matches}\n{result.report}"
    )
    accumulated = any(
        operation.kind == "opaque" and "mm" in operation.name
        for operation in map(describe, result.before.graph.nodes)
        if operation
    )
    for index, (expected, actual, judge) in enumerate(
        zip(result.expected, result.actual, result.judge, strict=True)
    ):
        assert expected.stride() == actual.stride() or expected.numel() < 2, (
            f"output {index}: strides {actual.stride()}, expected {expected.stride()}"
        )
        problem = verify.difference(expected, actual, accumulated)
        assert problem is None, f"{fusion.name}, output {index}: {problem}"
        # a product that is rounded in float64's run too (an operator of somebody else's) is no judge of who is nearer
        rounded = accumulated and torch.equal(judge.double(), judge.to(expected.dtype).double())
        if bool(judge.double().isfinite().all()) and not rounded:
            ours, eagers = (
                float((side.double() - judge.double()).norm()) for side in (actual, expected)
            )
            tiny = 1e-6 * float(judge.double().norm())
            assert ours <= SLACK * eagers + tiny, (
                f"{fusion.name}, output {index}: {ours:.4g} from float64, eager {eagers:.4g}"
            )
    copies = [
        sum("clone" in str(n.target) or "copy" in str(n.target) for n in g.graph.nodes)
        for g in (result.before, result.after)
    ]
    assert copies[1] <= copies[0], f"{fusion.name} added {copies[1] - copies[0]} copies"


class _Float64(fx.Interpreter):
    """Runs a graph with every floating-point value in float64, keeping only the rounding to 8 bits."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        return (
            result.double()
            if isinstance(result, torch.Tensor) and result.dtype in _ROUNDING
            else result
        )

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if (
            target is torch.ops.aten._assert_tensor_metadata.default
        ):  # of a dtype that is another here
            return None
        if "grouped_mm" in str(target):  # no kernel of it takes float64
            return _grouped_mm(*args, **kwargs)
        if target is torch.ops.aten._scaled_mm.default:  # its scales are float32
            return _scaled_mm(*args)
        if target is torch.ops.aten._scaled_mm_v2.default:  # torch.nn.functional.scaled_mm
            a, b, a_scales, a_recipe, _, b_scales, b_recipe, _, bias, *_ = args
            if {*a_recipe, *b_recipe} <= {0, 1}:  # per tensor, per row
                return _scaled_mm(a, b, *a_scales, *b_scales, bias)
        if target is torch.ops.prims.convert_element_type.default:
            value, dtype = args
            if dtype in _ROUNDING:
                return value.double()
            if dtype is torch.float8_e4m3fn:
                return value.float().to(dtype)
        return super().call_function(target, args, kwargs)


def _scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *_: Any,
) -> torch.Tensor:
    product = (a.double() * a_scale) @ (b.double() * b_scale)
    return product if bias is None else product + bias


def _grouped_mm(
    rows: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """Each run of rows, which end at ``offs``, times one matrix of [runs, in, out]."""
    ends = offs.long().tolist()
    runs = [
        rows[start:end] @ weight[index] for index, (start, end) in enumerate(zip([0, *ends], ends))
    ]
    rest = rows.new_zeros(rows.shape[0] - (ends[-1] if ends else 0), weight.shape[-1])
    return torch.cat([*runs, rest])
