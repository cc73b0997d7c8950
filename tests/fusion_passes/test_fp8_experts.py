"""The experts of FP8 checkpoints of transformers (`FP8Experts`), as such a checkpoint makes them, on fused_moe."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fusion_passes import quantize_experts, transformers_experts
from fusion_passes.quantize import quantize_weight
from fusion_passes.quantize_experts import dequantize, round_trip
from tests.models.moe_zoo import EXPERTS, TOP_K, build, tokens

pytest.importorskip("transformers", reason="needs the extra 'models'")
fp8 = pytest.importorskip(
    "transformers.integrations.finegrained_fp8", reason="needs a transformers with FP8Experts"
)
pytestmark = pytest.mark.usefixtures("references")


def checkpoint(kind: str, **config) -> tuple[nn.Module, nn.Module]:
    """A stock model, and one whose experts transformers has replaced for an FP8 checkpoint, with its weights."""
    from transformers import FineGrainedFP8Config

    stock = build(kind, transformers_experts.NAME, "bf16", 1)
    model = copy.deepcopy(stock)
    settings = FineGrainedFP8Config(**config)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    fp8.replace_with_fp8_linear(
        model, modules_to_not_convert=linears, quantization_config=settings, pre_quantized=True
    )
    ((name, plain),) = quantize_experts.experts_of(stock)
    experts = model.get_submodule(name).to_empty(device="cpu").eval().requires_grad_(False)
    assert isinstance(experts, fp8.FP8Experts)
    for product in ("gate_up_proj", "down_proj"):
        codes, scales = zip(*(quantize_weight(each) for each in getattr(plain, product)))
        getattr(experts, product).data = torch.stack(codes)
        getattr(experts, f"{product}_scale_inv").data = torch.stack(scales)
    return stock, model


def experts_of(model: nn.Module):
    return next(m for m in model.modules() if isinstance(m, fp8.FP8Experts))


def drawn(count: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    weights, ids = torch.randn(count, EXPERTS, generator=generator).softmax(-1).topk(TOP_K)
    return torch.randn(count, 128, generator=generator).bfloat16(), ids, weights


def one_by_one(experts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What `FP8Experts.forward` computes, with products of dequantized operands in float32."""
    out = torch.zeros(x.shape)
    first = dequantize(experts.gate_up_proj, experts.gate_up_proj_scale_inv, torch.float32)
    second = dequantize(experts.down_proj, experts.down_proj_scale_inv, torch.float32)
    for token, chosen in enumerate(ids.tolist()):
        for k, expert in enumerate(chosen):
            if expert >= experts.num_experts:
                continue
            row = round_trip(x[token].float())
            between = experts._apply_gate((first[expert] @ row).bfloat16())
            row = (second[expert] @ round_trip(between.float())).bfloat16()
            out[token] += (row * weights[token, k].to(row.dtype)).float()
    return out.to(x.dtype)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "mixtral"])
@pytest.mark.parametrize("count", [1, 9])
def test_they_compute_what_stock_says(kind, count):
    experts = experts_of(checkpoint(kind)[1])
    x, ids, weights = drawn(count)
    with torch.no_grad():
        assert difference(experts(x, ids, weights), one_by_one(experts, x, ids, weights)) < 1e-2


def test_experts_elsewhere_add_nothing():
    experts = experts_of(checkpoint("qwen3_moe")[1])
    x, ids, weights = drawn()
    ids[:, 0] = EXPERTS  # what expert parallelism puts in the place of an expert of another rank
    with torch.no_grad():
        assert difference(experts(x, ids, weights), one_by_one(experts, x, ids, weights)) < 1e-2


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3"])
def test_one_graph_of_the_whole_model(kind):
    from fusion_passes.backend import fusion_passes as backend

    stock, model = checkpoint(kind)
    ids = tokens(9)
    torch.compiler.reset()
    compiled = torch.compile(
        model, backend=backend, fullgraph=True, options={"fusions": "all", "allow_reference": True}
    )
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        actual = compiled(ids, use_cache=False).logits
        quantized = difference(expected, stock(ids, use_cache=False).logits)
    # by token, as a tie between experts may fall to either; and a step of bfloat16 moves a code by up to an eighth
    far = (actual.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    assert float(far.median()) < 0.06
    assert 0 < quantized < 0.15


def test_the_graph_has_the_op():
    _, model = checkpoint("qwen3_moe")
    graphs = []

    def keep(module, inputs):
        graphs.append(module.graph)
        return module.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(tokens(9), use_cache=False)
    (graph,) = graphs
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert sum("fused_moe" in name for name in called) == 1


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"activation_scheme": "static"}, "activation_scheme of .* is static; accepted: dynamic"),
        ({"weight_block_size": (64, 128)}, r"weight_block_size of .* is \(64, 128\); accepted"),
    ],
)
def test_what_is_not_computed_is_refused(config, said):
    experts = experts_of(checkpoint("qwen3_moe", **config)[1])
    with torch.no_grad(), pytest.raises(ValueError, match=said):
        experts(*drawn())


def test_scales_that_are_powers_of_two_are_refused():
    experts = experts_of(checkpoint("qwen3_moe")[1])
    scale = experts.gate_up_proj_scale_inv
    scale.data = torch.ones_like(scale).to(torch.float8_e8m0fnu)
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"scale_inv.dtype of .* is torch.float8_e8m0fnu"),
    ):
        experts(*drawn())
