"""The pass over one graph: settings, verification, and what goes wrong in a fusion."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

import fusion_passes
from fusion_passes import (
    Constraint,
    Fusion,
    manager,
    registry,
    settings,
    torch_internals,
    verify,
)
from fusion_passes.manager import FusionPass, StrictError
from fusion_passes.settings import SettingsError
from fusion_passes.testing import ModelFragment, fuse
from tests.fusion_passes.helpers import (
    assert_same,
    calls,
    everything,
    fuse_all,
    llama_norm,
    misses,
    quantize,
    random,
    silu_mul,
)

pytestmark = pytest.mark.usefixtures("references", "fresh_reports")

GATED = (random(6, 256), random(6, 256, seed=1))
SILU = registry()["silu_mul"]
WRONG = dataclasses.replace(
    SILU, name="wrong", rewrite=lambda m: (m.call("silu_mul", m.tensor("up"), m.tensor("gate")),)
)


def boom(*_):
    raise KeyError("boom")


def fragment(
    kind: str = "norm", residual: bool = True, linears: int = 2
) -> tuple[ModelFragment, torch.Tensor, torch.Tensor]:
    module = ModelFragment(kind, "llama", residual, linears, 256, 128, torch.bfloat16, 0).eval()
    return module, random(4, 256), random(4, 256, seed=1)


# --- what goes wrong in a fusion -------------------------------------------------------------------


def test_verify_undoes_a_wrong_rewrite():
    with (
        settings.patch(verify=True),
        pytest.warns(UserWarning, match=r"wrong at \(top\) undone.*values differ"),
    ):
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
    with (
        settings.patch(verify=True),
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        result = fuse_all(lambda x, mask, w: llama_norm(x[mask], w), x, x[:, 0] > 0, random(256))
    assert result.report.matches == {}
    assert any("not known while compiling" in reason for reason in misses(result, "rms_norm"))


BROKEN = {
    "rewrite": dataclasses.replace(SILU, name="broken", rewrite=boom),
    "too few results": dataclasses.replace(SILU, name="broken", rewrite=lambda m: ()),
    "wrong dtype": dataclasses.replace(
        SILU, name="broken", rewrite=lambda m: (m.cast(m.tensor("up"), torch.float32),)
    ),
    "constraint": dataclasses.replace(SILU, name="broken", constraints=(Constraint(boom, str),)),
    "reason": dataclasses.replace(
        SILU, name="broken", constraints=(Constraint(lambda match: False, boom),)
    ),
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
    with pytest.warns(
        UserWarning, match=r"(?s)undone, the rewrite raised KeyError: 'boom'.*Traceback"
    ):
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
    current = settings.resolve(
        {"fusions": "rms_norm,silu_mul", "allow_reference": True, "strict": True}, registry()
    )[0]
    graph = torch_internals.capture(silu_mul, *GATED)[0].graph
    with pytest.raises(StrictError, match="rms_norm fired nowhere"):
        FusionPass(current)(graph)
    assert fusion_passes.report().matches == {"silu_mul": 1}  # the report is there to see why
    relaxed = current.model_copy(update={"fusions": "silu_mul"})
    FusionPass(relaxed)(torch_internals.capture(silu_mul, *GATED)[0].graph)
    every = current.model_copy(update={"fusions": "all"})
    FusionPass(every)(torch_internals.capture(silu_mul, *GATED)[0].graph)  # `all` names none


def test_the_graph_is_linted_when_the_passes_are_done(monkeypatch):
    """A graph that is broken is an error here, not one of Inductor's far from its cause."""
    linted = []
    monkeypatch.setattr(torch.fx.Graph, "lint", lambda graph: linted.append(calls(graph)))
    graph = torch_internals.capture(silu_mul, *GATED)[0].graph
    options = {"fusions": "silu_mul", "allow_reference": True}
    FusionPass(settings.resolve(options, registry())[0])(graph)
    assert linted[-1:] == [calls(graph)]
    assert fusion_passes.report().matches == {"silu_mul": 1}


