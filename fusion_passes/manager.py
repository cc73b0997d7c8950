"""Runs the fusions over one graph, in order, and says what came of it.

:class:`FusionPass` is what Inductor calls, before any pass of its own: at that point the graph still holds every
rounding that eager performs (Inductor later drops casts that it deems pointless), so a fusion can be exact.
"""

from __future__ import annotations

import functools
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx

import custom_ops
from custom_ops.implementation import Implementation
from custom_ops.library import Op
from fusion_passes import (
    cache_key,
    near_miss,
    other_codes,
    reporting,
    slower,
    tables,
    torch_internals,
    unread_gates,
    unread_norms,
    verify,
    warming,
)
from fusion_passes import settings as settings_module
from fusion_passes.canonical import common_subexpressions, flat_products, recognition, views
from fusion_passes.canonical.asymmetric_quantizations import ASYMMETRIC
from fusion_passes.compiled_pattern import compile_pattern
from fusion_passes.fusion import Fusion
from fusion_passes.matching import Match, candidates, find
from fusion_passes.operations import describe, escapes, module_path, transparent
from fusion_passes.places import Place
from fusion_passes.registered import is_shipped, registry
from fusion_passes.reporting import NearMiss, Report, Site
from fusion_passes.rewriting import NotRewritten, Rewrite, choose, would_cycle
from fusion_passes.settings import Settings

__all__ = ["FusionPass", "StrictError"]


class StrictError(RuntimeError):
    """``FUSION_PASSES_STRICT``: a fusion that was named on fired nowhere in a graph."""


class FusionPass(torch_internals.CustomGraphPass):
    """The whole of the plugin as one graph pass.

    settings: those to use; None reads the settings in force at each compilation.
    after: a pass of the user's that runs first.
    """

    def __init__(self, settings: Settings | None = None, after: Any = None) -> None:
        self.settings = settings
        self.after = after
        self.latest: Report | None = None

    def _settings(self) -> Settings:
        return self.settings if self.settings is not None else settings_module.current()

    def uuid(self) -> str | None:
        """Inductor's cache key for this pass; None (no caching) beside a user's pass that has none, or for a dump.

        Inductor asks for it before it looks into its cache, and this is the only word that a pass hears of a graph
        that is found there. Such a graph calls the CUDA C++ ops by name, so they are loaded here; where they cannot be,
        it is another key, as nothing would answer to those names.
        """
        cuda_ops = f"CUDA C++ ops: {_load_cuda_ops()}"
        settings = self._settings()
        if settings.dump is not None:  # a graph from the cache comes by nothing that is written
            return None
        if self.after is None:
            return cache_key.key(settings, cuda_ops)
        theirs = getattr(self.after, "uuid", lambda: None)()
        return None if theirs is None else cache_key.key(settings, cuda_ops, repr(theirs))

    def __call__(self, graph: fx.Graph) -> None:
        if self.after is not None:
            self.after(graph)
        settings = self._settings()
        run = _Run(graph, settings)
        run.all()
        self.latest = run.report
        warming.at_end_of_compilation(run.report, settings)
        reporting.add(run.report)
        reporting.publish(run.report, settings.report)
        if settings.strict and run.applies:
            silent = [name for name in sorted(settings.named_on) if name not in run.report.matches]
            if silent:
                raise StrictError(
                    f"{', '.join(silent)} fired nowhere in graph {run.report.graph}"
                    f" (FUSION_PASSES_STRICT).\n{run.report}"
                )

    def __reduce__(self) -> Any:
        return (FusionPass, (self.settings, self.after))


def run(graph: fx.Graph, settings: Settings, only: Sequence[Fusion] | None = None) -> Report:
    """Rewrite a graph in place; ``only`` these fusions, whatever the settings say of which are on."""
    passes = _Run(graph, settings, only)
    passes.all()
    return passes.report


