"""PEFT over model classes and options besides Llama's: each adapter fuses, or the report says why it does not.

Whatever happens, the logits are eager's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_passes import registry, verify
from fusion_passes.testing import fuse

pytest.importorskip("transformers", reason="needs the extra 'models'")
peft = pytest.importorskip("peft", reason="needs the extra 'models'")

pytestmark = [
    pytest.mark.usefixtures("references"),
    pytest.mark.filterwarnings("ignore:.*(fan_in_fan_out|pattern keys|lora_bias|tied).*"),
]
VOCABULARY = 128
SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
GPT2 = {"n_embd": 64, "n_head": 4, "n_positions": 64}
# the sizes by their names in each class, and the adapters of a layer
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "bloom": ({"hidden_size": 64, "n_head": 4}, 4),
    "cohere": (SIZES, 7),
    "falcon": ({"hidden_size": 64, "num_attention_heads": 4}, 4),
    "gemma": (SIZES, 7),
    "gemma2": (SIZES, 7),
    "gpt2": (GPT2, 4),  # Conv1D, whose weight is transposed
    "gpt_neox": ({"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}, 4),
    "gptj": ({**GPT2, "rotary_dim": 16}, 6),
    "mistral": (SIZES, 7),
    "opt": ({"hidden_size": 64, "ffn_dim": 128, "num_attention_heads": 4, "word_embed_proj_dim": 64}, 6),
    "phi3": (SIZES, 4),  # q, k and v are one linear, gate and up another
    "qwen2": (SIZES, 7),  # biases on q, k and v
}  # fmt: skip


def causal(kind: str) -> nn.Module:
    """A causal language model of one layer, random and in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    layers = "n_layer" if kind in ("gpt2", "gptj", "bloom") else "num_hidden_layers"
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **{layers: 1}, **KINDS[kind][0], **tokens)
    return AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


def adapted(model: nn.Module, float32: bool = True, **options: Any) -> Any:
    config = {"r": 8, "lora_alpha": 24, "init_lora_weights": False, "target_modules": "all-linear"}
    lora = peft.LoraConfig(**{**config, **options})
    return peft.get_peft_model(model, lora, autocast_adapter_dtype=float32).eval()


def fused(model: Any) -> Any:
    """What the LoRA fusions make of a step; its logits are eager's bit for bit, as references compute as eager does."""
    only = [fusion for name, fusion in registry().items() if "lora" in name]
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(0, VOCABULARY, (1, 7), generator=generator)
    result = fuse(model.requires_grad_(False), tokens, use_cache=False, only=only)
    assert verify.difference(result.expected[0], result.actual[0]) is None
    assert torch.equal(result.expected[0], result.actual[0])
    return result


def reasons(result: Any) -> set[str]:
    return {m.reason for m in result.report.near_misses if m.fusion == "lora_linear"}


