"""PEFT models as they are: one adapter, found in the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fusion_passes
from fusion_passes import verify
from fusion_passes.testing import fuse
from tests.models.peft_zoo import (
    ALL,
    KINDS,
    LAYERS,
    adapted,
    config,
    errors,
    everything,
    implementations,
)
from tests.models.zoo import fp8_matches, tokens

pytestmark = pytest.mark.usefixtures("references")


@pytest.mark.parametrize("adapter", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_is_found(kind: str, adapter: str) -> None:
    result = fuse(adapted(kind, adapter), tokens(7), use_cache=False, only=everything())
    norms = {"llama": 1, "qwen3": 1 + 2 * LAYERS}[kind]
    expected = {"lora_linear": 7 * LAYERS, "add_rms_norm": 2 * LAYERS, "rms_norm": norms}
    # q, k and v; gate and up: a site for each that joins another
    expected |= {"silu_mul": LAYERS, "shared_lora_shrink": 3 * LAYERS}
    assert result.report.matches == expected, result.report
    assert set(implementations(result.report)) == {"lora_linear_single:reference"}
    assert not [m for m in result.report.near_misses if m.fusion == "lora_linear"]
    targets = [str(node.target) for node in result.after.graph.nodes]
    assert targets.count("custom_ops.lora_linears_single.default") == 2 * LAYERS
    assert targets.count("custom_ops.lora_linear_single.default") == 2 * LAYERS  # o and down
    (eager,), (actual,), (judge,) = result.expected, result.actual, result.judge
    assert verify.difference(eager, actual) is None
    ours, eagers = (
        float((side.double() - judge).norm() / judge.norm()) for side in (actual, eager)
    )
    assert ours <= 1.02 * eagers + 1e-4


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("adapter", ["float32", "bfloat16"])
def test_over_block_fp8_linears(adapter: str, order: str) -> None:
    model = adapted("llama", adapter, "fp8_block", order)
    result = fuse(model, tokens(7), use_cache=False, only=everything())
    matches, linears = result.report.matches, 7 * LAYERS
    assert matches["lora_linear"] == matches["block_scaled_linear"] == linears, result.report
    assert matches["shared_group_quant"] == fp8_matches(LAYERS)["shared_group_quant"]
    # the base reads what a norm returns in FP8, the adapter as it is: one kernel makes both
    assert matches["add_rms_norm_group_quant"] == 2 * LAYERS - 1
    assert matches["rms_norm_group_quant"] == 1
    kept = [s for s in result.report.sites if s.fusion.endswith("rms_norm_group_quant")]
    assert all("rms_norm_and_group_quant" in s.implementations[0] for s in kept)
    assert set(implementations(result.report)) == {"lora_add_single:reference"}
    (eager,), (actual,), (judge,) = result.expected, result.actual, result.judge
    ours, eagers = (
        float((side.double() - judge).norm() / judge.norm()) for side in (actual, eager)
    )
    assert ours <= 1.15 * eagers + 1e-3, f"{ours:.4f} from float64, eager {eagers:.4f}"


def test_quantizing_leaves_adapters_as_they_are() -> None:
    model = adapted("llama", "bfloat16", "fp8_block", "after")
    kinds = {
        name.split(".")[-2 if "lora_" in name else -1]: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert kinds == {
        "lora_A": "Linear",
        "lora_B": "Linear",
        "base_layer": "Fp8BlockLinear",
        "lm_head": "Linear",
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True, "rank": 16},
    "rank 1": {"rank": 1},
    "unscaled": {"lora_alpha": 8},
    "attention only": {"targets": ("q_proj", "v_proj")},
    "dropout, which eval leaves out": {"lora_dropout": 0.3},
    "biases on q, k and v": {"kind": "qwen2"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_adapters_of_every_kind(name: str) -> None:
    options = OPTIONS[name]
    result = fuse(adapted(**options), tokens(7), use_cache=False, only=everything())
    assert result.report.matches["lora_linear"] == len(options.get("targets", ALL)) * LAYERS
    assert set(implementations(result.report)) == {"lora_linear_single:reference"}
    assert verify.difference(result.expected[0], result.actual[0]) is None


def test_what_is_no_plain_lora_stays() -> None:
    torch.compiler.reset()
    fusion_passes.reset_reports()
    model = adapted(use_dora=True, targets=("v_proj",))
    compiled = torch.compile(model, backend="fusion_passes", options={"fusions": "all"})
    with torch.no_grad():
        expected = model(tokens(7), use_cache=False).logits
        assert max(errors(compiled(tokens(7), use_cache=False).logits, expected)) < 0.02
    assert not any("lora_linear" in report.matches for report in fusion_passes.reports())


@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
def test_a_bias_of_the_adapter_is_a_near_miss() -> None:
    result = fuse(adapted(lora_bias=True), tokens(7), use_cache=False, only=everything())
    reasons = [m.reason for m in result.report.near_misses if m.fusion == "lora_linear"]
    assert reasons.count("lora_B of the adapter has a bias (lora_bias)") >= 7 * LAYERS


@pytest.mark.parametrize("adapter", ["float32", "bfloat16"])
def test_dynamic_shapes_take_no_more_graphs_than_stock(adapter: str) -> None:
    from torch._dynamo.testing import CompileCounter

    model, counter, lengths = adapted("llama", adapter), CompileCounter(), (7, 1, 2, 33)
    with torch.no_grad():
        torch.compiler.reset()
        stock = torch.compile(model, backend=counter, dynamic=True)
        expected = {length: stock(tokens(length), use_cache=False).logits for length in lengths}
        torch.compiler.reset()
        fusion_passes.reset_reports()
        options = {"fusions": "all"}
        compiled = torch.compile(model, backend="fusion_passes", dynamic=True, options=options)
        for length in lengths:
            actual = compiled(tokens(length), use_cache=False).logits
            error = (actual.double() - expected[length].double()).norm() / expected[
                length
            ].double().norm()
            assert error < 0.02, f"{length} tokens: logits differ by {error:.3%}"
    assert len(fusion_passes.reports()) <= counter.frame_count
    for report in fusion_passes.reports():
        assert report.matches["lora_linear"] == 7 * LAYERS, report


@pytest.mark.parametrize("adapter", ["float32", "bfloat16"])
def test_a_compiled_model_follows_its_adapters(adapter: str) -> None:
    """Switched, disabled, merged, two at once, deleted: what eager computes then, in no more graphs than stock."""
    from torch._dynamo.utils import counters

    ids, graphs = tokens(6), {}
    options: dict[str, Any] = {"options": {"fusions": "all"}, "backend": "fusion_passes"}
    for side, how in (("stock", {"backend": "aot_eager"}), ("ours", options)):
        torch.compiler.reset()
        counters.clear()
        model = adapted(adapter=adapter, layers=1)
        model.add_adapter("two", config(4), autocast_adapter_dtype=adapter == "float32")
        compiled = torch.compile(model.eval(), **how)

        def follows(name: str, model: Any = model, compiled: Any = compiled) -> None:
            with torch.no_grad():
                pair = compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
            assert max(errors(*pair)) < 0.05, name

        follows("the first")
        model.set_adapter("two")
        follows("the second")
        with model.disable_adapter():
            follows("disabled")
        model.merge_adapter()
        follows("merged")
        model.unmerge_adapter()
        model.base_model.set_adapter(["default", "two"])
        follows("both")
        model.delete_adapter("two")
        model.set_adapter("default")
        follows("deleted")
        graphs[side] = counters["stats"]["unique_graphs"]
    assert graphs["ours"] <= graphs["stock"]


def test_training_is_left_as_it_is() -> None:
    """Gradients reach the adapters: what a fusion makes has none, and stays out of such a graph."""
    model = adapted(layers=1, init_lora_weights=True).train()
    ids = tokens(6)

    def gradients(call: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        call(ids, use_cache=False).logits.float().square().mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model)
    fusion_passes.reset_reports()
    compiled = torch.compile(model, backend="fusion_passes", options={"fusions": "all"})
    actual = gradients(compiled)
    assert actual.keys() == expected.keys()
    assert len(actual) == 14
    for name, gradient in expected.items():
        error = float((actual[name] - gradient).norm() / (gradient.norm() + 1e-12))
        assert error < 0.05, name
    assert not any("lora_linear" in report.matches for report in fusion_passes.reports())
