"""Stock mixtures of experts: the whole block and its router fuse, whichever way the model runs them."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import fx

import fusion_passes
from fusion_passes import registry, verify
from fusion_passes.testing import Result, fuse
from tests.models.moe_zoo import TOP_K, build, tokens

pytest.importorskip("transformers", reason="needs the extra 'models'")

LAYERS = 2
FUSIONS = ("fused_moe", "topk_softmax", "topk_sigmoid", "grouped_topk")
ROUTERS = {
    "qwen3_moe": "topk_softmax",
    "mixtral": "topk_softmax",
    "deepseek_v3": "grouped_topk",
    "gpt_oss": "topk_softmax",
}
IMPLEMENTATIONS = ("grouped_mm", "batched_mm")


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_PASSES_ALLOW_REFERENCE", "1")
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "triton")  # its interpreter takes minutes for a model


def fused(kind: str, *build_args: Any, count: int = 17, **keywords) -> Result:
    only = [registry()[name] for name in FUSIONS]
    return fuse(build(kind, *build_args), tokens(count), use_cache=False, only=only, **keywords)


class LowestFirst(fx.Interpreter):
    """Runs a graph with ties broken as on a GPU: on a CPU, topk takes any of the experts with one score."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is not torch.ops.aten.topk.default:
            return super().call_function(target, args, kwargs)
        values, count = args[:2]
        order = values.sort(dim=args[2] if len(args) > 2 else -1, descending=True, stable=True)
        return tuple(part.narrow(-1, 0, count).contiguous() for part in order)


def assert_close(result: Result, scheme: str = "bf16") -> None:
    (actual,), (judge,) = result.actual, result.judge
    with torch.no_grad():
        (expected,) = LowestFirst(result.before).run(*result.before.meta["inputs"])
    problem = verify.difference(expected, actual, accumulated=True)
    if scheme == "bf16":
        assert problem is None, problem
    # of the median token, as one that float64 sends to other experts is far from both
    ours, eagers = (
        float(((side.double() - judge).norm(dim=-1) / judge.norm(dim=-1)).median())
        for side in (actual, expected)
    )
    assert ours <= 1.15 * eagers + 1e-3, f"{ours:.4f} from float64, eager {eagers:.4f}"


class Routes(LowestFirst):
    """Runs a graph and keeps the ids that each mixture of experts went by, each token's sorted."""

    def __init__(self, module: fx.GraphModule, top_k: int) -> None:
        super().__init__(module)
        self.top_k, self.routes = top_k, []

    def call_function(self, target, args, kwargs):
        ids = None
        if target is torch.ops.custom_ops.fused_moe.default:
            ids = args[4]
        elif target is torch.ops.aten.sort.default and args[0].dtype is torch.int64:
            ids = args[0]
        if ids is not None:
            self.routes.append(ids.view(-1, self.top_k).sort(-1).values)
        return super().call_function(target, args, kwargs)


def routes(module: fx.GraphModule, inputs: list[torch.Tensor], top_k: int) -> torch.Tensor:
    interpreter = Routes(module, top_k)
    with torch.no_grad():
        interpreter.run(*inputs)
    return torch.stack(interpreter.routes)


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ROUTERS)
def test_the_whole_block_is_one_op(kind: str, implementation: str, scheme: str) -> None:
    result = fused(kind, implementation, scheme, LAYERS)
    assert result.report.matches == {ROUTERS[kind]: LAYERS, "fused_moe": LAYERS}, result.report
    assert not [miss for miss in result.report.near_misses if miss.fusion in FUSIONS]
    left = {str(node.target) for node in result.after.graph.nodes}
    assert not left & {f"aten.{name}.default" for name in ("_grouped_mm", "sort", "histc", "topk")}
    for site in result.report.sites:
        assert site.module.startswith("model.layers."), site
        if site.fusion == "fused_moe":
            assert implementation.removesuffix("_mm") in site.pattern
            assert ("fp8_block" in site.pattern) == (scheme == "fp8_block")
            assert site.bytes_saved_here > 0
    assert_close(result, scheme)


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_tokens_go_to_the_experts_that_eager_sends_them_to(kind: str, scheme: str) -> None:
    model = build(kind, "grouped_mm", scheme, LAYERS)
    result = fused(kind, "grouped_mm", scheme, LAYERS, count=65)
    top_k = model.config.num_experts_per_tok
    inputs = result.before.meta["inputs"]
    before, after = (routes(side, inputs, top_k) for side in (result.before, result.after))
    assert before.shape == (LAYERS, 65, top_k)
    assert torch.equal(before[0], after[0]), "nothing before the first router is rewritten"
    flipped = float((before != after).any(-1).float().mean())
    # FP8: eager rounds the dequantized operands of the first block to 16 bits, the kernel does not
    assert flipped <= (0.0 if scheme == "bf16" else 0.05), f"{flipped:.1%} of the tokens"