@pytest.mark.parametrize("float32", [True, False], ids=["float32 adapter", "16-bit adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_of_a_class_is_found(kind: str, float32: bool) -> None:
    result = fused(adapted(causal(kind), float32))
    assert result.report.matches["lora_linear"] == KINDS[kind][1]
    assert not reasons(result)


class Branches(nn.Module):
    """A model that nobody has trained: two linears in a row, and one beside them, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.up, self.beside = nn.Linear(32, 64), nn.Linear(32, 48)
        self.down = nn.Linear(64, 48, bias=False)

    def forward(self, tokens: Tensor, use_cache: bool = False) -> Tensor:
        x = self.embed(tokens)
        return self.down(torch.nn.functional.gelu(self.up(x))) + self.beside(x)


def branches(float32: bool, **options: Any) -> Any:
    torch.manual_seed(0)
    names = ["up", "beside", "down"]
    return adapted(Branches().bfloat16(), float32, target_modules=names, **options)


def several(float32: bool, active: list[str], **options: Any) -> Any:
    """Two adapters of all linears, of which some are active."""
    model = adapted(causal("mistral"), float32)
    config = peft.LoraConfig(
        **{"r": 4, "init_lora_weights": False, "target_modules": "all-linear", **options}
    )
    model.add_adapter("second", config, autocast_adapter_dtype=float32)
    model.base_model.set_adapter(active)
    return model


def with_biases(float32: bool) -> Any:
    model = adapted(causal("qwen2"), float32, bias="lora_only")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = torch.randn_like(parameter)
    return model


def merged(float32: bool) -> Any:
    model = adapted(causal("mistral"), float32)
    model.merge_adapter()
    return model


def one_merged(float32: bool) -> Any:
    model = several(float32, ["default", "second"])
    model.merge_adapter(["second"])
    model.base_model.set_adapter("default")
    return model


def disabled(float32: bool) -> Any:
    model = adapted(causal("mistral"), float32)
    model.base_model.disable_adapter_layers()
    return model


def with_embedding(float32: bool) -> Any:
    model = adapted(causal("mistral"), float32, target_modules=["embed_tokens", "q_proj"])
    for name, parameter in model.named_parameters():
        if "lora_embedding" in name:  # B starts as zeros
            parameter.data = torch.randn_like(parameter)
    return model


def mistral(**options: Any) -> Callable[[bool], Any]:
    return lambda float32: adapted(causal("mistral"), float32, **options)


PATTERNS = {"rank_pattern": {"q_proj": 3, "down_proj": 16}, "alpha_pattern": {"k_proj": 1}}
# how the model is made, and how many adapters are found
OPTIONS: dict[str, tuple[Callable[[bool], Any], int]] = {
    "a model of one's own": (branches, 3),
    "rank 1 in it": (lambda float32: branches(float32, r=1), 3),
    "no scaling in it": (lambda float32: branches(float32, lora_alpha=8), 3),
    "rank_pattern and alpha_pattern": (mistral(**PATTERNS), 7),
    "a negative scaling": (mistral(lora_alpha=-8), 7),
    "a scaling of zero": (mistral(lora_alpha=0), 7),
    "bias='lora_only'": (with_biases, 7),
    "dropout, which eval leaves out": (mistral(lora_dropout=0.4), 7),
    "layers_to_transform": (mistral(layers_to_transform=[0], target_modules=["q_proj"]), 1),
    "the head": (mistral(target_modules=["lm_head", "q_proj"]), 2),
    "modules_to_save": (mistral(target_modules=["q_proj"], modules_to_save=["lm_head"]), 1),
    "an embedding, which is no linear": (with_embedding, 1),
    "the second of two": (lambda float32: several(float32, ["second"]), 7),
    "one of two merged": (one_merged, 7),
    "merged": (merged, 0),
    "disabled": (disabled, 0),
}


@pytest.mark.parametrize("float32", [True, False], ids=["float32 adapter", "16-bit adapter"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_peft(name: str, float32: bool) -> None:
    make, expected = OPTIONS[name]
    result = fused(make(float32))
    assert result.report.matches.get("lora_linear", 0) == expected
    assert not reasons(result)


@pytest.mark.parametrize("rank", [4, 8])
def test_two_active_adapters_of_16_bits(rank: int) -> None:
    """base + first + second: the second is added to what the first has made."""
    result = fused(several(False, ["default", "second"], r=rank))
    assert result.report.matches["lora_linear"] == 14


def test_two_active_adapters_of_float32_stay_and_say_why() -> None:
    """Their sum is rounded once, after both, which an op for each would not do."""
    result = fused(several(True, ["default", "second"]))
    assert "lora_linear" not in result.report.matches
    assert any("where the fusion expects cast" in reason for reason in reasons(result))


REFUSED = {
    "lora_bias": ({"lora_bias": True}, "lora_B of the adapter has a bias (lora_bias)"),
    "a rank above 256": ({"r": 300}, "the rank of the adapter is 300; supported: 1 to 256"),
}


@pytest.mark.parametrize("float32", [True, False], ids=["float32 adapter", "16-bit adapter"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name: str, float32: bool) -> None:
    options, reason = REFUSED[name]
    result = fused(branches(float32, **options))
    assert "lora_linear" not in result.report.matches
    assert reason in reasons(result)


def test_a_float32_model_is_left_alone() -> None:
    assert not fused(adapted(causal("mistral").float())).report.matches


@pytest.mark.parametrize("float32", [True, False], ids=["float32 adapter", "16-bit adapter"])
def test_float16(float32: bool) -> None:
    result = fused(adapted(causal("mistral").half(), float32))
    assert result.report.matches["lora_linear"] == 7
