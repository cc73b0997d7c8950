"""quantize_ on modules of experts: which ones, their tensors, and what they compute in each way of running them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusion_passes
from fusion_passes import quantize, quantize_experts
from fusion_passes.quantize_experts import Fp8BlockExperts, dequantize, round_trip
from tests.models.moe_zoo import EXPERTS, build, tokens

pytest.importorskip("transformers", reason="needs the extra 'models'")
pytestmark = pytest.mark.usefixtures("references")


def experts_of(
    kind: str, implementation: str = "grouped_mm", **changes
) -> tuple[nn.Module, nn.Module]:
    """A module of experts of a stock model, and a copy of it that is quantized."""
    model = build(kind, implementation, "bf16", 1, **changes)
    ((_, stock),) = quantize_experts.experts_of(model)
    return stock, Fp8BlockExperts(copy.deepcopy(stock))


def arguments(width: int = 128, count: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    weights, ids = torch.randn(count, EXPERTS, generator=generator).softmax(-1).topk(3)
    x = torch.randn(count, width, generator=generator).bfloat16()
    return x, ids, weights


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_weights_are_one_expert_after_the_other(kind):
    stock, quantized = experts_of(kind)
    for name in (quantized.first, "down_proj"):
        weight = getattr(stock, name)
        weight = weight.transpose(1, 2) if stock.is_transposed else weight
        codes, scale = getattr(quantized, name), getattr(quantized, f"{name}_scale_inv")
        assert codes.dtype is torch.float8_e4m3fn
        assert codes.shape == weight.shape
        assert codes.is_contiguous()
        assert scale.shape == (weight.shape[0], *(-(-size // 128) for size in weight.shape[1:]))
        for expert in range(weight.shape[0]):
            expected = quantize.quantize_weight(weight[expert])
            assert torch.equal(codes[expert].float(), expected[0].float())
            assert torch.equal(scale[expert], expected[1])
        assert difference(dequantize(codes, scale, torch.bfloat16), weight) < 0.04
    names = {name for name, _ in quantized.named_buffers()}
    biased = {"gate_up_proj_bias", "down_proj_bias"}
    assert biased <= names if kind == "gpt_oss" else not biased & names
    assert not list(quantized.parameters())


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_every_way_of_running_them_computes_the_same(kind):
    _, quantized = experts_of(kind)
    config, results = quantized.config, {}
    try:
        for name in ("eager", "grouped_mm", "batched_mm", "fusion_passes"):
            config._experts_implementation = name
            with torch.no_grad():
                results[name] = quantized(*arguments())
    finally:
        config._experts_implementation = "grouped_mm"
    assert torch.equal(results["grouped_mm"], results["eager"])
    assert difference(results["batched_mm"], results["eager"]) < 1e-3
    # the kernel does not round the operands that eager dequantizes
    assert difference(results["fusion_passes"], results["eager"]) < 2.0**-5
    for result in results.values():
        assert result.dtype is torch.bfloat16
        assert result.shape == (9, 128)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_it_is_the_arithmetic_that_it_says(kind):
    """Operands quantized, dequantized, rounded to bfloat16, multiplied; written out by hand."""
    stock, quantized = experts_of(kind)
    x, ids, weights = arguments()
    parts = []
    for token in range(x.shape[0]):
        total = torch.zeros(1, x.shape[1])
        for k in range(ids.shape[1]):
            expert = int(ids[token, k])
            row = round_trip(x[token : token + 1])
            for name in (quantized.first, "down_proj"):
                codes, scale = getattr(quantized, name), getattr(quantized, f"{name}_scale_inv")
                weight = dequantize(codes, scale, torch.bfloat16)[expert]
                bias = getattr(quantized, f"{name}_bias")
                row = F.linear(row, weight)
                row = row if bias is None else row + bias[expert]
                row = round_trip(stock._apply_gate(row)) if name != "down_proj" else row
            total = total + row * weights[token, k]
        parts.append(total.bfloat16())
    with torch.no_grad():
        assert difference(quantized(x, ids, weights), torch.cat(parts)) < 2.0**-8


@pytest.mark.parametrize("width", [64, 200])
def test_sizes_that_blocks_do_not_divide(width):
    stock, quantized = experts_of(
        "qwen3_moe", moe_intermediate_size=width, hidden_size=192, num_attention_heads=3
    )
    x, ids, weights = arguments(192)
    with torch.no_grad():
        expected, actual = stock(x, ids, weights), quantized(x, ids, weights)
        fused = quantized._fused(x, ids, weights)
    assert quantized.down_proj_scale_inv.shape == (EXPERTS, 2, -(-width // 128))
    assert difference(actual, expected) < 0.1
    assert difference(fused, actual) < 2.0**-5


def test_experts_elsewhere_add_nothing():
    _, quantized = experts_of("qwen3_moe", "eager")
    x, ids, weights = arguments()
    ids[:, 1] = EXPERTS
    with torch.no_grad():
        assert torch.equal(quantized(x, ids, weights * (ids < EXPERTS)), quantized(x, ids, weights))


# ---- quantize_ ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "router"),
    [("qwen3_moe", None), ("afmoe", "mlp.router.gate"), ("gemma4_text", "router.proj")],
)  # fmt: skip
def test_routers_keep_16_bits(kind, router):
    model = copy.deepcopy(build(kind, "grouped_mm", "bf16", 2))
    names = quantize_experts.routers_of(model)
    fusion_passes.quantize_(model, "fp8_block")
    assert sum(isinstance(module, Fp8BlockExperts) for module in model.modules()) == 2
    assert not list(quantize_experts.experts_of(model)), "none is left"
    if router is None:  # no linear: a weight of its own
        assert model.model.layers[0].mlp.gate.weight.dtype is torch.bfloat16
    else:
        assert names == {f"model.layers.{layer}.{router}" for layer in range(2)}
        assert type(model.get_submodule(f"model.layers.0.{router}")) is nn.Linear
    assert type(model.lm_head) is nn.Linear
    with torch.no_grad():
        assert model(tokens(5), use_cache=False).logits.isfinite().all()


def test_the_weight_of_shared_experts_keeps_16_bits():
    model = copy.deepcopy(build("qwen2_moe", "grouped_mm", "bf16", 1))
    fusion_passes.quantize_(model, "fp8_block")
    mlp = model.model.layers[0].mlp
    assert type(mlp.shared_expert_gate) is nn.Linear
    assert isinstance(mlp.shared_expert.gate_proj, quantize.Fp8BlockLinear)


def test_a_filter_is_asked_about_experts():
    model = copy.deepcopy(build("qwen3_moe", "grouped_mm", "bf16", 2))
    asked = []
    fusion_passes.quantize_(
        model, filter=lambda name, module: bool(asked.append(name)) or "layers.1" in name
    )
    assert "model.layers.0.mlp.experts" in asked
    kinds = [isinstance(layer.mlp.experts, Fp8BlockExperts) for layer in model.model.layers]
    assert kinds == [False, True]


@pytest.mark.parametrize("scheme", ["fp8_token", "int8_token"])
def test_other_schemes_leave_experts(scheme):
    model = copy.deepcopy(build("qwen3_moe", "grouped_mm", "bf16", 1))
    fusion_passes.quantize_(model, scheme)
    assert len(list(quantize_experts.experts_of(model))) == 1


def test_nothing_is_replaced_unless_everything_can_be():
    model = copy.deepcopy(build("qwen3_moe", "grouped_mm", "bf16", 1))
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.float(), requires_grad=False)
    with pytest.raises(ValueError, match=r"mlp\.experts\.down_proj is torch\.float32; accepted"):
        fusion_passes.quantize_(model, "fp8_block")
    assert not any(isinstance(m, quantize.Fp8BlockLinear) for m in model.modules())


def test_experts_alone_are_no_model():
    stock, _ = experts_of("qwen3_moe")
    with pytest.raises(ValueError, match=r"use Fp8BlockExperts\(model\)"):
        fusion_passes.quantize_(stock, "fp8_block")


# ---- checkpoints --------------------------------------------------------------------------------------------------


def per_expert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As DeepSeek-V3 and Qwen3-MoE FP8 checkpoints have them: tensors of each expert."""
    found = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        product, _, scale = (
            last.partition("_scale_inv") if "_scale_inv" in last else (last, "", None)
        )
        kind = "weight" if scale is None else "weight_scale_inv"
        if not prefix.endswith("experts"):
            found[name] = tensor
            continue
        for expert, rows in enumerate(tensor):
            if product == "gate_up_proj":
                for half, part in zip(
                    ("gate_proj", "up_proj"),
                    rows.view(torch.uint8).chunk(2) if rows.element_size() == 1 else rows.chunk(2),
                ):
                    found[f"{prefix}.{expert}.{half}.{kind}"] = part.view(rows.dtype).clone()
            else:
                found[f"{prefix}.{expert}.{product}.{kind}"] = rows.clone()
    return found


