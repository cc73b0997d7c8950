"""The map of sizes, the cost of views and what one token is judged by, on the CPU's clock: nothing is a measurement."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bench import heat, plots, readme, tuning
from bench.measure import Plan, measure
from bench.results import Row, Run
from bench.suites import layouts, quantization, suites, torchao
from bench.timer import HostTimer
from fusion_passes.fusion import registry

runner = CliRunner()
CPU = torch.device("cpu")
subsets = st.lists(st.sampled_from(heat.TOKENS), min_size=1, unique=True)


def run_of(*rows: Row, suite: str = heat.SUITE) -> Run:
    device = {"name": "GPU sm_90", "arch": "sm_90"}
    date = "2026-01-01T00:00:00+00:00"
    return Run(
        suite, device, {"torch": "2.13.0"}, "commit", "command", date, "timer", 3000.0, list(rows)
    )


def row_of(op: str, tokens: int, width: int, ratio: float) -> Row:
    row = Row(f"heat_{op}", {"tokens": tokens, "width": width}, moved_bytes=1000, chosen="cuda")
    row.warm_us = {"ours": 2.0, "inductor": 2.0 * ratio}
    row.finish(3000.0)
    return row


@given(tokens=subsets, widths=st.lists(st.sampled_from(heat.WIDTHS), min_size=1, unique=True))
def test_the_map_has_each_point_once_and_the_whole_range_first(
    tokens: Sequence[int], widths: Sequence[int]
) -> None:
    found = list(heat.points(list(heat.OPS), widths, tokens))
    assert len(found) == len(set(found)) == len(heat.OPS) * len(widths) * len(tokens)
    order = list(dict.fromkeys(count for _, count, _ in found))
    assert sorted(order) == sorted(tokens)
    coarse = [count for count in sorted(tokens) if count in (1, 16, 256, 4096, 65536)]
    assert order[: len(coarse)] == coarse


def test_the_sizes_of_the_map() -> None:
    assert heat.TOKENS[0] == 1
    assert heat.TOKENS[-1] == 65536
    assert heat.WIDTHS == (1024, 2048, 4096, 5120, 7168, 8192, 14336)
    assert {*heat.OPS} <= {case.name for cases in suites().values() for case in cases(False)}


@given(
    ratios=st.lists(st.floats(0.5, 4.0), min_size=1, max_size=9),
    seed=st.integers(0, 3),
)
def test_the_summary_says_where_it_is_slowest(ratios: list[float], seed: int) -> None:
    rows = [row_of("token_quant", 2**index, 1024, ratio) for index, ratio in enumerate(ratios)]
    ((op, ahead, _, least),) = heat.summary(rows)
    assert op == "token_quant"
    assert ahead == f"{sum(r >= heat.AHEAD for r in ratios)} of {len(ratios)}"
    worst = min(range(len(ratios)), key=lambda index: ratios[index])
    assert least.startswith(f"{ratios[worst]:.2f} at ")


def test_the_command_measures_draws_and_stops_in_time(tmp_path) -> None:
    common = ["--device", "cpu", "--out", str(tmp_path), "--commit", "abc", "--width", "1024"]
    result = runner.invoke(heat.app, [*common, "--op", "token_quant", "--tokens", "1"])
    assert result.exit_code == 0, result.output
    assert "1 of 1 points" in result.output
    (path,) = tmp_path.glob("heat-*.json")
    data = json.loads(path.read_text())
    assert data["suite"] == "heat"
    assert data["commit"] == "abc"
    assert data["command"].startswith("python -m bench.heat")
    (row,) = data["rows"]
    assert row["case"] == "heat_token_quant"
    assert row["sizes"] == {"tokens": 1, "width": 1024}
    assert row["warm_us"].keys() == {"ours", "inductor"}
    assert row["ratios"]["of_inductor"] > 0
    assert [drawn.stem[:4] for drawn in (tmp_path / "plots").glob("*.png")] == ["heat"]
    late = runner.invoke(heat.app, [*common, "--minutes", "0"])
    assert late.exit_code == 0, late.output
    assert f"0 of {len(heat.OPS) * len(heat.TOKENS)} points" in late.output


def test_an_unknown_op_names_those_that_exist() -> None:
    result = runner.invoke(heat.app, ["--op", "quant"])
    assert result.exit_code == 2
    assert "no op 'quant'" in result.output


def test_a_side_that_raises_costs_the_other_nothing(monkeypatch) -> None:
    def broken(*_args, **_kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(heat.torch, "compile", lambda *_args, **_kwargs: broken)
    row = heat.measure("group_quant", 2, 1024, CPU, HostTimer(reps=1))
    assert row.errors == {"inductor": "RuntimeError: no compiler here"}
    assert row.warm_us["ours"] > 0


def test_the_map_is_drawn_and_embedded_and_is_no_row_of_the_kernels(tmp_path, monkeypatch) -> None:
    rows = [row_of("group_quant", 4**n, w, 0.9 + n / 10) for n in range(3) for w in (1024, 2048)]
    rows.append(Row("heat_group_quant", {"tokens": 4, "width": 4096}, errors={"ours": "raised"}))
    maps = run_of(*rows)
    (drawn,) = plots.draw([maps], tmp_path)
    assert drawn.name == "heat-gpu-sm-90.png"
    assert drawn.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(readme, "load_all", lambda: [maps])
    text = readme.performance()
    assert "(bench/results/plots/heat-gpu-sm-90.png)" in text
    assert "| `group_quant` | 4 of 6 | 1.00 | 0.90 at 1 x " in text
    assert "heat_group_quant(" not in text


def test_the_map_turns_no_fusion_on() -> None:
    """The time of the plugin decides, and the map has that of the op alone."""
    verdict = tuning.verdict("group_quant", [row_of("group_quant", 1, 1024, 2.0)])
    assert verdict == {"on": False, "why": "not measured", "rows": []}


@given(tokens=st.integers(1, 9), width=st.sampled_from((128, 256)), data=st.data())
def test_views_are_views_of_what_they_are_held_against(tokens, width, data) -> None:
    name = data.draw(st.sampled_from(sorted(layouts.VIEWS)))
    view = layouts.VIEWS[name](CPU, tokens, width)
    assert view.shape == (tokens, width)
    assert view.stride(-1) == 1
    contiguous = view.is_contiguous() and view.storage_offset() == 0
    assert not contiguous or (tokens == 1 and name == "row_strided")


@pytest.mark.parametrize("case", list(layouts.cases(True)), ids=lambda case: case.name)
def test_a_view_is_timed_against_packed_values(case) -> None:
    row = measure(case, Plan(CPU, False, False, stock=False), HostTimer(reps=1), copy_gbps=10.0)
    assert row.errors == {}
    assert row.ratios["of_contiguous"] == row.warm_us["contiguous"] / row.warm_us["ours"]
    assert row.targets == {"of_contiguous": pytest.approx(1 / 1.1)}


def test_each_of_the_three_ops_has_each_view() -> None:
    found = {(case.op, case.name.removeprefix(f"{case.op}_")) for case in layouts.cases()}
    ops = ("group_quant", "silu_mul_group_quant", "add_rms_norm_group_quant")
    assert found == {(op, view) for op in ops for view in ("sliced", "row_strided", "offset")}


@given(
    scheme=st.sampled_from(quantization.SCHEMES),
    producer=st.sampled_from(("", "silu_mul", "add_rms_norm")),
    tokens=st.integers(1, 4),
)
def test_one_token_is_judged_by_the_fusion_that_fires(scheme, producer, tokens) -> None:
    name = scheme.fusion(tokens, producer)
    assert name in registry()
    assert name.endswith(
        "token_quant" if scheme.op == "tensor_quant" and tokens == 1 else scheme.op
    )


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("scheme", [quantization.TENSOR], ids=lambda scheme: scheme.name)
def test_the_plugin_fires_at_one_token(scheme, tokens) -> None:
    case = quantization.case(scheme, tokens, 256)
    row = measure(case, Plan(CPU, False, False, stock=False), HostTimer(reps=1), copy_gbps=10.0)
    assert row.errors == {}
    assert row.fired[case.fusion] == 1


def test_torchao_cases_can_be_chosen_by_name(monkeypatch) -> None:
    monkeypatch.setattr(torchao.importlib.util, "find_spec", lambda _name: True)
    labels = [case.label for case in torchao.cases()]
    for scheme in ("float8_per_tensor", "float8_per_block", "int8", "int8_asymmetric"):
        for tokens in (1, 16, 256, 4096):
            chosen = [label for label in labels if f"torchao_{scheme}(tokens={tokens}," in label]
            assert len(chosen) == 1


@pytest.mark.gpu
def test_the_quick_timer_agrees_with_the_slow_one() -> None:
    from bench.timer import CudaTimer

    source = torch.randn(1 << 26, device="cuda")
    target = torch.empty_like(source)
    quick, slow = (
        timer.warm(lambda: target.copy_(source)) for timer in (heat.QuickTimer(), CudaTimer())
    )
    assert quick == pytest.approx(slow, rel=0.1)
