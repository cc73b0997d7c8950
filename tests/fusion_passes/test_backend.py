"""torch.compile with the backend, as users call it: modes, options, dynamic sizes, caches, explain."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import fusion_passes
from fusion_passes import registry, settings, torch_internals
from fusion_passes.testing import ModelFragment
from tests.fusion_passes.helpers import llama_norm, quantize, random, registered, silu_mul

pytestmark = pytest.mark.usefixtures("references", "empty_caches", "fresh_reports")

ROOT = Path(__file__).parents[2]
ON = {"silu_mul": True, "allow_reference": True}
GATED = (random(6, 256), random(6, 256, seed=1))


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def compiled(fn=silu_mul, backend="fusion_passes", **kwargs):
    return torch.compile(fn, backend=backend, **kwargs)


def installed() -> bool:
    return any(
        entry.name == "fusion_passes"
        for entry in importlib.metadata.entry_points(group="torch_dynamo_backends")
    )


@pytest.mark.skipif(
    not installed(),
    reason="needs the installed package (pip install -e .): the backend is an entry point",
)
def test_the_backend_is_found_by_name():
    assert "fusion_passes" in torch._dynamo.list_backends(exclude_tags=())


def test_one_line():
    out = compiled(options=ON)(*GATED)
    assert torch.equal(out, silu_mul(*GATED))
    assert fusion_passes.report().matches == {"silu_mul": 1}
    assert fusion_passes.report().graph == "0/0"


def test_by_default_nothing_fires_on_a_cpu():
    out = compiled()(*GATED)
    torch.testing.assert_close(out, silu_mul(*GATED), rtol=2e-2, atol=2e-2)
    assert fusion_passes.report().matches == {}


@pytest.mark.parametrize(
    "mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
)
def test_modes(mode):
    with settings.patch(**ON):
        assert torch.equal(compiled(mode=mode)(*GATED), silu_mul(*GATED))
    assert fusion_passes.report().matches == {"silu_mul": 1}


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_a_mode_sets_the_options_of_inductor(mode, monkeypatch):
    seen = {}

    def compile_with_inductor(gm, example_inputs, options):
        seen.update(options)
        return gm

    monkeypatch.setattr(torch_internals, "compile_with_inductor", compile_with_inductor)
    compiled(mode=mode)(*GATED)
    stock = torch._inductor.list_mode_options(mode)
    assert stock
    assert stock.items() <= seen.items()


def test_options_of_inductor_stand_beside_ours():
    assert torch.equal(
        compiled(options={**ON, "max_autotune": False, "triton.cudagraphs": False})(*GATED),
        silu_mul(*GATED),
    )
    assert fusion_passes.report().matches == {"silu_mul": 1}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"silu_mull": True}, "did you mean 'silu_mul'"),
        ({"verfy": True}, "did you mean 'verify'"),
        ({"verify": "loudly"}, "accepted: `1` / `0`, or `raise`"),
        ({"silu_mul": "perhaps"}, "silu_mul"),
        ({"no_such_option_anywhere": True}, "no_such_option_anywhere"),
    ],
)
def test_bad_options_are_errors(options, words):
    with pytest.raises(Exception, match=words):
        compiled(options=options)(*GATED)


def test_a_misspelt_variable_is_an_error(monkeypatch):
    monkeypatch.setenv("FUSION_PASSES_SILU_MULL", "1")
    with pytest.raises(Exception, match="did you mean 'FUSION_PASSES_SILU_MUL'"):
        compiled()(*GATED)


def test_fullgraph():
    module = ModelFragment("norm", "gemma", True, 3, 256, 128, torch.bfloat16, 0).eval()
    inputs = random(2, 3, 256), random(2, 3, 256, seed=1)
    out = compiled(module, fullgraph=True, options={"fusions": "all", "allow_reference": True})(
        *inputs
    )
    for ours, eager in zip(out, module(*inputs), strict=True):
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)
    assert fusion_passes.report().matches == module.expected


def test_strict_reaches_the_user():
    with pytest.raises(Exception, match="rms_norm fired nowhere"):
        compiled(options={"rms_norm": True, "strict": True, "allow_reference": True})(*GATED)


@pytest.mark.parametrize("kind", ["norm", "gated"])
@pytest.mark.filterwarnings("error:.*undone.*")
def test_verify_runs_inside_of_a_compilation(kind):
    module = ModelFragment(kind, "llama", True, 1, 256, 128, torch.bfloat16, 0).eval()
    options = {"fusions": "all", "allow_reference": True, "verify": "raise"}
    inputs = random(5, 256), random(5, 256, seed=1)
    for value in inputs:
        torch._dynamo.mark_dynamic(value, 0)
    compiled(module, options=options)(*inputs)
    assert fusion_passes.report().matches == module.expected


def test_verify_undoes_a_wrong_rewrite_in_a_compilation():
    swapped = dataclasses.replace(
        registry()["silu_mul"],
        name="wrong",
        rewrite=lambda m: (m.call("silu_mul", m.tensor("up"), m.tensor("gate")),),
    )
    options = {"wrong": True, "allow_reference": True, "verify": True}
    with registered(swapped), pytest.warns(UserWarning, match="wrong at .* undone"):
        out = compiled(options=options)(*GATED)
    assert fusion_passes.report().matches == {}
    torch.testing.assert_close(out, silu_mul(*GATED), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dynamic", [True, None])
def test_as_many_graphs_as_stock(dynamic):
    """No pass adds a guard, so a new size recompiles exactly where it did before."""

    def graphs(backend, **kwargs):
        torch.compiler.reset()
        counters.clear()
        module = ModelFragment("norm", "llama", True, 2, 256, 128, torch.bfloat16, 0).eval()
        call = compiled(module, backend, dynamic=dynamic, **kwargs)
        for tokens in (1, 2, 7, 129, 33):
            inputs = random(tokens, 256), random(tokens, 256, seed=1)
            for ours, eager in zip(call(*inputs), module(*inputs), strict=True):
                torch.testing.assert_close(ours, eager, rtol=3e-2, atol=3e-2)
        return counters["stats"]["unique_graphs"]

    fused = graphs("fusion_passes", options={"fusions": "all", "allow_reference": True})
    reports = fusion_passes.reports()
    assert fused == len(reports) == graphs("aot_eager")
    assert all(report.matches["add_rms_norm_group_quant"] == 1 for report in reports)


def test_stock_inductor_takes_the_passes_as_options():
    options = fusion_passes.inductor_options(**ON)
    with no_caches():
        assert torch.equal(torch.compile(silu_mul, options=options)(*GATED), silu_mul(*GATED))
    assert fusion_passes.report().matches == {"silu_mul": 1}


def test_stock_inductor_follows_the_settings_in_force():
    options = fusion_passes.inductor_options()
    for on in (True, False):
        torch.compiler.reset()
        with no_caches(), settings.patch(silu_mul=on, allow_reference=True):
            torch.compile(silu_mul, options=options)(*GATED)
        assert fusion_passes.report().matches == ({"silu_mul": 1} if on else {})


class Theirs(torch_internals.CustomGraphPass):
    def __init__(self):
        self.seen = []

    def __call__(self, graph):
        self.seen.append([str(node.target) for node in graph.nodes])

    def uuid(self):
        return "theirs"


@contextmanager
def no_caches():
    """Inductor compiles each time."""
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


@pytest.mark.parametrize(
    ("backend", "how"),
    [("fusion_passes", "option"), ("fusion_passes", "config"), ("inductor", "config")],
)
def test_a_pass_of_the_users_still_runs(backend, how):
    theirs = {"joint_custom_pre_pass": Theirs()}
    with no_caches(), torch._inductor.config.patch(theirs if how == "config" else {}):
        options = {**ON, **(theirs if how == "option" else {})}
        torch.compile(
            silu_mul,
            backend=backend,
            options=options if backend == "fusion_passes" else fusion_passes.inductor_options(**ON),
        )(*GATED)
    (seen,) = theirs["joint_custom_pre_pass"].seen
    assert not any("custom_ops" in target for target in seen)  # it ran first
    assert fusion_passes.report().matches == {"silu_mul": 1}


_runs: list[int] = []


@torch.library.custom_op("fusion_passes_tests::counted", mutates_args=())
def counted(x: torch.Tensor) -> torch.Tensor:
    _runs.append(1)
    return x.clone()


@counted.register_fake
def _(x):
    return torch.empty_like(x)


def test_explain_runs_no_kernel():
    _runs.clear()

    def fn(x, weight):
        return quantize(llama_norm(counted(x), weight))

    with settings.patch(fusions="all", allow_reference=True):
        report = fusion_passes.explain(fn, random(5, 256), random(256))
    assert report.matches == {"rms_norm_group_quant": 1}
    assert _runs == []
    fn(random(5, 256), random(256))
    assert _runs == [1]


def test_explain_reports_each_graph_and_leaves_nothing_behind():
    def fn(gate, up):
        first = silu_mul(gate, up)
        torch._dynamo.graph_break()
        return llama_norm(first, up[0])

    with settings.patch(fusions="all", allow_reference=True):
        last = fusion_passes.explain(fn, *GATED)
        assert [r.matches for r in fusion_passes.reports()] == [{"silu_mul": 1}, {"rms_norm": 1}]
        assert last == fusion_passes.report()
        assert torch.equal(compiled(fn)(*GATED), fn(*GATED))  # not the zeros of before


def test_explain_of_what_does_not_compile():
    with pytest.raises(LookupError, match="nothing was compiled"):
        fusion_passes.explain(lambda: 3)


def test_report_goes_where_it_was_asked(tmp_path, capsys):
    compiled(options={**ON, "report": True})(*GATED)
    assert "silu_mul" in capsys.readouterr().out
    path = tmp_path / "deep" / "report.json"
    torch.compiler.reset()
    compiled(options={**ON, "report": path})(*GATED)
    written = json.loads(path.read_text())
    assert written[-1]["matches"] == {"silu_mul": 1}
    assert capsys.readouterr().out == ""


# --- other processes -------------------------------------------------------------------------------------------


def python(script: str, **environment: str) -> dict:
    """Run a script that prints JSON last, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


