"""The pass over one graph: settings, verification, what goes wrong in a fusion, the report, the cache key."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings

import pytest
import sympy
import torch
from torch import nn

import fusion_passes
from fusion_passes import Constraint, Fusion, Pattern, Tensor, manager, registry, reporting, settings, torch_internals, verify
from fusion_passes.manager import FusionPass, StrictError
from fusion_passes.reporting import NearMiss, Report, Site
from fusion_passes.settings import Settings, SettingsError
from fusion_passes.testing import ModelFragment, fuse
from tests.fusion_passes.helpers import assert_same, calls, everything, fuse_all, llama_norm, misses, quantize, random, registered, silu_mul

pytestmark = pytest.mark.usefixtures("references", "fresh_reports")

GATED = (random(6, 256), random(6, 256, seed=1))
SILU = registry()["silu_mul"]
WRONG = dataclasses.replace(SILU, name="wrong", rewrite=lambda m: (m.call("silu_mul", m.tensor("up"), m.tensor("gate")),))


def boom(*_):
    raise KeyError("boom")


def fragment(kind: str = "norm", residual: bool = True, linears: int = 2) -> tuple[ModelFragment, torch.Tensor, torch.Tensor]:
    module = ModelFragment(kind, "llama", residual, linears, 256, 128, torch.bfloat16, 0).eval()
    return module, random(4, 256), random(4, 256, seed=1)


# --- what goes wrong in a fusion -------------------------------------------------------------------------------


def test_verify_undoes_a_wrong_rewrite():
    with settings.patch(verify=True), pytest.warns(UserWarning, match=r"wrong at \(top\) undone.*values differ"):
        result = fuse(silu_mul, *GATED, only=[WRONG])
    assert_same(result)
    assert result.report.matches == {}
    assert "FUSION_PASSES_VERIFY found a difference" in misses(result, "wrong")[0]
    assert calls(result.after.graph) == calls(result.before.graph)


def test_verify_can_raise():
    with settings.patch(verify="raise"), pytest.raises(verify.Differs, match="values differ"):
        fuse(silu_mul, *GATED, only=[WRONG])


def test_without_verify_a_wrong_rewrite_stands():
    assert fuse(silu_mul, *GATED, only=[WRONG]).report.matches == {"wrong": 1}


@pytest.mark.parametrize("kind", ["norm", "gated", "plain"])
@pytest.mark.filterwarnings("error")
def test_verify_passes_every_shipped_fusion(kind):
    module, *inputs = fragment(kind)
    with settings.patch(verify="raise"):
        result = fuse(module, *inputs, only=everything())
    assert result.report.matches == module.expected


@pytest.mark.filterwarnings("error")
def test_verify_runs_symbolic_sizes_at_those_seen():
    x = random(5, 256)
    torch._dynamo.mark_dynamic(x, 0)
    with settings.patch(verify="raise"):
        result = fuse_all(lambda x, w: quantize(llama_norm(x, w)), x, random(256))
    assert result.report.matches == {"rms_norm_group_quant": 1}


def test_verify_of_sizes_that_only_the_data_knows():
    """Nothing can be run: undone and said, and the model still compiles."""
    x = random(6, 256)
    with settings.patch(verify=True), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = fuse_all(lambda x, mask, w: llama_norm(x[mask], w), x, x[:, 0] > 0, random(256))
    assert result.report.matches == {}
    assert any("not known while compiling" in reason for reason in misses(result, "rms_norm"))


BROKEN = {
    "rewrite": dataclasses.replace(SILU, name="broken", rewrite=boom),
    "too few results": dataclasses.replace(SILU, name="broken", rewrite=lambda m: ()),
    "wrong dtype": dataclasses.replace(SILU, name="broken", rewrite=lambda m: (m.cast(m.tensor("up"), torch.float32),)),
    "constraint": dataclasses.replace(SILU, name="broken", constraints=(Constraint(boom, str),)),
    "reason": dataclasses.replace(SILU, name="broken", constraints=(Constraint(lambda match: False, boom),)),
    "bytes": dataclasses.replace(SILU, name="broken", bytes_before="num_tokens*no_such_size"),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.filterwarnings("ignore:.*undone.*")
def test_a_fusion_that_raises_is_undone_and_reported(what):
    result = fuse(silu_mul, *GATED, only=[BROKEN[what]])
    assert_same(result)
    assert result.report.matches == {}
    assert len(misses(result, "broken")) == 1
    assert calls(result.after.graph) == calls(result.before.graph)


def test_a_rewrite_that_raises_warns_with_its_traceback():
    with pytest.warns(UserWarning, match=r"(?s)undone, the rewrite raised KeyError: 'boom'.*Traceback"):
        fuse(silu_mul, *GATED, only=[BROKEN["rewrite"]])


def test_a_transform_that_raises_is_undone_and_reported():
    def half_done(graph):
        node = next(n for n in graph.nodes if n.op == "call_function")
        node.replace_all_uses_with(node.args[0])
        raise KeyError("boom")

    with pytest.warns(UserWarning, match="undone"):
        result = fuse(silu_mul, *GATED, only=[Fusion("broken", "raises", 1, transform=half_done)])
    assert_same(result)
    assert "KeyError" in misses(result, "broken")[0]


def test_strict():
    current = settings.resolve({"fusions": "rms_norm,silu_mul", "allow_reference": True, "strict": True}, registry())[0]
    graph = torch_internals.capture(silu_mul, *GATED)[0].graph
    with pytest.raises(StrictError, match="rms_norm fired nowhere"):
        FusionPass(current)(graph)
    assert fusion_passes.report().matches == {"silu_mul": 1}  # the report is there to see why
    relaxed = current.model_copy(update={"fusions": "silu_mul"})
    FusionPass(relaxed)(torch_internals.capture(silu_mul, *GATED)[0].graph)
    every = current.model_copy(update={"fusions": "all"})
    FusionPass(every)(torch_internals.capture(silu_mul, *GATED)[0].graph)  # `all` names none


def test_an_unsupported_torch_compiles_unfused_with_one_warning(monkeypatch):
    manager._warn_unsupported.cache_clear()
    monkeypatch.setattr(torch_internals, "SUPPORTED", ((9, 0), (9, 1)))
    monkeypatch.setattr(torch_internals, "is_supported", lambda: False)
    with pytest.warns(UserWarning, match=r"supports torch 9\.0 to 9\.1, this is .*unfused") as caught:
        results = [fuse_all(silu_mul, *GATED) for _ in range(2)]
    assert len(caught) == 1
    for result in results:
        assert result.report.matches == {}
        assert "not supported" in result.report.notes[0]
        assert calls(result.after.graph) == calls(result.before.graph)
    manager._warn_unsupported.cache_clear()


@pytest.mark.parametrize(("version", "supported"), [("2.10.0", False), ("2.11.0", True), ("2.13.1+cu130", True), ("2.12.0a0+git12", True), ("3.0.0", False)])
def test_the_range_of_versions(version, supported):
    assert torch_internals.is_supported(version) == supported


def test_a_training_graph_is_left_alone():
    x, weight = random(4, 64).requires_grad_(), random(64).requires_grad_()
    expected = torch.autograd.grad(llama_norm(x, weight).float().square().sum(), (x, weight))
    with settings.patch(fusions="all", allow_reference=True):
        out = torch.compile(llama_norm, backend="fusion_passes")(x, weight)
        actual = torch.autograd.grad(out.float().square().sum(), (x, weight))
    report = fusion_passes.report()
    assert report.matches == {}
    assert "training graph" in report.notes[0]
    for ours, eager in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)


# --- settings --------------------------------------------------------------------------------------------------


def test_environment_patch_and_options_decide(monkeypatch):
    def states(options=None):
        current = settings.resolve({"allow_reference": True, **(options or {})}, registry())[0]
        return manager.run(torch_internals.capture(silu_mul, *GATED)[0].graph, current).states["silu_mul"]

    assert states()[0] is False
    assert states()[1].startswith("off by default")
    monkeypatch.setenv("FUSION_PASSES_SILU_MUL", "1")
    assert states() == (True, "FUSION_PASSES_SILU_MUL=1")
    with settings.patch(silu_mul=False):
        assert states() == (False, "settings.patch(silu_mul=False)")
        assert states({"silu_mul": True}) == (True, "options={'silu_mul': True}")
    monkeypatch.setenv("FUSION_PASSES", "none")
    assert states() == (True, "FUSION_PASSES_SILU_MUL=1")  # a fusion's own toggle wins over the list
    monkeypatch.delenv("FUSION_PASSES_SILU_MUL")
    assert states() == (False, "not in FUSION_PASSES=none")
    assert states({"fusions": "+silu_mul"})[0] is True
    monkeypatch.setenv("FUSION_PASSES_SILU_MULL", "1")
    with pytest.raises(SettingsError, match="FUSION_PASSES_SILU_MUL"):
        states()


def test_nothing_fires_on_a_cpu_unless_references_are_allowed():
    current = settings.resolve({"fusions": "all"}, registry())[0]
    gm = torch_internals.capture(silu_mul, *GATED)[0]
    before = calls(gm.graph)
    report = manager.run(gm.graph, current)
    assert report.matches == {}
    assert "FUSION_PASSES_ALLOW_REFERENCE=1" in next(m.reason for m in report.near_misses if m.fusion == "silu_mul")
    assert calls(gm.graph) == before


@pytest.mark.parametrize("only", [[], ["shared_group_quant"], ["block_scaled_linear"], ["silu_mul"], ["add_rms_norm_group_quant"]])
def test_what_no_fusion_took_goes_back_to_what_it_was(only):
    """Norms, activations and quantizations are recognized for every fusion, and undone where none fired."""

    def block(x, r, w, g):
        return quantize(llama_norm(x, w), 32), llama_norm(x + r, w).sin(), quantize(silu_mul(x, g), 32)

    result = fuse_all(block, *GATED, random(256), random(6, 256, seed=3), only=only)
    before, after = (sorted(c for c in calls(g.graph) if "view" not in c) for g in (result.before, result.after))
    if only == ["silu_mul"]:
        assert result.report.matches == {"silu_mul": 1}
    else:
        assert result.report.matches == {}
        assert after == before
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(result.actual, result.expected, strict=True))
    assert not any(hasattr(node.target, "meaning_kind") for node in result.after.graph.nodes)


def test_recognitions_whose_inputs_are_merged_go_back_too():
    """Two equal products become one node, so that a meaning has one input where it had two."""
    result = fuse_all(lambda x, w: silu_mul(x @ w, x @ w), random(6, 64), random(64, 64), only=["shared_group_quant"])
    assert result.report.matches == {}


def test_dump(tmp_path):
    with settings.patch(dump=tmp_path / "graphs", fusions="silu_mul,rms_norm", allow_reference=True):
        fuse(silu_mul, *GATED)
    files = sorted((tmp_path / "graphs").iterdir())
    assert [file.name.split(".", 2)[-1] for file in files] == ["before.txt", "silu_mul.txt", "rms_norm.txt"]
    assert "custom_ops.silu_mul" not in files[0].read_text()
    assert "custom_ops.silu_mul" in files[1].read_text()


# --- the report ------------------------------------------------------------------------------------------------


def test_the_report():
    module, *inputs = fragment()
    report = fuse(nn.ModuleDict({"block": module})["block"], *inputs, only=everything()).report
    assert report.matches == module.expected == {"block_scaled_linear": 2, "add_rms_norm_group_quant": 1, "shared_group_quant": 1}
    by_name = {site.fusion: site for site in report.sites}
    norm = by_name["add_rms_norm_group_quant"]
    assert norm.module == "linears.0"  # where its output is made
    assert norm.implementations == ("add_rms_norm_group_quant:reference",)
    assert norm.sizes == {"num_tokens": "4", "num_groups": "2", "group_size": "128"}
    assert sorted(s.module for s in report.sites if s.fusion == "block_scaled_linear") == ["linears.0", "linears.1"]
    assert report.bytes_saved["add_rms_norm_group_quant"] == (4 * 4 * 256, 4 * 4 * 256)
    assert report.nodes_after < report.nodes_before
    assert {"canonical", "near_misses", "tidy", *registry()} == report.seconds.keys()
    text = str(report)
    assert all(name in text for name in registry())
    assert f"{4 * 4 * 256:,}" in text


def test_bytes_are_expressions_over_the_sizes_of_the_graph():
    x = random(5, 256)
    torch._dynamo.mark_dynamic(x, 0)
    report = fuse_all(lambda x, w: quantize(llama_norm(x, w)), x, random(256)).report
    saved, here = report.bytes_saved["rms_norm_group_quant"]
    (symbol,) = saved.free_symbols
    assert saved == 4 * 256 * symbol
    assert here == 4 * 256 * 5
    assert isinstance(saved, sympy.Expr)


def test_the_report_is_json():
    report = fuse_all(lambda x, w: (*quantize(llama_norm(x, w)), quantize(x, 32)), random(4, 256), random(256)).report
    assert report.near_misses
    assert report.sites
    again = Report.from_json(report.to_json())
    assert again == report
    assert (again.matches, again.bytes_saved, str(again)) == (report.matches, report.bytes_saved, str(report))


def test_reports_are_kept_until_reset():
    with pytest.raises(LookupError, match="no graph was compiled"):
        fusion_passes.report()
    first, second = Report(graph="0/0"), Report(graph="1/0")
    reporting.add(first)
    reporting.add(second)
    assert fusion_passes.report() is second
    assert fusion_passes.reports() == [first, second]
    fusion_passes.reset_reports()
    assert fusion_passes.reports() == []


def test_like_near_misses_share_a_row():
    found = [NearMiss("rms_norm", f"layers.{i}", f"mul_{i}", f"mul_{i} has another dtype") for i in range(12)]
    text = str(Report(states={"rms_norm": (True, "")}, near_misses=found))
    assert "layers.0 and 11 more" in " ".join(text.split())
    assert "layers.11" not in text


def test_a_site_without_known_sizes_has_no_number():
    sites = [Site("rms_norm", "a", bytes_saved="4*u0", bytes_saved_here=None), Site("rms_norm", "b", bytes_saved="8", bytes_saved_here=8)]
    saved, here = Report(sites=sites).bytes_saved["rms_norm"]
    assert (str(saved), here) == ("4*u0 + 8", None)


# --- the cache key ---------------------------------------------------------------------------------------------


def uuid(**options) -> str | None:
    return FusionPass(settings.resolve(options, registry())[0]).uuid()


@pytest.mark.parametrize("options", [{"fusions": "all"}, {"fusions": "-rms_norm"}, {"rms_norm": True}, {"rms_norm": False}, {"allow_reference": True}, {"verify": True}, {"verify": "raise"}])
def test_what_changes_the_graph_is_in_the_key(options):
    assert uuid(**options) != uuid()


@pytest.mark.parametrize("options", [{"report": True}, {"strict": True}, {"dump": "graphs"}, {"fusions": "default"}])
def test_nothing_else_is_in_the_key(options):
    assert uuid(**options) == uuid()


def test_the_key_knows_implementations_versions_and_sources(monkeypatch):
    before = uuid()
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "triton")
    assert uuid() != before
    monkeypatch.undo()
    monkeypatch.setattr(manager, "source_hash", lambda: "another")
    assert uuid() != before
    monkeypatch.undo()
    monkeypatch.setattr(manager, "_versions", lambda: ("another",))
    assert uuid() != before


def test_the_key_follows_the_settings_in_force():
    """The options for stock Inductor read the settings at each compilation."""
    late = FusionPass()
    before = late.uuid()
    with settings.patch(rms_norm=True):
        assert late.uuid() != before
    assert late.uuid() == before


def _pattern(scale, function=torch.tanh):
    return Pattern(lambda x: function(x) * scale, {"x": Tensor("num_tokens", "width")}, name="p")


def _times(scale):
    return {2: lambda m: (m.emit(torch.ops.aten.mul.Tensor, m.tensor("x"), 2.0),), 3: lambda m: (m.emit(torch.ops.aten.mul.Tensor, m.tensor("x"), 3.0),)}[scale]


MINE = Fusion("mine", "a third party's", 3, patterns=(_pattern(2.0),), rewrite=_times(2))
CHANGES = {
    "a constant of the rewrite": dataclasses.replace(MINE, rewrite=_times(3)),
    "a name in the rewrite": dataclasses.replace(MINE, rewrite=lambda m: (m.emit(torch.ops.aten.add.Tensor, m.tensor("x"), 2.0),)),
    "a value that the pattern closes over": dataclasses.replace(MINE, patterns=(_pattern(4.0),)),
    "another function in the pattern": dataclasses.replace(MINE, patterns=(_pattern(2.0, torch.sigmoid),)),
    "a constraint": dataclasses.replace(MINE, constraints=(Constraint(lambda match: False, str),)),
    "its order": dataclasses.replace(MINE, priority=5),
    "shared values": dataclasses.replace(MINE, allow_shared=True),
    "a transform instead": Fusion("mine", "a third party's", 3, transform=lambda graph: []),
    "a rewrite of ours": dataclasses.replace(SILU, name="mine"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_changes_with_somebody_elses_fusion(change):
    with registered(MINE):
        before = uuid()
        assert before != uuid(mine=True)
    with registered(CHANGES[change]):
        assert uuid() != before


def test_transforms_that_differ_have_other_keys():
    keys = set()
    for transform in (lambda graph: [], lambda graph: [graph.lint()] and []):
        with registered(Fusion("mine", "a third party's", 3, transform=transform)):
            keys.add(uuid())
    assert len(keys) == 2


def test_the_key_of_the_same_code_is_the_same_in_another_process():
    """Compiling the same source again gives new function objects at new addresses."""
    source = "def make(s):\n    return lambda m: (m.emit(max, (lambda v: v + s)(m.tensor('x'))),)\nrewrite = make(2)\n"
    keys = set()
    for _ in range(2):
        scope: dict = {"__name__": "theirs"}
        exec(source, scope)
        with registered(dataclasses.replace(MINE, rewrite=scope["rewrite"])):
            keys.add(uuid())
    assert len(keys) == 1


class Theirs(torch_internals.CustomGraphPass):
    def __init__(self, key):
        self.key = key

    def __call__(self, graph):
        self.seen = graph

    def uuid(self):
        return self.key


def test_a_pass_of_the_users_is_part_of_the_key():
    current = settings.current()
    one, other = (FusionPass(current, after=Theirs(key)).uuid() for key in ("one", "other"))
    assert len({one, other, FusionPass(current).uuid()}) == 3
    assert FusionPass(current, after=lambda graph: None).uuid() is None  # nothing is known of it: never cached
    assert FusionPass(current, after=Theirs(None)).uuid() is None


def test_a_pass_of_the_users_runs_first():
    theirs = Theirs("one")
    graph = torch_internals.capture(silu_mul, *GATED)[0].graph
    FusionPass(Settings(), after=theirs)(graph)
    assert theirs.seen is graph


@pytest.mark.parametrize("copied", [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy])
def test_a_pass_can_be_pickled(copied):
    current = settings.resolve({"fusions": "all,-rms_norm", "silu_mul": True, "allow_reference": True, "dump": "graphs"}, registry())[0]
    for fusion_pass in (FusionPass(current), FusionPass()):
        again = copied(fusion_pass)
        assert again.uuid() == fusion_pass.uuid()
        assert again.settings == fusion_pass.settings
