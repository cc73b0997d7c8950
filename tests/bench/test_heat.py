"""The map of sizes, the cost of views and what one token is judged by, on the CPU's clock: nothing is a measurement."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from bench import ahead, heat, heat_map, plots, readme, tuning
from bench.case import activation, drawn_before
from bench.measure import Plan, measure
from bench.results import Row, Run
from bench.suites import layouts, quantization, suites, torchao
from bench.timer import HostTimer
from fusion_passes.registered import registry

runner = CliRunner()
CPU = torch.device("cpu")
subsets = st.lists(st.sampled_from(heat_map.TOKENS), min_size=1, unique=True)


def run_of(*rows: Row, suite: str = heat_map.SUITE) -> Run:
    device = {"name": "GPU sm_90", "arch": "sm_90"}
    date = "2026-01-01T00:00:00+00:00"
    return Run(
        suite, device, {"torch": "2.13.0"}, "commit", "command", date, "timer", 3000.0, list(rows)
    )


def row_of(op: str, tokens: int, width: int, ratio: float) -> Row:
    row = Row(f"heat_{op}", {"tokens": tokens, "width": width}, moved_bytes=1000, chosen="cuda")
    row.fusion = op
    row.warm_us = {"ours": 2.0, "inductor": 2.0 * ratio}
    row.finish(3000.0)
    return row


@given(tokens=subsets, widths=st.lists(st.sampled_from(heat_map.WIDTHS), min_size=1, unique=True))
def test_the_map_has_each_point_once_the_whole_range_first_and_then_small_ones(
    tokens: Sequence[int], widths: Sequence[int]
) -> None:
    found = list(heat.points(list(heat.USUAL), widths, tokens))
    assert len(found) == len(set(found)) == len(heat.USUAL) * len(widths) * len(tokens)
    coarse = [count for count in sorted(tokens) if count in (1, 16, 256, 4096, 65536)]
    first = found[: len(coarse) * len(widths) * len(heat.USUAL)]
    assert list(dict.fromkeys(count for _, count, _ in first)) == coarse
    sizes = [count * width for _, count, width in found[len(first) :]]
    assert sizes == sorted(sizes)


def test_the_sizes_of_the_map() -> None:
    assert heat_map.TOKENS[0] == 1
    assert heat_map.TOKENS[-1] == 65536
    assert heat_map.WIDTHS == (1024, 2048, 4096, 5120, 7168, 8192, 14336)
    assert {*heat.OPS} <= {case.name for cases in suites().values() for case in cases(False)}
    assert {*heat.USUAL} <= {*heat.OPS}


def test_every_quantizing_fusion_has_a_map() -> None:
    """All but those whose op is none of a producer and a scheme."""
    drawn = {heat.OPS[name](2, 1024).fusion for name in heat.OPS}
    quantizing = {name for name in registry() if name.endswith(("_quant", "_quant_static"))}
    assert quantizing - drawn == {"shared_group_quant", "block_quant"}


@given(
    ratios=st.lists(st.floats(0.5, 4.0), min_size=1, max_size=9),
    seed=st.integers(0, 3),
)
def test_the_summary_says_where_it_is_slowest(ratios: list[float], seed: int) -> None:
    rows = [row_of("token_quant", 2**index, 1024, ratio) for index, ratio in enumerate(ratios)]
    ((op, ahead, _, least),) = heat_map.summary(rows)
    assert op == "token_quant"
    assert ahead == f"{sum(r >= heat_map.AHEAD for r in ratios)} of {len(ratios)}"
    worst = min(range(len(ratios)), key=lambda index: ratios[index])
    assert least.startswith(f"{ratios[worst]:.2f} at ")


def test_the_command_measures_draws_and_stops_in_time(tmp_path) -> None:
    common = ["--device", "cpu", "--out", str(tmp_path), "--commit", "abc", "--width", "1024"]
    common += ["--ahead-minutes", "0"]
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
    first = path.rename(tmp_path / "first.json")  # a file is named by the second that it began in
    late = runner.invoke(heat.app, [*common, "--minutes", "0"])
    assert late.exit_code == 0, late.output
    assert f"0 of {len(heat.USUAL) * len(heat_map.TOKENS)} points" in late.output
    more = [*common, "--op", "token_quant", "--minutes", "0", "--no-draw", "--resume", str(first)]
    more += ["--out", str(tmp_path / "resumed")]
    rest = runner.invoke(heat.app, more)
    assert f"0 of {len(heat_map.TOKENS) - 1} points" in rest.output, rest.output
    (resumed,) = (tmp_path / "resumed").glob("heat-*.json")
    assert len(json.loads(resumed.read_text())["rows"]) == 1  # what was resumed is in it too


def test_processes_that_take_turns_measure_the_same_points(tmp_path) -> None:
    common = ["--device", "cpu", "--out", str(tmp_path), "--ahead-minutes", "0", "--no-draw"]
    common += ["--op", "token_quant", "--op", "group_quant", "--width", "256", "--timers", "2"]
    result = runner.invoke(heat.app, [*common, "--tokens", "1", "--tokens", "3"])
    assert result.exit_code == 0, result.output
    assert "4 of 4 points" in result.output
    (path,) = tmp_path.glob("heat-*.json")
    rows = [Row(**row) for row in json.loads(path.read_text())["rows"]]
    assert {(row.case, row.sizes["tokens"]) for row in rows} == {
        (f"heat_{name}", count) for name in ("token_quant", "group_quant") for count in (1, 3)
    }
    assert all(row.ratios["of_inductor"] > 0 for row in rows)


def _uses_the_gpu(folder: str, name: str) -> bool:
    """Whether nobody else has the turn meanwhile: a file is there as long as somebody has it."""
    place = Path(folder) / "turn"
    with ahead.turn():
        alone = not place.exists()
        place.touch()
        time.sleep(0.05)
        place.unlink()
    return alone


def test_one_process_at_a_time_has_the_turn(tmp_path) -> None:
    found: list[bool] = []
    tasks = [partial(_uses_the_gpu, str(tmp_path), str(index)) for index in range(8)]
    done = ahead.run(tasks, 3, 120.0, found.append)
    assert done.errors == []
    assert found == [True] * 8
    with ahead.turn():  # outside of a worker there is nobody to wait for
        pass


def _sum_of_what_was_lent() -> float:
    with drawn_before(ahead.lent()):
        return float(activation(CPU, 3, 4).sum())


def test_inputs_are_drawn_once_for_all_processes() -> None:
    values = torch.randn(16).to(torch.bfloat16)
    found: list[float] = []
    ahead.lend([values])
    try:
        done = ahead.run([_sum_of_what_was_lent] * 2, 2, 120.0, found.append)
    finally:
        ahead.lend([])
    assert done.errors == []
    assert found == [float(values[:12].view(3, 4).sum())] * 2


@given(
    shapes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=4),
    sizes=st.lists(st.integers(0, 16), max_size=4),
)
def test_what_is_drawn_before_is_taken_where_it_is_long_enough(shapes, sizes) -> None:
    values = [torch.randn(size).to(torch.bfloat16) for size in sizes]
    with drawn_before(values):
        drawn = [activation(CPU, *shape) for shape in shapes]
    assert [tuple(t.shape) for t in drawn] == shapes
    for got, value in zip(drawn, values, strict=False):
        if 0 < got.numel() <= value.numel():
            assert got.data_ptr() == value.data_ptr()
            assert got.is_contiguous()
        else:
            assert got.numel() == 0 or got.data_ptr() != value.data_ptr()
    assert activation(CPU, 2).data_ptr() not in {value.data_ptr() for value in values}


@given(ratios=st.lists(st.lists(st.floats(0.5, 2.0), min_size=1, max_size=3), min_size=1))
def test_merged_maps_have_the_median_of_each_point(ratios: list[list[float]]) -> None:
    """One list for each point, one run for each of its measurements."""
    runs = [
        run_of(
            *(
                row_of("token_quant", 2**point, 1024, found[turn])
                for point, found in enumerate(ratios)
                if turn < len(found)
            )
        )
        for turn in range(3)
    ]
    whole = heat_map.merged(runs)
    assert len(whole.rows) == len(ratios)
    for found, row in zip(ratios, sorted(whole.rows, key=lambda r: r.sizes["tokens"]), strict=True):
        assert row.ratios["of_inductor"] == pytest.approx(statistics.median(found))
    several = sum(bool(run.rows) for run in runs)
    assert (f"merged of {several} runs" in whole.command) == (several > 1)


def test_stocks_graphs_are_compiled_by_other_processes(tmp_path, monkeypatch) -> None:
    """Into the cache on the disk, where this one finds them."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiling = partial(heat.compile_point, width=256, device="cpu")
    names = ("token_quant", "silu_mul_token_quant")
    done = ahead.run([partial(compiling, name, 3) for name in names], 2, 240.0)
    assert done.errors == []
    assert done.compiled == 2
    counters.clear()
    row = heat.measure("token_quant", 3, 256, CPU, heat.WallClock())
    assert row.errors == {}
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    assert counters["inductor"]["fxgraph_cache_miss"] == 0