COMPILE = """
import json, torch, fusion_passes
from torch._dynamo.utils import counters
import torch.nn.functional as F
options = dict({options})
def fn(gate, up):
    return F.silu(gate) * up
x = torch.ones(4, 64, dtype=torch.bfloat16)
with torch.no_grad():
    out = torch.compile(fn, {how})(x, x)
assert torch.equal(out, fn(x, x))
report = fusion_passes.report() if fusion_passes.reports() else None
hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
print(json.dumps(dict(hits=hits, matches=report and report.matches, cached=report and report.from_cache)))
"""
BACKEND = "backend='fusion_passes', options=options"
STOCK = "options=fusion_passes.inductor_options(**options)"


@pytest.mark.slow
@pytest.mark.parametrize("how", [BACKEND, STOCK], ids=["backend", "stock Inductor"])
def test_the_cache_of_inductor_works_across_processes(tmp_path, how):
    where = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "CUSTOM_OPS_CACHE_DIR": str(tmp_path / "ops"),
    }
    on, off = (
        COMPILE.format(options=f"silu_mul={flag}, allow_reference=True, rms_norm=True", how=how)
        for flag in (True, False)
    )
    first = python(on, **where)
    assert first == {"hits": 0, "matches": {"silu_mul": 1}, "cached": False}
    second = python(on, **where)
    assert second["hits"] >= 1
    if how is BACKEND:
        assert second == {**second, "matches": {"silu_mul": 1}, "cached": True}
        assert python(off, **where) == {"hits": 0, "matches": {}, "cached": False}


