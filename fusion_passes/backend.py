"""The Dynamo backend: Inductor with the fusions in it."""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

import custom_ops
from custom_ops import cuda_build
from fusion_passes import reporting, torch_internals, warming
from fusion_passes import settings as settings_module
from fusion_passes.manager import FusionPass
from fusion_passes.registered import registry
from fusion_passes.reporting import Report
from fusion_passes.settings import Settings

_OPTION = "joint_custom_pre_pass"


def fusion_passes(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend behind ``torch.compile(model, backend="fusion_passes")``.

    Takes everything that Inductor takes: ``mode``, and in ``options`` Inductor's options beside the settings of
    this package and one boolean per fusion.

    Raises:
        SettingsError: an option, patch or environment variable that does not exist or has a bad value.
    """
    settings, inductor = settings_module.resolve(options, registry())
    inductor = {**torch_internals.inductor_mode_options(mode), **inductor}
    fusion_pass = FusionPass(
        settings, after=inductor.get(_OPTION, torch_internals.inductor_default(_OPTION))
    )
    inductor[_OPTION] = fusion_pass
    if torch_internals.has_cudagraph_unsafe_ops(gm):
        # what waits for the host, such as ep_dispatch, stays outside of CUDA graphs, and the rest inside
        inductor.setdefault(torch_internals.GRAPH_PARTITION, True)
    stored = _stored_report(gm, example_inputs, fusion_pass)
    compiled = torch_internals.compile_with_inductor(gm, example_inputs, inductor)
    if fusion_pass.latest is None:
        _report_of_cached_graph(stored, settings)
    elif stored is not None:
        _keep(stored, fusion_pass.latest)
    return compiled


fusion_passes.reset = torch_internals.reset_cudagraphs  # type: ignore[attr-defined]


def inductor_options(**settings: Any) -> dict[str, Any]:
    """Options that give stock Inductor the same passes: ``torch.compile(model, options=inductor_options())``.

    settings: as in ``options=`` of the backend; without any, those in force at each compilation are used.
    """
    resolved = settings_module.resolve(settings, registry())[0] if settings else None
    return {_OPTION: FusionPass(resolved, after=torch_internals.inductor_default(_OPTION))}


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Compile ``fn`` for these arguments without running a kernel, and report.

    Where the function breaks into several graphs, the report is that of the last one; ``reports()`` has all.
    The graphs return zeros, so Python code between them runs on zeros.
    """

    def compile_only(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        fusion_passes(gm, example_inputs)
        outputs = next(node for node in gm.graph.nodes if node.op == "output").args[0]
        fakes = [
            node.meta.get("example_value") if isinstance(node, fx.Node) else node
            for node in outputs
        ]
        return lambda *_: [torch_internals.zeros_of(fake) for fake in fakes]

    torch.compiler.reset()
    before = len(reporting.reports())
    with torch.no_grad():
        torch.compile(fn, backend=compile_only)(*args, **kwargs)
    torch.compiler.reset()  # what compiled to zeros must not stay behind
    if len(reporting.reports()) == before:
        raise LookupError("nothing was compiled: the function has no tensor operations")
    return reporting.report()


def _stored_report(
    gm: fx.GraphModule, example_inputs: Sequence[Any], fusion_pass: FusionPass
) -> Path | None:
    """Where the report of this graph is kept for the time when Inductor answers from its cache.

    A cached graph never reaches the pass, yet its user wants to know what is in it.
    """
    uuid = fusion_pass.uuid()
    if uuid is None:
        return None
    inputs = [
        (str(i.dtype), str(tuple(i.shape)), str(i.device), i.requires_grad)
        if isinstance(i, torch.Tensor)
        else repr(type(i))
        for i in example_inputs
    ]
    # not Inductor's options: the pass runs before any of them matters
    text = "\0".join((uuid, gm.code, repr(inputs), repr(torch.is_grad_enabled())))
    return cuda_build.cache_dir() / "reports" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _keep(stored: Path, report: Report) -> None:
    """Only a report is lost where it cannot be kept, as in a container without a home: the model has to run."""
    problem = cuda_build.cannot_write(stored.parent)
    if problem is None:
        reporting.write(stored, report.to_json())
    else:
        _warn_once(f"no report is kept for graphs that Inductor will have in its cache: {problem}")


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def _prepare(report: Report) -> None:
    """Make ready what a cached graph calls, as the pass does for a graph that it sees."""
    for name in sorted({name for site in report.sites for name in site.implementations}):
        op, _, chosen = name.partition(":")
        for implementation in custom_ops.ops()[op].implementations:
            if implementation.name == chosen:
                implementation.prepare()


def _report_of_cached_graph(stored: Path | None, settings: Settings) -> None:
    if stored is not None and stored.exists():
        report = Report.from_json(stored.read_text())
        report.notes = [note for note in report.notes if not note.startswith("warm-up")]
        _prepare(report)
    else:
        report = Report(
            notes=[
                "Inductor answered from its cache, and no report of that compilation is kept here"
            ]
        )
    report.from_cache = True
    report.graph = torch_internals.compile_id()
    if settings.warmup != "skip" and not report.sites and not report.states:
        report.notes.append(
            "warm-up: what is in this graph is not known, so nothing was compiled for it"
        )
    warming.at_end_of_compilation(report, settings)
    reporting.add(report)
    reporting.publish(report, settings.report)
