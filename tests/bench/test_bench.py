"""The benchmark harness, at tiny sizes on the CPU's clock: nothing here is a measurement."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from bench import plots, readme, results, tuning
from bench.__main__ import app
from bench.case import Case, Target, close, same
from bench.measure import Plan, measure
from bench.results import Row, Run
from bench.suites import suites
from bench.timer import HostTimer
from custom_ops import library
from fusion_passes.registered import registry

runner = CliRunner()
CPU = torch.device("cpu")


def every_case(tiny: bool) -> list[tuple[str, Case]]:
    return [(name, case) for name, cases in suites().items() for case in cases(tiny)]


def run_of(
    *rows: Row,
    suite: str = "quantization",
    arch: str = "sm_90",
    date: str = "2026-01-01T00:00:00+00:00",
) -> Run:
    device = {"name": f"GPU {arch}", "arch": arch}
    return Run(
        suite, device, {"torch": "2.13.0"}, "commit", "command", date, "timer", 3000.0, list(rows)
    )


def row_of(name: str, tokens: int, ours: float, stock: float, *targets: Target, **fields) -> Row:
    row = Row(
        name,
        {"tokens": tokens},
        moved_bytes=3_000_000,
        fusion=name,
        fired={name: 1},
        chosen="cuda",
        **fields,
    )
    row.warm_us = {"ours": ours, "plugin": ours, "inductor": stock}
    row.finish(3000.0, targets)
    return row


def test_every_op_and_fusion_has_a_case():
    cases = [case for _, case in every_case(tiny=False)]
    # They take processes of their own: `bench expert-parallel`.
    both = {"ep_dispatch", "ep_combine"}
    of_several_ranks = both | {f"{op}_low_latency" for op in both}
    of_several_ranks |= {"fused_moe_batched", "ep_fused_moe"}
    assert {case.op for case in cases if case.op} == set(library.ops()) - of_several_ranks
    judged_by_models = {
        "shared_group_quant",
        "torchao_blockwise_linear",
        "quantize_before_dispatch",
        "gather_tokens",
        "two_batch_overlap",
    }
    shipped = set(registry()) - judged_by_models
    assert {case.fusion for case in cases if case.fusion} == shipped


def test_one_token_says_nothing_of_quantization_per_tensor():
    """It is what token_quant has for its subject: rows from before that was so hold an error."""
    of_old = row_of("silu_mul_tensor_quant", 1, ours=1.9, stock=2.0)
    of_old.errors = {"plugin": "AssertionError: the fusion silu_mul_tensor_quant did not fire"}
    of_old.fired = {}
    del of_old.warm_us["plugin"]
    of_old.ratios.pop("plugin_of_inductor")
    more = [row_of("silu_mul_tensor_quant", tokens, ours=3.0, stock=4.0) for tokens in (16, 256)]
    assert tuning.verdict("silu_mul_tensor_quant", [of_old, *more])["on"]
    static = row_of("silu_mul_tensor_quant_static", 1, ours=2.0, stock=1.0)
    assert not tuning.verdict("silu_mul_tensor_quant_static", [static])["on"]


def test_a_row_that_was_run_without_stock_decides_nothing_beside_others():
    timed, alone = (row_of("silu_mul_group_quant", n, ours=3.0, stock=4.0) for n in (16, 256))
    del alone.warm_us["inductor"]
    alone.ratios.pop("plugin_of_inductor")
    assert tuning.verdict("silu_mul_group_quant", [timed, alone])["on"]
    assert not tuning.verdict("silu_mul_group_quant", [alone])["on"]
    alone.errors = {"plugin": "AssertionError: differs from eager"}
    assert not tuning.verdict("silu_mul_group_quant", [timed, alone])["on"]


def test_the_sizes_that_must_be_shown_are_there():
    labels = {case.label for _, case in every_case(tiny=False)}
    assert "group_quant(tokens=4096, hidden=7168)" in labels
    assert "silu_mul_group_quant(tokens=16384, intermediate=2048)" in labels
    assert "add_rms_norm_group_quant(tokens=16384, hidden=7168)" in labels
    assert "block_scaled_mm(tokens=4096, n=4096, k=7168)" in labels
    for tokens in (1, 16, 64, 256, 1024):
        assert f"group_quant(tokens={tokens}, hidden=7168)" in labels
    for tokens in (1, 4, 16, 64, 256, 1024, 4096, 8192):
        assert f"llama_layer_fp8_block(tokens={tokens}, hidden=4096, intermediate=14336)" in labels


def test_the_least_traffic():
    bytes_of = {case.label: case.moved_bytes for _, case in every_case(tiny=False)}
    scales = 4 * 4096 * 56
    assert bytes_of["group_quant(tokens=4096, hidden=7168)"] == 3 * 4096 * 7168 + scales
    scales = 4 * 16384 * 56
    rows = 16384 * 7168
    assert (
        bytes_of["add_rms_norm_group_quant(tokens=16384, hidden=7168)"]
        == 7 * rows + 2 * 7168 + scales
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "case"), every_case(tiny=True), ids=lambda value: getattr(value, "name", value)
)
def test_each_case_is_right_and_is_timed(suite, case):
    plan = Plan(CPU, max_autotune=False)
    row = measure(dataclasses.replace(case, targets=()), plan, HostTimer(reps=1), copy_gbps=10.0)
    assert row.errors == {}
    assert row.ours_us > 0
    assert row.warm_us["inductor"] > 0
    assert row.ratios["of_inductor"] == pytest.approx(row.inductor_us / row.ours_us)
    if case.op:
        assert row.chosen == "reference" or row.warm_us[row.chosen] > 0
    if case.fusion:
        assert case.fusion in row.fired


def test_a_wrong_result_is_an_error_and_is_not_timed(monkeypatch):
    case = next(suites()["quantization"](True))
    wrong = dataclasses.replace(case, op_args=lambda x: ((2 * x, 128), {}))
    row = measure(wrong, Plan(CPU, max_autotune=False), HostTimer(reps=1), copy_gbps=10.0)
    assert "differs from eager: output 1" in row.errors["ours"]
    assert "ours" not in row.warm_us
    assert "inductor" in row.warm_us


def test_run_writes_rows_with_provenance_and_show_and_compare_read_them(tmp_path):
    arguments = [
        "run",
        "--tiny",
        "--suite",
        "quantization",
        "--no-max-autotune",
        "--out",
        str(tmp_path),
    ]
    result = runner.invoke(app, [*arguments, "--device", "cpu", "--commit", "abc"])
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("quantization-*.json")
    data = json.loads(path.read_text())
    assert data["commit"] == "abc"
    assert data["versions"]["torch"] == torch.__version__
    assert data["device"]["arch"] == "cpu"
    assert data["copy_gbps"] > 0
    assert data["command"].startswith("python -m bench")
    assert data["units"].keys() >= {"warm_us", "of_copy"}
    cases = [case.name for case in suites()["quantization"](True)]
    assert [row["case"] for row in data["rows"]] == cases
    assert "group_quant" in cases
    shown = runner.invoke(app, ["show", "--results", str(tmp_path)])
    assert "group_quant(tokens=4, hidden=256)" in shown.output
    assert runner.invoke(app, ["compare", str(path), str(path)]).exit_code == 0


def test_an_unknown_suite_names_those_that_exist():
    result = runner.invoke(app, ["run", "--suite", "quantisation"])
    assert result.exit_code == 2
    assert "no suite 'quantisation'" in result.output


def test_compare_fails_when_ours_got_slower(tmp_path):
    before = run_of(row_of("group_quant", 1, ours=1.0, stock=2.0)).save(tmp_path / "before")
    after = run_of(row_of("group_quant", 1, ours=1.1, stock=2.0)).save(tmp_path / "after")
    assert runner.invoke(app, ["compare", str(before), str(after)]).exit_code == 1
    assert (
        runner.invoke(app, ["compare", str(before), str(after), "--slower", "1.2"]).exit_code == 0
    )


def test_ratios_and_targets():
    row = row_of(
        "group_quant",
        4096,
        2.0,
        3.0,
        Target("of_copy", 0.4),
        Target("of_inductor", 1.6),
        flops=8_000_000,
    )
    assert row.ratios["of_copy"] == pytest.approx(3_000_000 / 2e-6 / 3e12)
    assert row.ratios["of_inductor"] == 1.5
    assert row.ratios["tflops"] == 4.0
    assert row.missed == ["of_inductor is 1.500, wanted 1.6"]


def test_the_faster_mode_of_inductor_is_the_baseline():
    row = Row("group_quant", {"tokens": 1})
    row.warm_us = {"ours": 2.0, "inductor": 5.0, "inductor_max_autotune": 3.0}
    row.finish(3000.0)
    assert row.ratios["of_inductor"] == 1.5


def test_a_missed_target_without_a_measurement_is_missed():
    row = Row("group_quant", {"tokens": 1})
    row.finish(3000.0, [Target("of_copy", 0.9)])
    assert row.missed == ["of_copy is nan, wanted 0.9"]


def test_the_newest_row_counts():
    old = run_of(row_of("group_quant", 1, 2.0, 2.0), row_of("group_quant", 16, 3.0, 3.0))
    new = run_of(row_of("group_quant", 1, 1.0, 2.0), date="2026-02-01T00:00:00+00:00")
    rows = [row.ours_us for _, row in results.newest([old, new])["GPU sm_90"]]
    assert rows == [1.0, 3.0]


def test_a_row_without_stock_does_not_take_the_place_of_one_with_it():
    old = run_of(row_of("group_quant", 1, 2.0, 4.0))
    bare = row_of("group_quant", 1, 1.0, 4.0)
    del bare.warm_us["inductor"]
    new = run_of(bare, date="2026-02-01T00:00:00+00:00")
    rows = [row.ours_us for _, row in results.newest([old, new])["GPU sm_90"]]
    assert rows == [2.0]
    rows = [row.ours_us for _, row in results.newest([new, old])["GPU sm_90"]]
    assert rows == [2.0]


@pytest.mark.parametrize(
    ("speedups", "on"),
    [([1.2, 0.98], True), ([1.2, 0.96], False), ([0.99, 0.98], False), ([1.0, 1.5], True)],
)
def test_a_fusion_is_on_where_it_is_ahead(tmp_path, speedups, on):
    rows = [
        row_of("rms_norm_group_quant", 4**i, ours=1.0, stock=ratio)
        for i, ratio in enumerate(speedups)
    ]
    (path,) = tuning.write([run_of(*rows)], tmp_path)
    assert path.name == "sm_90.json"
    table = json.loads(path.read_text())
    assert table["arch"] == "sm_90"
    assert table["fusions"].keys() == registry().keys()
    fusion = table["fusions"]["rms_norm_group_quant"]
    assert fusion["on"] is on
    assert [row["speedup"] for row in fusion["rows"]] == speedups
    assert (
        f"{min(speedups):.2f} to {max(speedups):.2f} times stock torch.compile at 1 to 4 tokens"
        in fusion["why"]
    )
    assert table["fusions"]["rms_norm"] == {"on": False, "why": "not measured", "rows": []}


def test_a_fusion_without_a_case_is_judged_by_the_models_in_which_it_fired():
    row = Row("llama", {"tokens": 1}, fired={"shared_group_quant": 2})
    row.warm_us = {"plugin": 1.0, "inductor": 3.0}
    row.finish(3000.0)
    assert tuning.verdict("shared_group_quant", [row])["on"]
    assert not tuning.verdict("group_quant", [row])["on"]


def test_where_stock_cannot_run_nothing_is_behind():
    """As below 17 tokens in int8, which torch._int_mm does not take."""
    ahead = Row("llama", {"tokens": 256}, fired={"shared_group_quant": 2})
    ahead.warm_us = {"plugin": 1.0, "inductor": 3.0}
    alone = Row("llama", {"tokens": 16}, fired={"shared_group_quant": 2})
    alone.warm_us, alone.errors = {"plugin": 1.0}, {"inductor": "RuntimeError: greater than 16"}
    for row in (ahead, alone):
        row.finish(3000.0)
    found = tuning.verdict("shared_group_quant", [ahead, alone])
    assert found["on"]
    assert [row["tokens"] for row in found["rows"]] == [256]
    assert tuning.verdict("shared_group_quant", [alone])["why"] == "not measured"


def test_a_fusion_that_failed_is_off():
    broken = Row(
        "group_quant", {"tokens": 16}, fusion="group_quant", errors={"plugin": "it raised"}
    )
    verdict = tuning.verdict("group_quant", [row_of("group_quant", 1, 1.0, 2.0), broken])
    assert not verdict["on"]
    assert verdict["why"] == "group_quant(tokens=16) was not measured"


def test_a_table_is_read_by_the_plugin(tmp_path, monkeypatch):
    from fusion_passes import tables

    (path,) = tuning.write([run_of(row_of("rms_norm_group_quant", 1, 1.0, 2.0))], tmp_path)
    monkeypatch.setattr(tables, "load", lambda: {90: json.loads(path.read_text())})
    assert tables.default_state("rms_norm_group_quant", "sm_90")[0]
    assert not tables.default_state("rms_norm", "sm_90")[0]


def test_the_performance_table_is_made_from_the_results(monkeypatch):
    layer = Row("llama_layer_fp8_block", {"tokens": 64}, flops=10)
    layer.warm_us = {"plugin": 100.0, "inductor": 350.0, "bf16_inductor": 150.0}
    layer.finish(3000.0)
    monkeypatch.setattr(
        readme, "load_all", lambda: [run_of(row_of("group_quant", 1, 1.5, 3.0), layer)]
    )
    text = readme.performance()
    assert "| `group_quant(tokens=1)` | 1.5 | 3.0 | 2.00 | 0.67 |  |" in text
    assert "| `llama_layer_fp8_block(tokens=64)` | 100.0 | 350.0 | 3.50 | 150.0 |" in text
    assert "GPU sm_90, torch 2.13.0, 2026-01-01" in text


def test_without_results_the_readme_says_so(monkeypatch):
    monkeypatch.setattr(readme, "load_all", lambda: [run_of(arch="cpu")])
    assert readme.performance() == readme.NO_RESULTS


def test_plots_are_drawn(tmp_path):
    rows = [row_of("group_quant", tokens, 1.0 + tokens, 3.0 * tokens) for tokens in (1, 16, 256)]
    for tokens in (1, 64):
        layer = Row("llama_layer_fp8_block", {"tokens": tokens}, flops=10)
        layer.warm_us = {
            "plugin": 10.0 * tokens,
            "inductor": 30.0 * tokens,
            "bf16_inductor": 20.0 * tokens,
        }
        layer.finish(3000.0)
        rows.append(layer)
    drawn = plots.draw([run_of(*rows)], tmp_path)
    assert sorted(path.stem for path in drawn) == [
        "bandwidth-gpu-sm-90",
        "layer-gpu-sm-90",
        "speedup-gpu-sm-90",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_checks_tell_right_from_wrong():
    x = torch.randn(8, 128).to(torch.bfloat16)
    assert same(x, x) is None
    assert same((x, x), (x, -x)).startswith("output 1")
    assert close(1e-3)(x, x) is None
    assert "relative error" in close(1e-3)(x, -x)
    assert "relative error nan" in close(1e-3)(x, x * float("nan"))


@pytest.mark.gpu
def test_cuda_timers_agree_on_many_bytes():
    from bench.timer import CudaTimer

    timer = CudaTimer(cold_reps=20)
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    # a kernel: in a CUDA graph a copy of memory is left to a copy engine, which is slower
    warm, cold = (time(lambda: torch.neg(source, out=target)) for time in (timer.warm, timer.cold))
    assert warm == pytest.approx(cold, rel=0.1)
    assert 2 * source.nbytes / warm / 1e3 == pytest.approx(timer.copy_bandwidth(), rel=0.1)