def test_an_unsupported_torch_compiles_unfused_with_one_warning(monkeypatch):
    manager._warn_unsupported.cache_clear()
    monkeypatch.setattr(torch_internals, "SUPPORTED", ((9, 0), (9, 1)))
    monkeypatch.setattr(torch_internals, "is_supported", lambda: False)
    with pytest.warns(
        UserWarning, match=r"supports torch 9\.0 to 9\.1, this is .*unfused"
    ) as caught:
        results = [fuse_all(silu_mul, *GATED) for _ in range(2)]
    assert len(caught) == 1
    for result in results:
        assert result.report.matches == {}
        assert "not supported" in result.report.notes[0]
        assert calls(result.after.graph) == calls(result.before.graph)
    manager._warn_unsupported.cache_clear()


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("2.10.0", False),
        ("2.11.0", True),
        ("2.13.1+cu130", True),
        ("2.12.0a0+git12", True),
        ("3.0.0", False),
    ],
)
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


# --- settings ---------------------------------------------------------------------------------------


def test_environment_patch_and_options_decide(monkeypatch):
    def states(options=None):
        current = settings.resolve({"allow_reference": True, **(options or {})}, registry())[0]
        return manager.run(torch_internals.capture(silu_mul, *GATED)[0].graph, current).states[
            "silu_mul"
        ]

    assert states()[0] is False
    assert states()[1].startswith("off by default")
    monkeypatch.setenv("FUSION_PASSES_SILU_MUL", "1")
    assert states() == (True, "FUSION_PASSES_SILU_MUL=1")
    with settings.patch(silu_mul=False):
        assert states() == (False, "settings.patch(silu_mul=False)")
        assert states({"silu_mul": True}) == (True, "options={'silu_mul': True}")
    monkeypatch.setenv("FUSION_PASSES", "none")
    assert states() == (
        True,
        "FUSION_PASSES_SILU_MUL=1",
    )  # a fusion's own toggle wins over the list
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
    assert "FUSION_PASSES_ALLOW_REFERENCE=1" in next(
        m.reason for m in report.near_misses if m.fusion == "silu_mul"
    )
    assert calls(gm.graph) == before


@pytest.mark.parametrize(
    "only",
    [
        [],
        ["shared_group_quant"],
        ["block_scaled_linear"],
        ["silu_mul"],
        ["add_rms_norm_group_quant"],
    ],
)
def test_what_no_fusion_took_goes_back_to_what_it_was(only):
    """Norms, activations and quantizations are recognized for every fusion, and undone where none fired."""

    def block(x, r, w, g):
        return (
            quantize(llama_norm(x, w), 32),
            llama_norm(x + r, w).sin(),
            quantize(silu_mul(x, g), 32),
        )

    result = fuse_all(block, *GATED, random(256), random(6, 256, seed=3), only=only)
    before, after = (
        sorted(c for c in calls(g.graph) if "view" not in c) for g in (result.before, result.after)
    )
    if only == ["silu_mul"]:
        assert result.report.matches == {"silu_mul": 1}
    else:
        assert result.report.matches == {}
        assert after == before
        assert all(
            torch.equal(a.float(), b.float())
            for a, b in zip(result.actual, result.expected, strict=True)
        )
    assert not any(hasattr(node.target, "meaning_kind") for node in result.after.graph.nodes)


def test_recognitions_whose_inputs_are_merged_go_back_too():
    """Two equal products become one node, so that a meaning has one input where it had two."""
    result = fuse_all(
        lambda x, w: silu_mul(x @ w, x @ w),
        random(6, 64),
        random(64, 64),
        only=["shared_group_quant"],
    )
    assert result.report.matches == {}


def test_dump(tmp_path):
    with settings.patch(
        dump=tmp_path / "graphs", fusions="silu_mul,rms_norm", allow_reference=True
    ):
        fuse(silu_mul, *GATED)
    files = sorted((tmp_path / "graphs").iterdir())
    assert [file.name.split(".", 2)[-1] for file in files] == [
        "before.txt",
        "silu_mul.txt",
        "rms_norm.txt",
    ]
    assert "custom_ops.silu_mul" not in files[0].read_text()
    assert "custom_ops.silu_mul" in files[1].read_text()