class _Run:
    """The passes over one graph."""

    def __init__(
        self, graph: fx.Graph, settings: Settings, only: Sequence[Fusion] | None = None
    ) -> None:
        self.graph, self.settings, self.only = graph, settings, only
        self.device = _device_of(graph)
        self.arch = tables.arch_of(self.device)
        self.report = Report(
            graph=torch_internals.compile_id(),
            device=self.arch,
            nodes_before=len(graph.nodes),
            nodes_after=len(graph.nodes),
        )
        self.applies = self._applies()
        self.flattened: list[flat_products.Flattened] = []
        self.recognized: list[recognition.Recognized] = []
        self._left = slower.Left(self.arch)
        self._dumped = 0

    def _applies(self) -> bool:
        if not torch_internals.is_supported():
            _warn_unsupported()
            self.report.notes.append(
                f"torch {torch.__version__} is not supported: compiled unfused"
            )
        elif any(
            node.op == "placeholder" and node.name.startswith("tangents")
            for node in self.graph.nodes
        ):
            self.report.notes.append(
                "a training graph is left as it is: call the model under torch.no_grad() to fuse it"
            )
        else:
            return True
        return False

    def all(self) -> None:
        if self.only is not None:
            fusions = list(self.only)
            self.report.states.update({fusion.name: (True, "asked for") for fusion in fusions})
        else:
            for name, fusion in registry().items():
                self.report.states[name] = self.settings.enabled(
                    name, *fusion.default_state(self.arch)
                )
            fusions = [fusion for name, fusion in registry().items() if self.report.states[name][0]]
        if not self.applies or not fusions:
            return
        self._dump("before")
        self._timed("canonical", self._canonical)
        for fusion in fusions:
            self._timed(fusion.name, lambda fusion=fusion: self._one(fusion))
        self._timed("near_misses", lambda: self._explain(fusions))
        self._timed("tidy", self._tidy)
        self.report.nodes_after = len(self.graph.nodes)

    def _canonical(self) -> None:
        views.remove_needless(self.graph)
        # one view for each way of looking at a value, or a recognition would have two inputs where it has one
        common_subexpressions.merge(
            self.graph,
            lambda node: transparent(node) is not None or common_subexpressions.is_view(node),
        )
        torch_internals.tidy(self.graph)
        self.flattened = flat_products.flatten(self.graph)
        self.recognized = recognition.recognize(self.graph, self._check_recognition)

    def _check_recognition(self, match: Match, results: list[fx.Node]) -> bool:
        if self.settings.verify == "off":
            return True
        try:
            verify.check(match, results)
        except verify.Differs as difference:
            if self.settings.verify == "raise":
                raise
            self._refuse(match.fusion, match.outputs[0], _differs(difference), "")
            return False
        return True

    def _refuse(self, fusion: Fusion, node: fx.Node, reason: str, warning: str | None) -> None:
        """Report why a place stays as it is, and warn of it unless ``warning``, which is added, is None."""
        if not reason:  # the subject of another fusion
            return
        if warning is not None:
            warnings.warn(f"{fusion.name} at {module_path(node)} {reason}{warning}", stacklevel=2)
        self.report.near_misses.append(NearMiss(fusion.name, module_path(node), node.name, reason))

    def _one(self, fusion: Fusion) -> None:
        if fusion.transform is not None:
            self._transform(fusion, fusion.transform)
        elif fusion.find is not None:
            self._places(fusion, fusion.find)
        else:
            self._patterns(fusion)
        self._dump(fusion.name)

    def _transform(
        self, fusion: Fusion, transform: Callable[[fx.Graph], Iterable[Site | NearMiss]]
    ) -> None:
        if not is_shipped(fusion):
            trial = fx.Graph()
            trial.output(trial.graph_copy(self.graph, {}))
            try:  # on a copy, as what a third party's code leaves behind when it raises cannot be undone
                list(transform(trial))
                trial.lint()
            except Exception as error:
                last = next(iter(reversed(self.graph.nodes)))
                self._refuse(fusion, last, *_raised("transform", error))
                return
        # a transform that asks settings.current() finds what this compilation was given
        given: dict[str, Any] = {
            "fusions": self.settings.fusions,
            "allow_reference": self.settings.allow_reference,
            "overlap_from": self.settings.overlap_from,
            **self.settings.toggles,
        }
        with settings_module.patch(**given):
            for found in transform(self.graph):
                if isinstance(found, NearMiss):
                    self.report.near_misses.append(found)
                else:
                    self.report.sites.append(found)

    def _places(
        self, fusion: Fusion, find: Callable[[fx.Graph], Iterable[Place | NearMiss]]
    ) -> None:
        try:
            found = list(find(self.graph))
        except Exception as error:  # a walk only reads: the graph is as it was
            last = next(iter(reversed(self.graph.nodes)))
            self._refuse(fusion, last, *_raised("find", error))
            return
        moved = False
        for place in found:
            if isinstance(place, NearMiss):
                self.report.near_misses.append(place)
            elif self._rewrite(fusion, place):
                moved = True
        if moved:
            views.remove_needless(self.graph)
            torch_internals.tidy(self.graph)

    def _patterns(self, fusion: Fusion) -> None:
        if fusion.needs and not any(_is_named(node, fusion.needs) for node in self.graph.nodes):
            return
        roots = dict.fromkeys(
            node for p in fusion.patterns for node in candidates(self.graph, compile_pattern(p))
        )
        moved = False
        for node in sorted(roots):
            if not node.users:
                continue
            match = find(fusion, self.graph, node)
            if match is not None and self._rewrite(fusion, match):
                moved = True
        if moved:
            views.remove_needless(self.graph)
            torch_internals.tidy(self.graph)

    def _rewrite(self, fusion: Fusion, match: Match | Place) -> bool:
        root = match.outputs[0]
        rewrite = Rewrite(match, self.settings.allow_reference)
        warning: str | None = None
        try:
            objection = self._objection(fusion, match)
            if objection is not None:
                raise NotRewritten(objection)
            assert fusion.rewrite is not None
            finished = rewrite.finish(fusion.rewrite(rewrite))
            if self.settings.verify != "off":
                verify.check(match, finished)
            site = self._site(fusion, rewrite)
        except NotRewritten as why:
            reason = str(why)
        except verify.Differs as difference:
            if self.settings.verify == "raise":
                raise
            reason, warning = _differs(difference), ""
        except Exception as error:
            # a fusion's own code, perhaps a third party's: the model must run
            reason, warning = _raised("rewrite", error)
        else:
            rewrite.commit(finished)
            self.report.sites.append(site)
            return True
        rewrite.abandon()
        self._refuse(fusion, root, reason, warning)
        return False

    def _objection(self, fusion: Fusion, match: Any) -> str | None:
        for constraint in fusion.constraints:
            if not constraint.holds(match):
                return constraint.reason(match)
        if not fusion.allow_shared:
            for node, user in escapes(match.nodes.values(), match.outputs):
                return f"{node.name} inside of it is also used by {user.name}"
        if would_cycle(match):
            return "one of its inputs is computed from one of its outputs"
        return self._slower(fusion, match)

    def _slower(self, fusion: Fusion, match: Any) -> str | None:
        if self.only is not None or not self.settings.by_default(fusion.name):
            return None
        return self._left.why(fusion, match)

    def _site(self, fusion: Fusion, rewrite: Rewrite) -> Site:
        sizes = rewrite.match.sizes
        saved = fusion.bytes_saved()
        saved = saved.xreplace(
            {symbol: sympy.sympify(sizes[symbol.name]) for symbol in saved.free_symbols}
        )
        return Site(
            fusion=fusion.name,
            module=module_path(rewrite.match.outputs[0]),
            pattern=rewrite.match.spelling,
            implementations=tuple(rewrite.implementations),
            sizes={name: str(size) for name, size in sizes.items()},
            bytes_saved=str(saved),
            bytes_saved_here=torch_internals.size_hint(saved, self.graph),
        )

    def _explain(self, fusions: Iterable[Fusion]) -> None:
        others = list(other_codes.find(self.graph))
        for meaning in (*recognition.SHORT_CUTS, *recognition.MEANINGS):
            kind = _kind(meaning.name)
            said = {miss.module for miss in self.report.near_misses if _kind(miss.fusion) == kind}
            if meaning is ASYMMETRIC:  # what gives it away is in codes of uint8, too
                said |= {miss.module for miss in others}
            whole = meaning in recognition.SHORT_CUTS
            found = near_miss.explain(meaning, self.graph, canonical=False, whole=whole)
            self.report.near_misses += [miss for miss in found if miss.module not in said]
        self.report.near_misses += others
        for gate in unread_gates.find(self.graph):
            self.report.near_misses += self._unsaid(gate.fusion, [gate])
        self.report.near_misses += self._unsaid(unread_norms.FUSION, unread_norms.find(self.graph))
        for fusion in fusions:
            found = near_miss.explain(fusion, self.graph)
            self.report.near_misses += self._unsaid(fusion.name, found)

    def _unsaid(self, fusion: str, found: Iterable[NearMiss]) -> list[NearMiss]:
        """Near misses of a fusion in modules of which the report has none of it yet."""
        here = {miss.module for miss in self.report.near_misses if miss.fusion == fusion}
        return [miss for miss in found if miss.module not in here]

    def _tidy(self) -> None:
        """Replace each custom op by the op of its implementation where the choice is already certain."""
        torch_internals.tidy(self.graph)
        flat_products.restore(self.graph, self.flattened)
        recognition.restore(self.graph, self.recognized)
        ops = custom_ops.ops().values()
        declared = {op.overload: op for op in ops} | {
            op.tensor_eps: op for op in ops if op.tensor_eps
        }
        for node in self.graph.nodes:
            op = declared.get(node.target) if node.op == "call_function" else None
            if op is not None:
                implementation = self._ready(op, node.args, node.kwargs)
                if implementation.overload is not None and node.target is op.overload:
                    node.target = implementation.overload
                if torch_internals.wrapper_is_cpp():  # it cannot write the default of a dtype
                    dtypes = {k: v for k, v in op.defaults.items() if isinstance(v, torch.dtype)}
                    node.kwargs = dtypes | node.kwargs
            for target, args, kwargs in node.meta.get("ops_inside", ()):
                self._ready(declared[target], args, kwargs)
        torch_internals.tidy(self.graph)
        self.graph.lint()

    def _ready(self, op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Implementation:
        """The implementation of an op of the graph, or inside of one; a warm-up hears of what it compiles."""
        implementation = choose(op, args, kwargs).implementation
        assert implementation is not None
        problem = warming.problem_of(op, implementation.name, args, kwargs, self.graph)
        if problem is not None:
            self.report.problems.append(problem)
        implementation.prepare()  # what has to be built is built now, not in the first call
        return implementation

    def _timed(self, name: str, run: Any) -> None:
        start = time.perf_counter()
        run()
        self.report.seconds[name] = time.perf_counter() - start

    def _dump(self, name: str) -> None:
        if self.settings.dump is not None:
            folder = Path(self.settings.dump)
            stem = f"{self.report.graph.replace('/', '_') or 'graph'}.{self._dumped:02d}.{name}.txt"
            with settings_module.naming("dump", folder):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / stem).write_text(f"{self.graph}\n")
            self._dumped += 1