@pytest.mark.parametrize(
    ("kind", "router"),
    [
        ("afmoe", "topk_sigmoid"),
        ("cohere2_moe", "topk_softmax"),
        ("deepseek_v2", "grouped_topk"),
        ("deepseek_v32", "grouped_topk"),
        ("dots1", "grouped_topk"),
        ("ernie4_5_moe", "topk_softmax"),
        ("exaone_moe", "grouped_topk"),
        ("flex_olmo", "topk_softmax"),
        ("gemma4_text", "topk_softmax"),
        ("glm4_moe", "grouped_topk"),
        ("glm4_moe_lite", "grouped_topk"),
        ("granitemoe", "topk_softmax"),
        ("granitemoehybrid", "topk_softmax"),
        ("granitemoeshared", "topk_softmax"),
        ("hunyuan_v1_moe", "topk_softmax"),
        ("hy_v3", "topk_sigmoid"),
        ("jamba", "topk_softmax"),
        ("kimi_linear", "grouped_topk"),
        ("laguna", "topk_sigmoid"),
        ("lfm2_moe", "topk_sigmoid"),
        ("mellum", "topk_softmax"),
        ("mimo_v2_flash", "grouped_topk"),
        ("minimax", "topk_softmax"),
        ("minimax_m2", "topk_sigmoid"),
        ("nemotron_h", "grouped_topk"),
        ("olmoe", "topk_softmax"),
        ("qwen2_moe", "topk_softmax"),
        ("qwen3_5_moe_text", "topk_softmax"),
        ("qwen3_next", "topk_softmax"),
        ("solar_open", "grouped_topk"),
    ],
)
def test_models_that_no_walk_was_written_for(kind: str, router: str) -> None:
    result = fused(kind, "grouped_mm", "bf16", 1, count=7)
    assert result.report.matches == {router: 1, "fused_moe": 1}, result.report
    assert_close(result)


@pytest.mark.parametrize(
    ("kind", "matches", "reason"),
    [
        ("phimoe", {"fused_moe": 1}, r"the top-k ids are made by cat \(cat\w*\), where topk is"),
        ("zaya", {"fused_moe": 1}, r"the top-k ids are made by where \(where\w*\), where topk is"),
        (
            "deepseek_v4",
            {"fused_moe": 1},
            r"the top-k ids are made by index \(index\w*\), where topk is",
        ),
    ],
)
def test_what_does_not_fuse_is_reported(kind: str, matches: dict[str, int], reason: str) -> None:
    """A router of another kind leaves the experts to be fused; experts of another kind stay."""
    result = fused(kind, "grouped_mm", "bf16", 1, count=7)
    assert result.report.matches == matches
    misses = [miss for miss in result.report.near_misses if miss.fusion in FUSIONS]
    assert any(re.search(reason, miss.reason) for miss in misses), misses
    assert all(miss.module for miss in misses)
    assert_close(result)


