"""The command line: what it prints, its JSON, its exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import custom_ops
from custom_ops import library
from fusion_passes import demo, settings
from fusion_passes.cli import OPTIONAL, app
from fusion_passes.registered import registry

runner = CliRunner()

SCRIPT = """
import sys
import torch


@torch.compile(mode="default")
def mlp(gate, up):
    return torch.nn.functional.silu(gate) * up


with torch.no_grad():
    mlp(*torch.randn(2, 4, 256, dtype=torch.bfloat16))
print("arguments", sys.argv[1:])
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def test_list_has_every_fusion_with_its_toggle_and_reason():
    result = runner.invoke(app, ["list"])
    assert result.exit_code == 0
    for name in registry():
        assert settings.variable(name) in result.output


def test_list_json_follows_the_environment(monkeypatch):
    monkeypatch.setenv("FUSION_PASSES", "rms_norm")
    result = runner.invoke(app, ["list", "--json"])
    rows = {row["fusion"]: row for row in json.loads(result.stdout)["fusions"]}
    assert rows.keys() == registry().keys()
    assert rows["rms_norm"]["on"]
    assert rows["rms_norm"]["why"] == "named in FUSION_PASSES=rms_norm"
    assert not rows["silu_mul"]["on"]
    assert rows["silu_mul"]["why"] == "not in FUSION_PASSES=rms_norm"


def test_a_misspelt_variable_is_one_line_and_exit_code_2(monkeypatch):
    monkeypatch.setenv("FUSION_PASSES_VERFY", "1")
    result = runner.invoke(app, ["list"])
    assert result.exit_code == 2
    assert "did you mean 'FUSION_PASSES_VERIFY'" in result.stderr
    assert "Traceback" not in result.stderr


def test_doctor_names_every_op_and_optional_package():
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 0
    for name in (*library.ops(), "deep_gemm", "flashinfer", "nvcc", "torch"):
        assert name in result.output


def test_doctor_names_whatever_an_implementation_asks_for():
    sources = "".join(p.read_text() for p in Path(custom_ops.__file__).parent.rglob("*.py"))
    asked = set(re.findall(r'has_package\("([a-z_]+)"\)', sources))
    assert {"triton", "deep_gemm", "flashinfer", "deep_ep"} <= asked <= OPTIONAL.keys()


def test_doctor_json():
    found = json.loads(runner.invoke(app, ["doctor", "--json"]).stdout)
    assert found["machine"].keys() >= {"python", "torch", "GPU", "nvcc", "cache"}
    assert found["ops"].keys() == library.ops().keys()
    assert all("reference" in names for names in found["ops"].values())


def test_explain_runs_the_script_on_this_backend(script, monkeypatch):
    monkeypatch.setenv("FUSION_PASSES", "silu_mul")
    monkeypatch.setenv("FUSION_PASSES_ALLOW_REFERENCE", "1")
    result = runner.invoke(app, ["explain", script, "one", "--two"])
    assert result.exit_code == 0
    assert "arguments ['one', '--two']" in result.stdout
    assert "named in FUSION_PASSES=silu_mul" in result.stdout


def test_explain_json_keeps_stdout_for_the_reports(script, monkeypatch):
    monkeypatch.setenv("FUSION_PASSES", "silu_mul")
    monkeypatch.setenv("FUSION_PASSES_ALLOW_REFERENCE", "1")
    result = runner.invoke(app, ["explain", "--json", script])
    (report,) = json.loads(result.stdout)
    assert report["matches"] == {"silu_mul": 1}
    assert "arguments" in result.stderr


def test_explain_leaves_torch_compile_as_it_was(script):
    import torch

    before = torch.compile
    runner.invoke(app, ["explain", script])
    assert torch.compile is before


def test_explain_shows_a_bad_setting_without_a_traceback(script, monkeypatch):
    monkeypatch.setenv("FUSION_PASSES", "sliu_mul")
    result = runner.invoke(app, ["explain", script])
    assert result.exit_code == 2
    assert "SettingsError" in result.stderr
    assert "did you mean 'silu_mul'" in result.stderr


def test_explain_of_a_script_that_compiles_nothing_fails(tmp_path):
    path = tmp_path / "nothing.py"
    path.write_text("print('hello')")
    result = runner.invoke(app, ["explain", str(path)])
    assert result.exit_code == 1
    assert "compiled nothing" in result.output


def test_explain_of_a_missing_script():
    result = runner.invoke(app, ["explain", "no_such_script.py"])
    assert result.exit_code == 2
    assert "there is no file no_such_script.py" in result.stderr


def test_build_reports_its_steps_and_the_result(monkeypatch, tmp_path):
    from custom_ops import cuda_build

    seen = []

    def build(archs, progress):
        seen.append(archs)
        progress(1, 2, "one.cu")
        progress(2, 2, "linked")
        return tmp_path

    monkeypatch.setattr(cuda_build, "build", build)
    result = runner.invoke(app, ["build", "--arch", "8.0", "--arch", "9.0a", "--json"])
    assert result.exit_code == 0
    assert seen == [["8.0", "9.0a"]]
    assert json.loads(result.stdout)["cache"] == str(tmp_path)


def test_build_of_a_misspelt_architecture():
    result = runner.invoke(app, ["build", "--arch", "hopper"])
    assert result.exit_code == 2
    assert "'hopper' is no architecture; accepted" in result.stderr
    assert "nothing to do" not in result.stderr


@pytest.fixture
def only_llama(monkeypatch):
    models = list(demo.models())[:1]
    monkeypatch.setattr(demo, "models", lambda: iter(models))


@pytest.mark.slow
def test_demo_passes(only_llama):
    result = runner.invoke(app, ["demo", "--json"])
    assert result.exit_code == 0
    bf16, fp8 = json.loads(result.stdout)
    assert bf16["passed"]
    assert fp8["passed"]
    assert bf16["matches"]["add_rms_norm"] == 2 * demo.SIZES["num_hidden_layers"]
    assert fp8["matches"]["block_scaled_linear"] == 7 * demo.SIZES["num_hidden_layers"]


@pytest.mark.slow
def test_demo_fails_when_a_model_differs(only_llama, monkeypatch):
    monkeypatch.setattr(demo, "SLACK", 0.0)
    result = runner.invoke(app, ["demo"])
    assert result.exit_code == 1
    assert "differs" in result.stdout