@pytest.mark.parametrize("apart", [False, True])
def test_checkpoints(apart):
    source = copy.deepcopy(build("qwen3_moe", "grouped_mm", "fp8_block", 2))
    target = copy.deepcopy(source)
    for buffer in target.buffers():
        buffer.zero_()
    tensors = source.state_dict()
    names = per_expert(tensors) if apart else tensors
    if apart:
        assert names["model.layers.1.mlp.experts.5.up_proj.weight_scale_inv"].shape == (1, 1)
        assert names["model.layers.1.mlp.experts.5.up_proj.weight"].dtype is torch.float8_e4m3fn
    quantize.load_fp8_block_(target, names)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor.float(), tensors[name].float()), name


def test_a_checkpoint_that_lacks_an_expert():
    model = copy.deepcopy(build("qwen3_moe", "grouped_mm", "fp8_block", 1))
    names = per_expert(model.state_dict())
    del names["model.layers.0.mlp.experts.7.up_proj.weight"]
    with pytest.raises(KeyError, match=r"experts\.7\.up_proj\.weight"):
        quantize.load_fp8_block_(model, names)


def test_a_checkpoint_whose_blocks_cannot_be_joined():
    model = build("qwen3_moe", "grouped_mm", "bf16", 1, moe_intermediate_size=200)
    model = fusion_passes.quantize_(copy.deepcopy(model), "fp8_block")
    prefix = "model.layers.0.mlp.experts"
    tensors = {f"{prefix}.0.down_proj.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="gate_proj has 200 rows; accepted"):
        quantize.load_fp8_block_(model, tensors)


def test_a_cast_of_the_model_leaves_codes_and_scales():
    _, experts = experts_of("gpt_oss")
    coded = {n: t.dtype for n, t in experts.state_dict().items() if not n.endswith("bias")}
    assert {torch.float8_e4m3fn, torch.float32} == {*coded.values()}
    experts.half()
    after = {name: tensor.dtype for name, tensor in experts.state_dict().items()}
    assert coded.items() <= after.items()
    assert {dtype for name, dtype in after.items() if name.endswith("bias")} == {torch.float16}
    x, ids, weights = arguments()
    assert experts(x.half(), ids, weights.half()).dtype == torch.float16


def test_gradients_go_through_as_through_the_weights():
    stock, experts = experts_of("qwen3_moe")
    x, ids, weights = arguments()
    found = []
    for module in (stock, experts):
        leaf = x.clone().requires_grad_()
        (module(leaf, ids, weights.bfloat16()).float() * 1e-4).sum().backward()
        found.append(leaf.grad)
    assert difference(found[1], found[0]) < 0.1