@pytest.mark.parametrize("top_k", [1, TOP_K])
@pytest.mark.parametrize("count", [1, 7])
def test_llama_4_computes_the_chosen_experts_alone(count: int, top_k: int) -> None:
    """Its stock code multiplies all tokens with all experts, most of them by weights of 0."""
    model = build("llama4_text", None, "bf16", LAYERS, num_experts_per_tok=top_k)
    only = [registry()[name] for name in FUSIONS]
    result = fuse(model, tokens(count), use_cache=False, only=only)
    assert result.report.matches == {"fused_moe": LAYERS, "topk_sigmoid": LAYERS}, result.report
    for site in result.report.sites:
        assert site.fusion != "fused_moe" or site.pattern.startswith("dense")
    left = {str(node.target) for node in result.after.graph.nodes}
    assert not left & {"aten.scatter.src", "aten.repeat.default"}, left
    assert_close(result)


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_with_a_clamped_gate(implementation: str, scheme: str) -> None:
    """DeepSeek-V4, of which two layers choose experts by the id of a token, and two by their scores."""
    for layer in ("hash_moe", "moe"):
        model = build("deepseek_v4", implementation, scheme, LAYERS, mlp_layer_types=layer)
        only = [registry()[name] for name in FUSIONS]
        result = fuse(model, tokens(7), use_cache=False, only=only)
        assert result.report.matches == {"fused_moe": LAYERS}, result.report
        for site in result.report.sites:
            assert "clamped_silu_mul" in site.pattern
        for node in result.after.graph.nodes:
            if "fused_moe" in str(node.target):
                assert node.kwargs["limit"] == 0.5
        assert_close(result, scheme)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_fuse_without_their_router(implementation: str) -> None:
    only = [registry()["fused_moe"]]
    model = build("deepseek_v3", implementation, "bf16", LAYERS)
    result = fuse(model, tokens(7), use_cache=False, only=only)
    assert result.report.matches == {"fused_moe": LAYERS}
    assert_close(result)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_routers_fuse_without_their_experts(implementation: str) -> None:
    only = [registry()["grouped_topk"]]
    model = build("deepseek_v3", implementation, "bf16", LAYERS)
    result = fuse(model, tokens(7), use_cache=False, only=only)
    assert result.report.matches == {"grouped_topk": LAYERS}
    assert_close(result)


def test_float16() -> None:
    """transformers has an operator of its own for it, as _grouped_mm compiles for bfloat16 alone."""
    model = copy.deepcopy(build("qwen3_moe", "grouped_mm", "bf16", 1)).half()
    result = fuse(model, tokens(7), use_cache=False, only=[registry()[name] for name in FUSIONS])
    assert any("grouped_mm_fallback" in str(node.target) for node in result.before.graph.nodes)
    assert result.report.matches == {"topk_softmax": 1, "fused_moe": 1}, result.report
    assert_close(result)


@pytest.mark.parametrize("count", [1, 2, 33])
@pytest.mark.parametrize("kind", ROUTERS)
def test_any_number_of_tokens(kind: str, count: int) -> None:
    result = fused(kind, "grouped_mm", "bf16", LAYERS, count=count)
    assert result.report.matches == {ROUTERS[kind]: LAYERS, "fused_moe": LAYERS}, result.report
    assert_close(result)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_symbolic_tokens(kind: str, implementation: str) -> None:
    result = fused(kind, implementation, "bf16", LAYERS, dynamic=True)
    assert result.report.matches == {ROUTERS[kind]: LAYERS, "fused_moe": LAYERS}, result.report
    (site, *_) = [site for site in result.report.sites if site.fusion == "fused_moe"]
    assert site.sizes["num_tokens"].startswith("s"), "the number of tokens is no constant"
    saved, here = result.report.bytes_saved["fused_moe"]
    (symbol,) = saved.free_symbols
    assert saved.subs({symbol: 17}) == here
    assert_close(result)


def test_tokens_that_are_marked_dynamic() -> None:
    """And nothing else is: the numbers of gpt-oss' experts stay numbers."""
    ids = tokens(17)
    torch._dynamo.mark_dynamic(ids, 1)
    model = build("gpt_oss", "grouped_mm", "bf16", LAYERS)
    result = fuse(model, ids, use_cache=False, only=[registry()[name] for name in FUSIONS])
    assert result.report.matches == {"topk_softmax": LAYERS, "fused_moe": LAYERS}, result.report
    assert "s" in result.report.sites[-1].sizes["num_tokens"]
    assert_close(result)


