"""Warm-up from compiled graphs, on a CPU: a stand-in compiler behind the reference implementation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import fusion_passes
from custom_ops import cuda_build, jit, monitor
from custom_ops.jit import compilers
from custom_ops.jit.building import CompileError
from custom_ops.jit.kernel import Kernel, Operand, Problem, Target
from fusion_passes import cli, reporting, settings, warming
from fusion_passes.reporting import Report
from fusion_passes.warming import WarmupPlan
from tests.custom_ops.jit_stand_in import TILES, StandIn

pytestmark = pytest.mark.usefixtures("references", "fresh_reports")
WIDTH = 64


class Model(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + 1


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The compiler of what runs here, with empty caches."""
    monkeypatch.setenv("CUSTOM_OPS_CACHE_DIR", str(tmp_path / "ours"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    compiler = StandIn()
    compilers.register("reference", compiler)
    monitor.disarm()
    yield compiler
    monitor.disarm()
    compilers.unregister("reference")


def run(tokens: int, dynamic: bool | None = True, width: int = WIDTH, **options: object) -> None:
    compiled = torch.compile(
        Model(width),
        backend="fusion_passes",
        dynamic=dynamic,
        options={"fusions": "rms_norm", "allow_reference": True, **options},
    )
    with torch.no_grad():
        compiled(torch.randn(tokens, width).bfloat16())
    assert fusion_passes.report().matches == {"rms_norm": 1}


def reached(plan: WarmupPlan) -> list[int]:
    return sorted(kernel["tile"] for kernel in plan.kernels)


def test_a_dynamic_graph_reaches_what_the_range_does(stand_in: StandIn) -> None:
    run(20)
    assert reached(fusion_passes.warmup_plan(max_num_tokens=8192)) == list(TILES)
    assert reached(fusion_passes.warmup_plan(max_num_tokens=40)) == [16, 32, 64]
    assert reached(fusion_passes.warmup_plan(max_num_tokens=64, min_num_tokens=33)) == [64]
    assert stand_in.count() == 0


def test_a_graph_of_one_size_reaches_that_size_only(stand_in: StandIn) -> None:
    run(20, dynamic=False)
    assert reached(fusion_passes.warmup_plan(max_num_tokens=8192)) == [32]


def test_a_graph_keeps_its_own_bounds(stand_in: StandIn) -> None:
    compiled = torch.compile(
        Model(),
        backend="fusion_passes",
        options={"fusions": "rms_norm", "allow_reference": True},
    )
    x = torch.randn(20, WIDTH).bfloat16()
    torch._dynamo.mark_dynamic(x, 0, min=17, max=60)
    with torch.no_grad():
        compiled(x)
    assert reached(fusion_passes.warmup_plan(max_num_tokens=8192)) == [32, 64]


def test_leading_dimensions_are_multiplied(stand_in: StandIn) -> None:
    compiled = torch.compile(
        Model(),
        backend="fusion_passes",
        dynamic=False,
        options={"fusions": "rms_norm", "allow_reference": True},
    )
    with torch.no_grad():
        compiled(torch.randn(3, 20, WIDTH).bfloat16())
    assert reached(fusion_passes.warmup_plan()) == [64]


def test_warm_up_compiles_each_kernel_once_for_all_graphs(stand_in: StandIn) -> None:
    run(20)
    torch.compiler.reset()
    run(20, dynamic=False)
    outcome = fusion_passes.warmup(max_num_tokens=8192)
    assert len(outcome.compiled) == stand_in.count() == len(TILES)
    again = fusion_passes.warmup(max_num_tokens=8192)
    assert (len(again.compiled), len(again.found)) == (0, len(TILES))
    assert again.wall < 3


@pytest.mark.parametrize(("mode", "kernels"), [("full", 4), ("relax", 4), ("skip", 0)])
def test_the_setting_warms_up_at_the_end_of_compilation(
    stand_in: StandIn, mode: str, kernels: int
) -> None:
    run(20, warmup=mode)
    assert stand_in.count() == kernels
    said = [note for note in fusion_passes.report().notes if "warm-up" in note]
    assert bool(said) == bool(kernels)


def test_the_setting_bounds_the_range(stand_in: StandIn) -> None:
    run(20, warmup="full", warmup_max_num_tokens=30)
    assert stand_in.count() == 2


@pytest.mark.parametrize(("given", "waited"), [(None, 0.25), (1.5, 1.5)])
def test_the_setting_says_how_long_it_waits(
    given: float | None, waited: float, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    compile_all = warming.building.compile_all

    def watched(*args: object, timeout: float, **kwargs: object) -> object:
        asked.append(timeout)
        return compile_all(*args, timeout=timeout, **kwargs)

    monkeypatch.setattr(warming.building, "compile_all", watched)
    run(tokens=4)
    with settings.patch(warmup_timeout=0.25):
        warming.warmup(8, timeout=given)
    assert asked == [waited]


def test_a_graph_from_the_cache_of_inductor_is_known(stand_in: StandIn) -> None:
    run(20)
    fusion_passes.reset_reports()
    torch.compiler.reset()
    run(20, warmup="full")
    assert fusion_passes.report().from_cache
    assert stand_in.count() == len(TILES)
    assert reached(fusion_passes.warmup_plan()) == list(TILES)


def test_a_kernel_that_does_not_compile_is_an_error(stand_in: StandIn) -> None:
    stand_in.fails = frozenset({32})
    run(20)
    with pytest.raises(CompileError, match="tile 32 does not compile"):
        fusion_passes.warmup(max_num_tokens=64)
    assert stand_in.count() == 3


def test_loading_is_asked_for_each_kernel(stand_in: StandIn) -> None:
    run(20)
    fusion_passes.warmup(max_num_tokens=64)
    assert stand_in.loaded == []  # there is no GPU
    fusion_passes.warmup(max_num_tokens=64, load=True)
    assert len(stand_in.loaded) == 3


def test_what_cannot_be_covered_is_said(stand_in: StandIn) -> None:
    stand_in.reason = "its toolkit is missing"
    run(20)
    plan = fusion_passes.warmup_plan()
    assert plan.kernels == ()
    assert plan.notes == ("rms_norm on reference is not covered: its toolkit is missing",)
    with pytest.warns(UserWarning, match="its toolkit is missing"):
        fusion_passes.warmup()


def test_what_cannot_be_traced_is_said(stand_in: StandIn, monkeypatch) -> None:
    problem = Problem("silu_mul", "triton", (), (2, None), True)
    reporting.add(Report(problems=[problem]))
    assert fusion_passes.warmup_plan().notes == ()  # on a CPU Triton compiles nothing
    monkeypatch.setattr(warming.target_module, "here", lambda: Target("9.0a", 132))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (note,) = fusion_passes.warmup_plan().notes
    assert note.startswith("silu_mul on triton is not covered: TRITON_INTERPRET is set")


def test_kernels_of_other_compilers_are_compiled_by_those(stand_in: StandIn, monkeypatch) -> None:
    """An implementation may be made of parts that compile in several ways, as a mixture of experts is."""
    other = StandIn(toolchain="3")
    compilers.register("other", other)
    try:
        mine = stand_in.kernels

        def kernels(problem: Problem, *rest: object) -> list[Kernel]:
            found = mine(problem, *rest)  # type: ignore[arg-type]
            return [*found, Kernel.of(problem.op, "other", {"tile": 7, "width": WIDTH})]

        monkeypatch.setattr(stand_in, "kernels", kernels)
        run(20)
        plan = fusion_passes.warmup_plan(max_num_tokens=20)
        assert [kernel.implementation for kernel in plan.kernels] == ["reference"] * 2 + ["other"]
        assert plan.versions == {"reference": "1", "other": "3"}
        assert len(fusion_passes.warmup(plan=WarmupPlan.from_json(plan.to_json())).compiled) == 3
        other.toolchain = "4"
        with pytest.raises(ValueError, match="made for other '3', here is '4'"):
            fusion_passes.warmup(plan=plan)
    finally:
        compilers.unregister("other")


def test_a_compiler_that_does_not_know_an_op_leaves_it_to_the_tracer(stand_in: StandIn) -> None:
    assert compilers.enumerator("rms_norm", "reference") is stand_in
    assert compilers.enumerator("block_scaled_mm", "deep_gemm") is compilers.find("deep_gemm")
    assert compilers.enumerator("fused_moe", "deep_gemm") is compilers.find("triton")
    assert compilers.enumerator("scaled_mm", "cublaslt") is compilers.find("triton")


def test_arguments_keep_lists_offsets_and_symbols(stand_in: StandIn) -> None:
    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x[:, 8:] + y

    graphs: list[torch.fx.Graph] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: list[object]) -> torch.fx.GraphModule:
        graphs.append(gm.graph)
        return gm

    compiled = torch.compile(forward, backend=keep, dynamic=True)
    compiled(torch.zeros(20, 24), torch.zeros(20, 16))
    (cut,) = (n for n in graphs[0].nodes if n.op == "call_function" and "getitem" in n.name)
    tensor = cut.meta["example_value"]
    rows, width = (str(size.node.expr) for size in (tensor.shape[0], tensor.stride(0)))
    found = warming._argument([tensor, tensor.shape[0], torch.bfloat16, None])
    assert found[0].shape[0] == rows
    assert found[0].stride == (width, 1)
    assert found[0].offset == 8
    assert found[1:] == (rows, "torch.bfloat16", None)


def test_a_strict_warm_up_has_to_cover_everything(stand_in: StandIn) -> None:
    stand_in.reason = "its toolkit is missing"
    run(20)
    with (
        pytest.warns(UserWarning, match="missing"),
        pytest.raises(jit.JitError, match="its toolkit is missing"),
    ):
        fusion_passes.warmup(strict=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "some"}, "mode is 'some'; accepted: relax, full"),
        ({"max_num_tokens": 0}, "accepted: 1 <= min <= max"),
        ({"max_num_tokens": 4, "min_num_tokens": 5}, "accepted: 1 <= min <= max"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fusion_passes.warmup_plan(**arguments)  # type: ignore[arg-type]


class TestMonitor:
    def test_nothing_is_an_event_before_a_warm_up(self, stand_in: StandIn) -> None:
        monitor.compiling("op", "stand_in", "M=1", "a kernel")
        assert fusion_passes.jit_events() == ()

    def test_after_one_each_is_counted_and_logged_once(self, stand_in: StandIn, caplog) -> None:
        fusion_passes.warmup()
        for sizes in ("M=1", "M=2"):
            monitor.compiling("op", "stand_in", sizes, "a kernel")
        assert [event.sizes for event in fusion_passes.jit_events()] == ["M=1", "M=2"]
        assert caplog.text.count("op: stand_in compiles a kernel for M=1 after warm-up") == 1
        assert "M=2" not in caplog.text

    def test_the_setting_makes_it_an_error(self, stand_in: StandIn) -> None:
        with settings.patch(warmup_strict=True):
            fusion_passes.warmup()
        with pytest.raises(jit.JitError, match="would compile a kernel for M=1"):
            monitor.compiling("op", "stand_in", "M=1", "a kernel")

    @pytest.mark.parametrize("strict", [False, True])
    def test_a_build_of_the_cuda_kernels_is_one_as_well(
        self, stand_in: StandIn, monkeypatch, tmp_path: Path, strict: bool
    ) -> None:
        built: list[list[str]] = []

        def build(archs: list[str]) -> Path:
            built.append(archs)
            return tmp_path

        for name, replacement in {
            "why_not": lambda: None,
            "current_arch": lambda: "9.0a",
            "_find": lambda arch: None,
            "build": build,
            "_load": lambda directory: None,
        }.items():
            monkeypatch.setattr(cuda_build, name, replacement)
        cuda_build.load()
        assert fusion_passes.jit_events() == ()  # before a warm-up
        monkeypatch.setattr(warming.target_module, "here", lambda: Target("cpu"))
        fusion_passes.warmup(strict=strict)
        if strict:
            with pytest.raises(jit.JitError, match="cuda would compile sm_90a-"):
                cuda_build.load()
            assert built == [["9.0a"]]
        else:
            cuda_build.load()
            (event,) = fusion_passes.jit_events()
            assert event.implementation == "cuda"
            assert event.kernel.startswith("sm_90a-")
            assert built == [["9.0a"]] * 2


names = st.text("abcdefgh_", min_size=1, max_size=8)
values = st.one_of(st.integers(0, 1 << 40), names, st.booleans())
sizes = st.one_of(st.integers(1, 1 << 40), st.just("s0*s1"))
kernels = st.builds(
    lambda op, implementation, spec, example: Kernel.of(op, implementation, spec, **example),
    names,
    names,
    st.dictionaries(names, values, max_size=4),
    st.dictionaries(st.sampled_from(["m", "n", "k"]), st.integers(1, 9000)),
)
operands = st.builds(
    Operand,
    st.sampled_from(["bfloat16", "float32"]),
    st.lists(sizes, max_size=4).map(tuple),
    st.lists(sizes, max_size=4).map(tuple),
    st.sampled_from(["", "column_major_tma"]),
    sizes,
)
problems = st.builds(
    Problem,
    names,
    names,
    st.lists(
        st.one_of(
            operands,
            st.floats(allow_nan=False),
            names,
            st.lists(operands, max_size=2).map(tuple),
        ),
        max_size=4,
    ).map(tuple),
    st.tuples(st.integers(0, 100), st.one_of(st.none(), st.integers(100, 9000))),
    st.booleans(),
)


@given(plan=st.builds(
    WarmupPlan,
    st.sampled_from(["relax", "full"]),
    st.integers(1, 10),
    st.integers(10, 9000),
    st.builds(Target, names, st.integers(0, 200), names, names),
    st.lists(kernels, max_size=5).map(tuple),
    st.dictionaries(names, names, max_size=3),
    st.lists(names, max_size=3).map(tuple),
))  # fmt: skip
def test_a_plan_survives_json(plan: WarmupPlan) -> None:
    again = WarmupPlan.from_json(plan.to_json())
    assert again == plan
    assert [k.example for k in again.kernels] == [k.example for k in plan.kernels]


@given(found=st.lists(problems, max_size=4))
def test_a_report_keeps_its_problems(found: list[Problem]) -> None:
    assert Report.from_json(Report(problems=found).to_json()).problems == found


@given(
    rows=st.tuples(st.integers(0, 64), st.one_of(st.none(), st.integers(64, 9000))),
    low=st.integers(1, 9000),
    more=st.integers(0, 9000),
)
def test_a_range_lies_in_what_is_asked_for_and_in_what_the_graph_allows(rows, low, more) -> None:
    found = Problem("op", "x", (), rows, True).range(low, low + more)
    reachable = [
        m
        for m in range(low, low + more + 1)
        if (m >= rows[0] or rows[0] <= 2) and (rows[1] is None or m <= rows[1])
    ]
    assert found == ((reachable[0], reachable[-1]) if reachable else None)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 2}', '{"format": 1, "mode": "full"}'])
def test_what_is_no_plan_is_said_to_be_none(text: str) -> None:
    with pytest.raises(ValueError, match="not a warm-up plan"):
        WarmupPlan.from_json(text)


class TestCommand:
    @pytest.fixture
    def plan(self, stand_in: StandIn, tmp_path: Path) -> Path:
        run(20)
        path = tmp_path / "plan.json"
        path.write_text(fusion_passes.warmup_plan(max_num_tokens=64).to_json())
        fusion_passes.reset_reports()  # the machine that replays it has no model
        return path

    def test_a_plan_is_replayed_without_the_model(self, plan: Path, stand_in: StandIn) -> None:
        result = CliRunner().invoke(cli.app, ["warmup", str(plan), "--json"])
        assert result.exit_code == 0, result.output
        answer = json.loads(result.stdout)
        assert len(answer["compiled"]) == answer["kernels"] == stand_in.count() == 3
        result = CliRunner().invoke(cli.app, ["warmup", str(plan)])
        assert "0 kernels compiled, 3 found compiled" in result.stdout

    def test_a_plan_for_other_versions_is_refused(self, plan: Path, stand_in: StandIn) -> None:
        stand_in.toolchain = "2"
        result = CliRunner().invoke(cli.app, ["warmup", str(plan)])
        assert result.exit_code == 2
        assert "made for reference '1', here is '2'" in result.stderr

    def test_a_failure_is_a_line_and_not_a_traceback(self, plan: Path, stand_in: StandIn) -> None:
        stand_in.fails = frozenset({16})
        result = CliRunner().invoke(cli.app, ["warmup", str(plan)])
        assert result.exit_code == 2
        assert "tile 16 does not compile" in result.stderr

    def test_a_file_that_is_no_plan(self, tmp_path: Path) -> None:
        (tmp_path / "x.json").write_text("{}")
        result = CliRunner().invoke(cli.app, ["warmup", str(tmp_path / "x.json")])
        assert result.exit_code == 2
        assert "not a warm-up plan" in result.stderr


def test_a_plan_prints_as_a_table(stand_in: StandIn) -> None:
    run(20)
    plan = fusion_passes.warmup_plan(max_num_tokens=40)
    fusion_passes.warmup(max_num_tokens=16)
    text = str(plan)
    assert "3 kernels for 1 to 40 tokens on cpu (full)" in text
    assert text.count("yes") == 1


def test_every_name_of_the_module_is_public() -> None:
    assert set(warming.__all__) <= set(fusion_passes.__all__)