def test_a_cache_that_cannot_be_written_costs_the_report_alone(tmp_path, monkeypatch):
    """As in a container without a home: stock runs there, and so do we."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CUSTOM_OPS_CACHE_DIR", str(tmp_path / "file" / "inside"))
    inputs = random(9, 64), random(9, 64)
    with pytest.warns(UserWarning, match=r"no report is kept .* set CUSTOM_OPS_CACHE_DIR"):
        assert torch.equal(compiled(options=ON)(*inputs), silu_mul(*inputs))
    assert fusion_passes.report().matches == {"silu_mul": 1}


@pytest.mark.parametrize("what", ["report", "dump"])
def test_what_cannot_be_written_is_an_error_of_its_setting(tmp_path, what):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "inside"
    with pytest.raises(Exception, match=f"FUSION_PASSES_{what.upper()}=.* cannot be written"):
        compiled(options={**ON, what: path})(random(11, 64), random(11, 64))


def test_a_cached_graph_without_a_kept_report_says_so(tmp_path, monkeypatch):
    inputs = random(7, 64), random(7, 64)
    compiled(options=ON)(*inputs)
    monkeypatch.setenv("CUSTOM_OPS_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    compiled(options=ON)(*inputs)
    report = fusion_passes.report()
    assert report.from_cache
    assert "no report of that compilation is kept" in report.notes[0]
    assert "from the cache" in str(report)


@pytest.mark.parametrize("how", ["backend", "stock Inductor"])
def test_the_cache_hides_neither_a_dump_nor_a_fusion_that_is_missed(tmp_path, how):
    """What is only asked for at the second compilation of a graph is done, though Inductor knows the graph."""

    def once(**more):
        torch.compiler.reset()
        options = {**ON, "rms_norm": True, **more}
        if how == "backend":
            return compiled(options=options)(*GATED)
        given = fusion_passes.inductor_options(**options)
        return compiled(backend="inductor", options=given)(*GATED)

    once()
    once(dump=tmp_path)
    assert [path.name for path in tmp_path.glob("*.silu_mul.txt")]
    with pytest.raises(Exception, match="rms_norm fired nowhere"):
        once(strict=True)
    with pytest.raises(Exception, match="rms_norm fired nowhere"):  # and what failed is not kept
        once(strict=True)


def test_importing_is_cheap():
    script = """
import json, sys, torch
before = set(sys.modules)
import fusion_passes, fusion_passes.settings
new = {name.split(".")[0] for name in set(sys.modules) - before}
deep = sorted(name for name in set(sys.modules) - before if name.startswith("torch._inductor"))
print(json.dumps(dict(new=sorted(new), deep=deep, cuda=torch.cuda.is_initialized())))
"""
    found = python(script)
    heavy = {
        "triton",
        "deep_gemm",
        "flashinfer",
        "transformers",
        "hypothesis",
        "rich",
        "typer",
        "matplotlib",
        "pandas",
    }
    assert not heavy & set(found["new"])
    assert found["deep"] == []
    assert found["cuda"] is False
