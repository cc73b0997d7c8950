"""The benchmark of mixtures of experts, at tiny sizes on the CPU's clock, and the table that it is distilled into."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from bench import ahead, moe_blocks, moe_report, readme, tuning
from bench import moe as mixtures
from bench.__main__ import app
from bench.case import close
from bench.moe_shared import WAYS
from bench.results import ROOT, Row, Run
from bench.suites import moe, moe_apart
from bench.timer import HostTimer
from custom_ops.moe import choice
from custom_ops.moe.parts import Pipeline
from custom_ops.moe.problem import Problem
from fusion_passes import registry
from fusion_passes.testing import fuse

CPU = torch.device("cpu")
MODELS = {name: moe.small(model) for name, model in moe.MODELS.items()}
runner = CliRunner()


@pytest.mark.parametrize("name", MODELS)
def test_the_block_by_hand_is_the_block_of_transformers(name):
    model = MODELS[name]
    with torch.no_grad():
        hidden_states = moe.draw(model, 9, CPU).unsqueeze(0)
        expected = moe.run_block(moe.block(model, "bf16", CPU), hidden_states)
        ours = moe.by_hand(model, "bf16", hidden_states)
    assert close(1e-2)(expected, ours) is None
    assert not torch.equal(ours, torch.zeros_like(ours))


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if len(model.dtypes) > 1])
def test_fp8_by_hand_is_near(name):
    model = MODELS[name]
    with torch.no_grad():
        hidden_states = moe.draw(model, 9, CPU).unsqueeze(0)
        ours = moe.by_hand(model, "fp8_block", hidden_states)
        expected = moe.by_hand(model, "bf16", hidden_states)
    assert close(8e-2)(expected, ours) is None
    assert close(1e-3)(expected, ours) is not None


def test_the_sizes_that_must_be_shown_are_there():
    labels = {case.label for case in moe.cases()}
    for tokens in (1, 16, 64, 512, 4096):
        sizes = f"tokens={tokens}, experts=128, top_k=8, hidden=2048, intermediate=768"
        for dtype in ("bf16", "fp8_block"):
            assert f"moe_block_qwen3_30b_a3b_{dtype}({sizes}, pairs={8 * tokens})" in labels
    names = {case.name for case in moe.cases()}
    for model in ("mixtral_8x7b", "deepseek_v3_slice", "gpt_oss_20b"):
        assert f"moe_block_{model}_bf16" in names


def test_the_least_traffic_and_the_floor():
    qwen = moe.MODELS["qwen3_30b_a3b"]
    assert qwen.weight_bytes == 3 * 2048 * 768
    moved, flops = moe.least(qwen, "bf16", 4096, [256] * 128)
    assert flops == 2 * 3 * 2048 * 768 * 32768
    assert moe.floor_us(moved, flops, "bf16") == pytest.approx(402, rel=0.1)  # as issue 5 has it
    moved, _ = moe.least(qwen, "bf16", 1)
    assert moe.floor_us(moved, 0, "bf16") == pytest.approx(25, rel=0.02)
    one, _ = moe.least(qwen, "fp8_block", 1)
    assert one < 0.51 * moved
    some, _ = moe.least(qwen, "bf16", 2, [1, 1, 0])
    assert some == 2 * 2 * qwen.weight_bytes + 8 * 2048


def test_a_slice_has_about_its_share_of_the_pairs():
    model = MODELS["deepseek_v3_slice"]
    module = moe.block(model, "bf16", CPU)
    _, ids = moe.route(model, module, moe.draw(model, 32, CPU))
    share = 32 * model.top_k * model.experts / model.everywhere
    assert 0.7 * share <= sum(moe.hit(model, ids)) <= 1.3 * share


def test_a_profile_has_every_part_and_a_picture(tmp_path):
    model = MODELS["qwen3_30b_a3b"]
    with torch.no_grad():
        rows = [
            mixtures.profile(model, "bf16", tokens, CPU, HostTimer(reps=1), "grouped_mm")
            for tokens in (1, 4)
        ]
    for row in rows:
        assert set(row.warm_us) == {*mixtures.PARTS, "block"}
        assert min(row.warm_us.values()) > 0
        assert row.ratios["tokens_per_expert_least"] >= 1
        assert row.ratios["experts_hit"] <= model.experts
        micros = row.warm_us["experts"]
        assert row.ratios["experts_tflops"] == pytest.approx(row.flops / micros / 1e6)
        moved = row.warm_us["prepare"] + row.warm_us["finalize"]
        assert row.ratios["align_and_permute"] == pytest.approx(moved / row.warm_us["block"])
    (path,) = mixtures.draw(rows, "a CPU", tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert mixtures.profile_table(rows).row_count == 2


def test_the_command_writes_rows(tmp_path):
    arguments = ["moe", "--tiny", "--device", "cpu", "--out", str(tmp_path), "--commit", "abc"]
    result = runner.invoke(
        app, [*arguments, "--model", "mixtral_8x7b", "--dtype", "bf16", "--experts", "grouped_mm"]
    )
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("moe_profile-*.json")
    data = json.loads(path.read_text())
    assert data["commit"] == "abc"
    assert [row["case"] for row in data["rows"]] == ["moe_profile_mixtral_8x7b_bf16"]
    assert list((tmp_path / "plots").glob("*.png"))


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="no model 'llama'; accepted: qwen3_30b_a3b, mixtral_8x7b"):
        mixtures.models(["llama"], tiny=True)


# --- the table ---------------------------------------------------------------------------------------------------


def run_of(*rows: Row, date: str = "2026-01-01T00:00:00+00:00") -> Run:
    device = {"name": "GPU", "arch": "sm_90"}
    return Run("moe", device, {}, "abc", "", date, "", 3000.0, list(rows))


def row_of(case: str, tokens: int, **us: float) -> Row:
    sizes = {"tokens": tokens, "experts": 8, "top_k": 2, "hidden": 64, "intermediate": 32}
    row = Row(case, {**sizes, "pairs": 2 * tokens})
    row.warm_us = {"ours": 1.0, **{f"experts {name}": time for name, time in us.items()}}
    row.finish(3000.0)
    return row


def test_what_was_measured_is_written_and_decides(tmp_path, monkeypatch):
    folder = tmp_path / "products"
    folder.mkdir()
    (folder / "sm_90.json").write_text(json.dumps({"arch": "sm_90", "scaled_mm": {"kept": []}}))
    run = run_of(
        row_of("fused_moe_qwen_bf16", 1, triton=3.0, triton_decode=2.0, grouped_mm=9.0),
        row_of("fused_moe_qwen_bf16", 512, triton=3.0, deep_gemm=2.5),
        row_of("fused_moe_qwen_fp8_block", 1, triton_fp8_block=1.0),
        row_of("moe_block_qwen_bf16", 1, triton=0.1),
    )
    (path,) = tuning.write([run], tmp_path, "moe")
    assert path == folder / "sm_90.json"
    table = json.loads(path.read_text())
    assert table["scaled_mm"] == {"kept": []}
    assert set(table["fused_moe"]) == {"bfloat16", "fp8_block"}
    rows = table["fused_moe"]["bfloat16"]
    assert list(choice.nearest(rows, (8, 64, 32), 2)) == ["triton_decode", "triton", "grouped_mm"]
    assert list(choice.nearest(rows, (8, 64, 32), 3)) == ["deep_gemm", "triton"]


def test_where_stock_is_ahead_its_products_are_taken():
    """A block that is behind gives its place in the table to grouped_mm, and says nothing of the fusion any more."""
    blocks = []
    for tokens, plugin, stock in ((1, 2.0, 3.0), (64, 5.0, 6.0), (4096, 110.0, 100.0)):
        block = row_of("moe_block_mixtral_bf16", tokens)
        block.fusion, block.fired = "fused_moe", {"fused_moe": 1}
        block.warm_us = {"plugin": plugin, "inductor": stock}
        block.finish(3000.0)
        blocks.append(block)
    other = row_of(
        "moe_block_qwen_bf16", 1
    )  # ahead everywhere: its experts are timed one by one, not its blocks
    other.warm_us = {"plugin": 1.0, "inductor": 2.0}
    other.finish(3000.0)
    rows = tuning.distil_moe([(run_of(*blocks, other), row) for row in (*blocks, other)])
    rows = rows["fused_moe"]["bfloat16"]
    assert [row["pairs"] for row in rows] == [2, 128, 8192]
    assert list(choice.nearest(rows, (8, 64, 32), 2)) == ["triton_decode", "grouped_mm"]
    assert list(choice.nearest(rows, (8, 64, 32), 128)) == ["triton", "grouped_mm"]
    assert list(choice.nearest(rows, (8, 64, 32), 8192)) == ["grouped_mm", "triton"]
    verdict = tuning.verdict("fused_moe", blocks)
    assert verdict["on"]
    assert "0.91 in moe_block_mixtral_bf16 at 4096" in verdict["why"]
    assert [row["tokens"] for row in verdict["rows"]] == [1, 64]
    assert not tuning.verdict("fused_moe", blocks[2:])["on"]


def test_the_names_in_a_table_are_those_of_pipelines():
    """What the shipped tables say can be run."""
    from custom_ops import tables

    for table in tables.load().values():
        for rows in table.get(choice.TABLE, {}).values():
            for row in rows:
                assert set(row["us"]) <= set(choice.pipelines())
    assert all(isinstance(each, Pipeline) for each in choice.pipelines().values())


def test_blocks_with_two_weights_are_what_their_ops_compute():
    for case in moe_apart.cases(tiny=True):
        with torch.no_grad():
            inputs = case.inputs(CPU)
            expected = case.plain(*inputs)
            for name in ("by_hand", "packed", "experts grouped_mm"):
                assert close(1e-2)(expected, case.others[name](inputs)()) is None, (case.name, name)
    assert {case.sizes["tokens"] for case in moe_apart.cases()} == set(moe.TOKENS)


def test_grouped_products_are_not_launched_ahead():
    """Their offsets are what no kernel has written."""

    def product(x, weight, counts):
        ends = counts.cumsum(0, dtype=torch.int32)
        return torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)

    def launched(*_args, **_kwargs):
        raise AssertionError("a product was launched")

    from torch._inductor.select_algorithm import extern_kernels

    x, weight = torch.ones(10, 64).bfloat16(), torch.ones(4, 32, 64).bfloat16()
    counts = torch.tensor([2, 3, 3, 2], dtype=torch.int32)
    torch.compiler.reset()
    compiled = torch.compile(product)
    with mock.patch.object(extern_kernels, "_grouped_mm", launched):
        with ahead.unlaunched():
            assert compiled(x, weight, counts).shape == (10, 32)
        with pytest.raises(AssertionError, match="was launched"):
            compiled(x, weight, counts)
    assert torch.equal(compiled(x, weight, counts), torch.full((10, 32), 64.0).bfloat16())


def test_tune_knows_its_families():
    result = runner.invoke(app, ["tune", "--family", "lora2"])
    assert result.exit_code == 2
    assert "no family" in result.output


@pytest.mark.parametrize("name", MODELS)
def test_the_drawn_tokens_hit_as_many_experts_as_the_mean(name):
    model = MODELS[name]
    module = moe.block(model, "bf16", CPU)
    rows = moe.draw(model, 3, CPU)
    facts = moe.drawn(module, rows.unsqueeze(0), model, "bf16")
    assert abs(facts["experts_hit"] - moe.expected_hits(model, 3)) <= 0.5
    counts = moe.hit(model, moe.route(model, module, rows)[1])
    assert facts["experts_hit"] == sum(count > 0 for count in counts)
    moved, flops = moe.least(model, "bf16", 3, counts)
    assert facts["floor_us"] == moe.floor_us(moved, flops, "bf16")


# --- whole blocks of every model ----------------------------------------------------------------------------------


def test_the_table_of_blocks_has_every_model_and_number_of_tokens():
    chosen = moe_blocks.cases(moe.MODELS.values(), (), ())
    shown = {(case.name, case.sizes["tokens"]) for case in chosen}
    wanted = {
        (f"moe_block_{model.name}_{dtype}", tokens)
        for model in moe.MODELS.values()
        for dtype in model.dtypes
        for tokens in moe.TOKENS
    }
    # and the draw that the floor in issue 5 has
    assert shown == wanted | {("moe_block_qwen3_30b_a3b_77_hit_bf16", 16)}
    assert all(
        set(case.others) <= {"by_hand", "by_hand_bf16"} and not case.launched for case in chosen
    )
    few = moe_blocks.cases([moe.MODELS["mixtral_8x7b"]], ("fp8_block",), (1, 16))
    assert [case.sizes["tokens"] for case in few] == [1, 16]


def test_the_table_of_blocks_says_what_failed():
    sizes = {"tokens": 1}
    row = Row("moe_block_mixtral_8x7b_bf16", sizes, warm_us={"plugin": 50.0, "inductor": 100.0})
    row.ratios |= {"experts_hit": 2.0, "floor_us": 40.0}
    broken = Row("moe_block_mixtral_8x7b_fp8_block", sizes, warm_us={"by_hand_bf16": 50.0})
    broken.errors["plugin"] = "RuntimeError: no"
    cells = [list(column.cells) for column in moe_blocks.table([row, broken]).columns]
    assert cells[0] == ["mixtral_8x7b_bf16", "mixtral_8x7b_fp8_block"]
    assert cells[3] == ["50.0", "RuntimeError: no"]
    assert cells[4] == ["2.00", ""]
    assert cells[6:] == [["2", ""], ["40.0", ""], ["0.80", ""]]


@pytest.mark.parametrize("name", ["deepseek_v3_slice", "mixtral_8x7b"])
def test_the_plugin_knows_among_how_many_experts_the_router_chose(name, monkeypatch):
    """Most pairs of a slice are elsewhere: its tiles are those of the pairs that are here."""
    monkeypatch.setenv("FUSION_PASSES_ALLOW_REFERENCE", "1")
    model = moe.small(moe.MODELS[name])
    module = moe.block(model, "bf16", torch.device("cpu"))
    x = torch.randn(1, 8, model.hidden).bfloat16()
    only = [registry()[each] for each in ("fused_moe", *moe.ROUTERS)]
    graph = fuse(module, x, only=only).after.graph
    (node,) = (n for n in graph.nodes if n.target is torch.ops.custom_ops.fused_moe.default)
    assert node.kwargs.get("routed_experts", 0) == model.routed
    tensors = [arg.meta["val"] for arg in node.args]
    keywords = {k: v for k, v in node.kwargs.items() if not isinstance(v, torch.fx.Node)}
    problem = Problem.of(*tensors, **keywords)
    wanted = problem.sizes.pairs * model.experts / model.everywhere
    assert choice.expected_pairs(problem) == max(1, round(wanted))


# --- the report ---------------------------------------------------------------------------------------------------


def test_the_report_has_what_was_measured():
    times = dict.fromkeys((*mixtures.PARTS, "block"), 10.0)
    ratios = {"floor_us": 5.0, "of_floor": 0.5, "align_and_permute": 0.2, "experts_hit": 7.0}
    parts = Row("moe_profile_mixtral_8x7b_bf16", {"tokens": 64}, warm_us=times, ratios=ratios)
    parts.fired = {"triton": 1}
    peak = Row("moe_memory_mixtral_8x7b_bf16", {"tokens": 65536, "chunk": 4096})
    peak.ratios = {"peak_mib": 900.0, "output_mib": 512.0, "declared_mib": 1000.0}
    beside = Row("moe_shared_glm_4_5_air", {"tokens": 1}, warm_us=dict.fromkeys(WAYS, 3.0))
    beside.ratios = {"beside": 1.25}
    folder = ROOT / "bench" / "results" / "plots"
    text = "\n".join(moe_report.section("a GPU", [parts, peak, beside], folder, readme.table))
    assert "| `mixtral_8x7b_bf16` | 64 | `triton` | 10.0 |" in text
    assert "| 5.0 | 0.50 | 20% | 7 |" in text
    assert "bench/results/plots/moe-profile-mixtral-8x7b-bf16-a-gpu.png" in text
    assert "| `mixtral_8x7b_bf16` | 65536 | 4096 | 900 | 512 |" in text
    assert "| `glm_4_5_air` | 1 | 3.0 | 3.0 | 3.0 | 3.0 | 1.25 |" in text
    assert moe_report.section("a GPU", [], folder, readme.table) == []