def _kind(fusion: str) -> str:
    """What a near miss is of: one place of a quantization is told once, and a norm beside it is told too."""
    return "quant" if "quant" in fusion else fusion


def _is_named(node: fx.Node, name: str) -> bool:
    operation = describe(node)
    return operation is not None and operation.name == name


def _differs(difference: verify.Differs) -> str:
    return f"undone, FUSION_PASSES_VERIFY found a difference: {difference}"


def _raised(what: str, error: Exception) -> tuple[str, str]:
    """The reason for the report, and what a warning adds to it."""
    reason = f"undone, the {what} raised {type(error).__name__}: {error}"
    return reason, f"\n{traceback.format_exc()}"


def _device_of(graph: fx.Graph) -> torch.device:
    devices = [
        n.meta["val"].device for n in graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)
    ]
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))


@functools.cache
def _warn_unsupported() -> None:
    first, last = (".".join(map(str, version)) for version in torch_internals.SUPPORTED)
    warnings.warn(
        f"fusion_passes supports torch {first} to {last}, this is {torch.__version__}: graphs compile unfused",
        stacklevel=2,
    )


def _load_cuda_ops() -> bool:
    """Load the CUDA C++ ops where this process uses a GPU and they can run on it; whether they are loaded."""
    usable = torch.cuda.is_initialized() and "cuda" in custom_ops.ops()["group_quant"].usable(
        torch.device("cuda", torch.cuda.current_device())
    )
    if usable:
        custom_ops.library.load_cuda()
    return usable