def test_a_case_is_compiled_as_it_is_measured(tmp_path, monkeypatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CUSTOM_OPS_CACHE_DIR", str(tmp_path))
    case = next(c for c in quantization.cases(True) if c.name == "token_quant_asymmetric")
    plan = Plan(CPU, False, False)
    ahead.compile_case("quantization", case.label, plan, True)
    counters.clear()
    row = measure(case, plan, HostTimer(reps=1), 10.0)
    assert row.errors == {}
    assert row.fired == {"token_quant_asymmetric": 1}
    assert counters["inductor"]["fxgraph_cache_hit"] == 2  # stock's graph and the plugin's
    assert counters["inductor"]["fxgraph_cache_miss"] == 0


def test_what_another_process_cannot_compile_is_said_and_left_to_this_one() -> None:
    done = ahead.run([partial(heat.compile_point, "token_quant", 3, -1, "cpu")], 1, 120.0)
    assert done.compiled == 0
    assert len(done.errors) == 1
    late = ahead.run([partial(time.sleep, 30)], 1, 0.5)
    assert late.compiled == 0
    assert late.errors == ["1 left after 0.5 s"]
    assert late.seconds < 25


class Clock:
    """What each call takes, in the order in which they are timed."""

    name = "given"

    def __init__(self, *times: float) -> None:
        self.times = list(times)

    def first(self, call) -> None:
        call()

    def ready(self, call, least_us: float) -> Clock:
        return self

    def time(self) -> float:
        return self.times.pop(0)

    def close(self) -> None:
        pass


def test_a_loss_is_timed_again_and_a_win_is_not() -> None:
    win = heat.measure("token_quant", 2, 256, CPU, Clock(1.0, 1.0))
    assert win.warm_us == {"ours": 1.0, "inductor": 1.0}
    loss = heat.measure("token_quant", 2, 256, CPU, Clock(1.0, 0.9, 2.0, 3.0, 3.0, 4.0))
    assert loss.warm_us == {"ours": 2.0, "inductor": 3.0}


def test_an_unknown_op_names_those_that_exist() -> None:
    result = runner.invoke(heat.app, ["--op", "quant"])
    assert result.exit_code == 2
    assert "no op 'quant'" in result.output


def test_a_side_that_raises_costs_the_other_nothing(monkeypatch) -> None:
    def broken(*_args, **_kwargs):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(heat.torch, "compile", lambda *_args, **_kwargs: broken)
    row = heat.measure("group_quant", 2, 1024, CPU, heat.WallClock())
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
    maps = run_of(row_of("group_quant", 1, 1024, 2.0))
    table = tuning.distil([(maps, row) for row in maps.rows], ["group_quant"])
    assert table["fusions"] == {"group_quant": {"on": False, "why": "not measured", "rows": []}}


def judged(fusion: str, *ratios: float) -> Row:
    row = Row(fusion, {"tokens": 7}, fusion=fusion, fired={fusion: 1})
    row.ratios = {"plugin_of_inductor": min(ratios)}
    return row


@given(
    ratios=st.dictionaries(
        st.tuples(st.sampled_from(heat_map.TOKENS), st.sampled_from(heat_map.WIDTHS)),
        st.sampled_from((0.5, 0.9, 0.96, 0.97, 1.0, 2.0)),
        min_size=1,
    )
)
def test_regions_hold_every_point_that_is_behind_and_no_other(ratios) -> None:
    rows = [row_of("token_quant", *point, ratio) for point, ratio in ratios.items()]
    run, own = run_of(*rows), run_of(judged("token_quant", 2.0), suite="quantization")
    pairs = [(run, row) for row in rows] + [(own, row) for row in own.rows]
    found = tuning.distil(pairs, ["token_quant"])["fusions"]["token_quant"]
    assert found["on"]
    regions = found.get("behind", [])
    for (tokens, width), ratio in ratios.items():
        inside = [
            region
            for region in regions
            if region["tokens"][0] <= tokens <= region["tokens"][1]
            and region["width"][0] <= width <= region["width"][1]
        ]
        assert len(inside) == (ratio < heat_map.AHEAD)
        assert all(region["dtype"] == "float8_e4m3fn" for region in inside)
    assert all(region["width"][0] >= min(w for _, w in ratios) for region in regions)


def test_a_quantization_alone_takes_no_part_of_a_fusion_that_is_behind() -> None:
    run = run_of(
        judged("token_quant", 2.0), judged("silu_mul_token_quant", 0.5), suite="quantization"
    )
    names = ["token_quant", "silu_mul_token_quant", "group_quant"]
    found = tuning.distil([(run, row) for row in run.rows], names)["fusions"]
    assert not found["token_quant"]["on"]
    assert "silu_mul_token_quant" in found["token_quant"]["why"]


def test_nor_of_one_that_was_not_measured() -> None:
    run = run_of(judged("token_quant", 2.0), suite="quantization")
    pairs = [(run, row) for row in run.rows]
    assert tuning.distil(pairs, ["token_quant"])["fusions"]["token_quant"]["on"]
    found = tuning.distil(pairs, ["token_quant", "silu_mul_token_quant"])["fusions"]["token_quant"]
    assert not found["on"]
    assert found["why"] == "it would take a part of silu_mul_token_quant, which is not measured"


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
    whole = scheme.op in ("tensor_quant", "tensor_quant_asymmetric") and tokens == 1
    assert name.endswith(scheme.op.replace("tensor", "token") if whole else scheme.op)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(
    "scheme",
    [quantization.TENSOR, quantization.TENSOR_ASYMMETRIC],
    ids=lambda scheme: scheme.name,
)
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