def test_numbers_that_dynamic_true_leaves_open_are_named() -> None:
    """alpha is an attribute of gpt-oss' experts, which dynamic=True takes for an input."""
    result = fused("gpt_oss", "grouped_mm", "bf16", 1, dynamic=True)
    assert result.report.matches == {"topk_softmax": 1}
    (miss,) = [miss for miss in result.report.near_misses if miss.fusion == "fused_moe"]
    assert "a number in it, is known only at run time" in miss.reason


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_one_line(kind: str) -> None:
    torch.compiler.reset()
    model = build(kind, "grouped_mm", "bf16", LAYERS)
    compiled = torch.compile(model, backend="fusion_passes", options={"fusions": "all"})
    with torch.no_grad():
        expected = model(tokens(17), use_cache=False).logits
        actual = compiled(tokens(17), use_cache=False).logits
    report = fusion_passes.report()
    assert report.matches.items() >= {ROUTERS[kind]: LAYERS, "fused_moe": LAYERS}.items(), report
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    assert error < 0.1, (
        f"logits differ by {error:.3%}"
    )  # Inductor rounds less, and a tie may fall otherwise
    assert (actual.argmax(-1) == expected.argmax(-1)).float().mean() > 0.7


@pytest.mark.slow
def test_dynamic_shapes_take_no_more_graphs_than_stock() -> None:
    from torch._dynamo.testing import CompileCounter

    model, counter = build("qwen3_moe", "grouped_mm", "bf16", LAYERS), CompileCounter()
    lengths = (7, 1, 2, 33)
    with torch.no_grad():
        torch.compiler.reset()
        stock = torch.compile(model, backend=counter, dynamic=True)
        expected = {length: stock(tokens(length), use_cache=False).logits for length in lengths}
        torch.compiler.reset()
        fusion_passes.reset_reports()
        compiled = torch.compile(
            model, backend="fusion_passes", dynamic=True, options={"fusions": "all"}
        )
        for length in lengths:
            actual = compiled(tokens(length), use_cache=False).logits
            error = float(
                (actual - expected[length]).double().norm() / expected[length].double().norm()
            )
            assert error < 0.1, f"{length} tokens: logits differ by {error:.3%}"
    reports = fusion_passes.reports()
    assert len(reports) <= counter.frame_count
    for report in reports:
        assert report.matches.items() >= {"topk_softmax": LAYERS, "fused_moe": LAYERS}.items()


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
def test_every_rewrite_verified_on_the_spot(scheme: str) -> None:
    """Random ids below the number of experts: ``verify="raise"`` would not forgive others."""
    from fusion_passes import manager, settings, torch_internals

    model = build("deepseek_v3", "grouped_mm", scheme, 1)
    (graph,) = torch_internals.capture(model, tokens(7), use_cache=False)
    chosen = settings.current().model_copy(update={"allow_reference": True, "verify": "raise"})
    report = manager.run(graph.graph, chosen, [registry()[name] for name in FUSIONS])
    assert report.matches == {"grouped_topk": 1, "fused_moe": 1}, report


# ---- config._experts_implementation = "fusion_passes" -------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
@pytest.mark.parametrize("kind", [*ROUTERS, "nemotron_h", "gemma4_text", "deepseek_v4"])
def test_as_an_experts_implementation(kind: str, scheme: str) -> None:
    """Eagerly and compiled by any backend, in one graph."""
    model = build(kind, "grouped_mm", scheme, 1)
    ids = tokens(7)
    configs = [m.config for m in model.modules() if hasattr(m, "config")]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        try:
            for config in configs:
                config._experts_implementation = "fusion_passes"
            torch.compiler.reset()
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            actual = [run(ids, use_cache=False).logits for run in (compiled, model)]
        finally:
            for config in configs:
                config._experts_implementation = "grouped_mm"
            torch.compiler.reset()
    assert torch.equal(*actual)
    error = float((actual[0] - expected).double().norm() / expected.double().norm())
    assert error < (0.01 if scheme == "bf16" else 0.05), f"logits differ by {error:.3%}"


def test_an_unknown_activation_is_an_error() -> None:
    model = build("qwen3_moe", "fusion_passes", "bf16", 1, hidden_act="tanh")
    with pytest.raises(ValueError, match="the activation of Qwen3MoeExperts is not supported"):
        model(tokens(7), use_cache=False)


@pytest.mark.parametrize(
    "imports",
    [
        "import fusion_passes; assert 'transformers' not in sys.modules; import transformers",
        "import transformers.integrations.moe; import fusion_passes",
        "import transformers; import fusion_passes",
    ],
)
def test_it_is_registered_in_either_order_of_imports(imports: str) -> None:
    code = f"import sys; {imports}; from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as known; "
    code += "print('fusion_passes' in known)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout.strip() == "True", run.stderr[-2000:]
