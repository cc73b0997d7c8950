"""Classes that transformers has since 5.0, and towers whose patches are transposed: its whole registry was run.

Each is run in block FP8 as in `test_whole_models`; what does not fuse has to say why.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_passes
from fusion_passes.testing import Result, fuse_graphs
from tests.models.test_more_classes import assert_near
from tests.models.test_whole_models import SIGHT, TEXT, linears_run, pixels, words

transformers = pytest.importorskip("transformers", reason="needs the extra 'models'")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("references")]

LATENT = {
    "q_lora_rank": 128, "kv_lora_rank": 128, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64,
    "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
ROUTED = {
    "n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "moe_intermediate_size": 128, "first_k_dense_replace": 1,
}  # fmt: skip
CLAMPED = ROUTED | LATENT | {"swiglu_limit": 0.5, "mlp_layer_types": ["dense", "sparse"]}
LOCAL = {"num_local_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 128}


def build(name: str, settings: dict[str, Any], scheme: str) -> nn.Module:
    """A model by its class with random weights, its norms and its routers not those of a fresh one."""
    prefix = name.removesuffix("ForCausalLM").removesuffix("Model")
    if not hasattr(transformers, name) or not hasattr(transformers, f"{prefix}Config"):
        pytest.skip(f"needs a transformers with {name}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**settings)
    if "num_experts_per_tok" in settings:
        config._experts_implementation = "grouped_mm"
    model = getattr(transformers, name)(config).eval().requires_grad_(False)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name and value.is_floating_point():
            value.data += 0.1 * torch.randn_like(value)
        elif value.dim() == 3 and "experts" in name:
            value.data = torch.randn_like(value) * value.shape[-1] ** -0.5
        elif value.dim() == 2 and value.shape[0] == 12:
            value.data = 0.3 * torch.randn_like(value)
    model = model.to(torch.bfloat16)
    return model if scheme == "bf16" else fusion_passes.quantize_(model, scheme)


def fused(model: nn.Module, given: dict[str, Any]) -> list[Result]:
    return fuse_graphs(model, **given, only=list(fusion_passes.registry().values()))


def found(results: list[Result]) -> Counter[str]:
    total = Counter[str]()
    for result in results:
        total.update(result.report.matches)
    return total


@pytest.mark.parametrize("name", ["PixtralVisionModel", "Aimv2VisionModel"])
@pytest.mark.parametrize("images", [1, 2])
def test_every_linear_of_a_tower_is_one_product(name: str, images: int) -> None:
    """Their activations are transposed in memory from the first patch on, and their linears batched products."""
    model = build(name, SIGHT, "fp8_block")
    given = {"pixel_values": pixels(images, 3, 32, 32)}
    results = fused(model, given)
    matches = found(results)
    if len(results) == 1:  # a frame of many graphs may be run again
        assert matches["block_scaled_linear"] == linears_run(model, given)
    assert sum(count for fusion, count in matches.items() if "norm_group_quant" in fusion) >= 2
    for result in results:
        assert not [m for m in result.report.near_misses if m.fusion.endswith("linear")]
        assert not [n for n in result.after.graph.nodes if n.target is torch.ops.aten.bmm.default]
        assert_near(result)


MIXTURES = [
    ("Mistral4ForCausalLM", LATENT | ROUTED, {"grouped_topk": 1, "fused_moe": 1}),
    ("OpenAIPrivacyFilterModel", LOCAL, {"topk_softmax": 2, "fused_moe": 2}),
    (
        "Glm5NextTextModel",
        CLAMPED | {"qk_rope_head_dim": 0, "head_dim": 0},
        {"grouped_topk": 1, "fused_moe": 1},
    ),
    ("HYV4ForCausalLM", CLAMPED, {"grouped_topk": 1, "fused_moe": 1}),
]


@pytest.mark.parametrize(
    ("name", "settings", "expected"), MIXTURES, ids=[name for name, *_ in MIXTURES]
)
def test_mixtures_of_experts(name: str, settings: dict[str, Any], expected: dict[str, int]) -> None:
    model = build(name, TEXT | settings, "bf16")
    (result,) = fused(model, {"input_ids": words(7), "use_cache": False})
    assert expected.items() <= result.report.matches.items(), result.report
    assert not [miss for miss in result.report.near_misses if "moe" in miss.fusion]
    assert_near(result)


LEFT = [
    (
        "MuseSparkTextModel",
        LOCAL | {"moe_hidden_size": 128},
        "topk_sigmoid",
        "multiplies the experts' results by .* not one top-k weight for each pair",
    ),
]


@pytest.mark.parametrize(
    ("name", "settings", "router", "why"), LEFT, ids=[name for name, *_ in LEFT]
)
def test_experts_of_another_kind_say_why(
    name: str, settings: dict[str, Any], router: str, why: str
) -> None:
    try:
        model = build(name, TEXT | settings, "bf16")
    except (TypeError, ValueError) as error:
        pytest.skip(f"needs a {name} of these sizes: {error}"[:200])
    results = fused(model, {"input_ids": words(7), "use_cache": False})
    assert found(results)[router] >= 1
    misses = [m for r in results for m in r.report.near_misses if m.fusion == "fused_moe"]
    assert misses
    for miss in misses:
        assert re.search(why, miss.reason), miss
    for result in results:
        assert_near(result)


def test_weights_that_a_model_divides_in_place_keep_16_bits() -> None:
    """RWKV rescales two linears of each block before its first call, in a loop over the blocks."""
    torch.manual_seed(0)
    config = transformers.RwkvConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, vocab_size=64, rescale_every=1
    )
    model = transformers.RwkvForCausalLM(config).to(torch.bfloat16).eval()
    ids: Tensor = words(5) % 64
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "quantize_ leaves .* RwkvModel reads its weight")
        fusion_passes.quantize_(model, "fp8_block")
        assert torch.isfinite(model(ids, use_cache=False).logits).all()
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if "blocks.1" in name}
    assert kinds["rwkv.blocks.1.attention.output"] == "Linear"
    assert kinds["rwkv.blocks.1.attention.key"] == "Fp8BlockLinear"
