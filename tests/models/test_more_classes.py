"""Stock classes that nobody had in mind: what fires in them, and that the result is as near to float64 as eager's.

Found by running every causal language model of transformers, and some encoders, through the passes: these are the ones
whose spelling differs from that of the models in `test_stock_models` and `test_moe`.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fusion_passes
from fusion_passes.testing import fuse

transformers = pytest.importorskip("transformers", reason="needs the extra 'models'")
pytestmark = pytest.mark.usefixtures("references")

WIDTH = {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
SEQ2SEQ = {
    "d_model": 256, "d_ff": 512, "d_kv": 64, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4,
    "vocab_size": 128, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
WHISPER = {
    "d_model": 256, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "vocab_size": 128,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "max_source_positions": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
ARIA = {"moe_num_experts": 12, "moe_topk": 3, "moe_num_shared_experts": 1, "intermediate_size": 128}
GEMMA4 = {
    "num_experts": 12,
    "top_k_experts": 3,
    "enable_moe_block": True,
    "layer_types": ["full_attention"] * 2,
}
MINIMAX = {"num_local_experts": 12, "num_experts_per_tok": 3}
PLAIN = {"num_experts": 12, "num_experts_per_tok": 3}


def build(kind: str, scheme: str, implementation: str | None = None, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(settings if "d_model" in settings else WIDTH | settings)
    try:
        config = transformers.AutoConfig.for_model(kind, **sizes)
    except ValueError as error:
        pytest.skip(f"needs a transformers with {kind}: {error}"[:200])
    factories = {
        "t5": transformers.AutoModelForSeq2SeqLM, "whisper": transformers.AutoModel, "vit": transformers.AutoModel,
        "modernbert": transformers.AutoModel,
    }  # fmt: skip
    given = {} if implementation is None else {"experts_implementation": implementation}
    factory = factories.get(kind, transformers.AutoModelForCausalLM)
    try:
        model = factory.from_config(config, **given).eval().requires_grad_(False)
    except ValueError as error:
        pytest.skip(f"needs a {kind} of a transformers that takes {implementation}: {error}"[:200])
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name and value.is_floating_point():  # constant in a fresh model
            value.data += 0.1 * torch.randn_like(value)
        elif value.dim() == 3 and "experts" in name:
            value.data = torch.randn_like(value) * value.shape[-1] ** -0.5
        elif value.dim() == 2 and value.shape[0] == 12:  # a router: scores that differ
            value.data = 0.3 * torch.randn_like(value)
    model = model.to(torch.bfloat16)
    if scheme == "bf16":
        return model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "quantize_ leaves")  # T5 reads the weight of wo
        return fusion_passes.quantize_(model, scheme)


def inputs_of(model: nn.Module) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 128, (1, 7), generator=generator)
    kind = model.config.model_type
    if kind == "vit":
        return {"pixel_values": torch.randn(1, 3, 32, 32, generator=generator).bfloat16()}
    if kind == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids[:, :4], "use_cache": False}
    if kind == "whisper":
        features = torch.randn(1, model.config.num_mel_bins, 32, generator=generator).bfloat16()
        return {"input_features": features, "decoder_input_ids": ids, "use_cache": False}
    return {"input_ids": ids} if kind == "modernbert" else {"input_ids": ids, "use_cache": False}


NORM, ADD, QUANT = "rms_norm_group_quant", "add_rms_norm_group_quant", "group_quant"
LINEAR, SHARED, MOE = "block_scaled_linear", "shared_group_quant", "fused_moe"

DENSE = [
    ("nanochat", {}, {NORM: 1, ADD: 3, LINEAR: 12, SHARED: 4}),  # norms without a weight; squared ReLU
    ("arcee", {}, {NORM: 1, ADD: 3, LINEAR: 12, SHARED: 4}),
    ("exaone4", {}, {"silu_mul_group_quant": 2, LINEAR: 14, SHARED: 6}),  # norms after the linears
    ("t5", SEQ2SEQ, {NORM: 2, ADD: 6, LINEAR: 19, SHARED: 7}),  # norms that widen by promotion
    ("gemma4_unified_text", {}, {"gelu_tanh_mul_group_quant": 2, NORM: 2, ADD: 2, LINEAR: 14}),  # roots by a power
    ("modernbert", {}, {LINEAR: 8, QUANT: 8}),  # LayerNorm, here and below: nothing to fuse before a quantization
    ("whisper", WHISPER, {LINEAR: 16, SHARED: 5}),
    ("vit", {"image_size": 32, "patch_size": 16}, {LINEAR: 13, SHARED: 4}),
]  # fmt: skip


def assert_near(result: Any) -> None:
    """No further from float64 than eager, but for one draw of rounding errors against another."""
    for actual, eager, judge in zip(result.actual, result.expected, result.judge, strict=True):
        if not eager.is_floating_point():
            assert torch.equal(actual, eager)
            continue
        norm = judge.double().norm()
        ours, eagers = (
            float((side.double() - judge.double()).norm() / norm) for side in (actual, eager)
        )
        assert ours <= 1.25 * eagers + 1e-3, f"{ours:.4f} from float64, eager {eagers:.4f}"


def fused(model: nn.Module) -> Any:
    return fuse(model, **inputs_of(model), only=list(fusion_passes.registry().values()))


@pytest.mark.parametrize(("kind", "settings", "expected"), DENSE, ids=[case[0] for case in DENSE])
def test_dense(kind: str, settings: dict[str, Any], expected: dict[str, int]) -> None:
    result = fused(build(kind, "fp8_block", **settings))
    assert expected.items() <= result.report.matches.items(), result.report
    assert not [miss for miss in result.report.near_misses if miss.fusion.endswith("linear")]
    assert_near(result)


MIXTURES = [
    ("aria_text", ARIA, "topk_softmax"),
    ("gemma4_text", GEMMA4, "topk_softmax"),
    ("minimax_m3_vl_text", MINIMAX, "topk_sigmoid"),
    ("granitemoe_swa", MINIMAX, "topk_softmax"),
    ("kolibri1", PLAIN, "topk_sigmoid"),
]


@pytest.mark.parametrize(
    ("kind", "settings", "router"), MIXTURES, ids=[case[0] for case in MIXTURES]
)
@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
def test_mixtures_of_experts(kind: str, settings: dict[str, Any], router: str, scheme: str) -> None:
    result = fused(build(kind, scheme, "grouped_mm", **{**settings, "num_hidden_layers": 2}))
    found = result.report.matches
    assert (found[MOE], found[router]) == (2, 2), result.report
    assert not [miss for miss in result.report.near_misses if miss.fusion in (MOE, router)]
    if scheme == "bf16":  # FP8 sends tokens near a tie to other experts
        assert_near(result)


def test_what_a_model_reads_of_a_linear_stays_as_it_is() -> None:
    """Mamba multiplies by the weight of a linear; quantized, it would be codes without their scales."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "mamba", hidden_size=128, num_hidden_layers=1, vocab_size=64
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    ids = torch.arange(3, 9).unsqueeze(0)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with pytest.warns(UserWarning, match="MambaMixer reads its weight"):
            fusion_passes.quantize_(model, "fp8_block")
        actual = model(ids, use_cache=False).logits
    assert float((actual - expected).float().norm() / expected.float().norm()) < 0.1
