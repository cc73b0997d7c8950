"""Stock mixtures of experts with random weights, small enough for a CPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

import fusion_passes

SIZES = {
    "hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS, TOP_K = 12, 3
_LOCAL = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
_PLAIN = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
_SHARED = _PLAIN | {"shared_expert_intermediate_size": 128}
_ROUTED = {"n_routed_experts": EXPERTS, "num_experts_per_tok": TOP_K, "n_group": 1, "topk_group": 1}
_GROUPED = _ROUTED | {"n_group": 4, "topk_group": 2}
_LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
_DELTA = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "afmoe": _PLAIN | {"num_dense_layers": 0},
    "cohere2_moe": _PLAIN,
    "deepseek_v2": _GROUPED | _LATENT | {"first_k_dense_replace": 0, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _GROUPED | _LATENT | {"first_k_dense_replace": 0},
    "deepseek_v32": _GROUPED | _LATENT | {"first_k_dense_replace": 0, "index_head_dim": 32, "index_n_heads": 2},
    "deepseek_v4": _ROUTED | {"swiglu_limit": 0.5},  # within the values
    "dots1": _ROUTED | {"n_shared_experts": 1, "first_k_dense_replace": 0},
    "ernie4_5_moe": {"moe_num_experts": EXPERTS, "moe_k": TOP_K, "moe_layer_start_index": 0},
    "exaone_moe": _PLAIN | {"first_k_dense_replace": 0},
    "flex_olmo": _PLAIN,
    "gemma4_text": {"num_experts": EXPERTS, "top_k_experts": TOP_K, "enable_moe_block": True},
    "glm4_moe": _ROUTED | {"first_k_dense_replace": 0},
    "glm4_moe_lite": _ROUTED | _LATENT | {"mlp_layer_types": "sparse"},
    "gpt_oss": _LOCAL,
    "granitemoe": _LOCAL,
    "granitemoehybrid": _LOCAL | {"shared_intermediate_size": 128, "layer_types": "attention"},
    "granitemoeshared": _LOCAL | {"shared_intermediate_size": 128},
    "hunyuan_v1_moe": {"num_experts": EXPERTS, "moe_topk": TOP_K},
    "hy_v3": _PLAIN | {"mlp_layer_types": "sparse"},
    "jamba": _PLAIN | {"expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 1,
                       "attn_layer_offset": 0, "use_mamba_kernels": False},
    "kimi_linear": {"num_experts": EXPERTS, "num_experts_per_token": TOP_K, "first_k_dense_replace": 0},
    "laguna": _PLAIN | {"mlp_layer_types": "sparse"},
    "lfm2_moe": _PLAIN | {"num_dense_layers": 0, "layer_types": "full_attention"},
    "llama4_text": _LOCAL | {"intermediate_size_mlp": 128, "interleave_moe_layer_step": 1},
    "mellum": _PLAIN,
    "mimo_v2_flash": _ROUTED | {
        "v_head_dim": 64, "swa_head_dim": 64, "swa_v_head_dim": 64, "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2, "mlp_layer_types": "sparse", "moe_layer_freq": 1,
    },
    "minimax": _LOCAL | {"block_size": 16},
    "minimax_m2": _LOCAL,
    "mixtral": _LOCAL,
    "nemotron_h": _ROUTED | {"layers_block_type": "moe", "moe_shared_expert_intermediate_size": 128},
    "olmoe": _PLAIN,
    "phimoe": _LOCAL | {"num_experts_per_tok": 2},
    "qwen2_moe": _SHARED,
    "qwen3_5_moe_text": _SHARED | _DELTA,
    "qwen3_moe": _PLAIN | {"norm_topk_prob": True},
    "qwen3_next": _SHARED | _DELTA,
    "solar_open": _ROUTED | {"first_k_dense_replace": 0},
    "zaya": {},
}  # fmt: skip


@functools.lru_cache(maxsize=2)
def build(
    kind: str,
    implementation: str | None = "grouped_mm",
    scheme: str = "bf16",
    layers: int = 2,
    **changes: Any,
) -> nn.Module:
    """A causal language model by its transformers model type, every layer a mixture of experts, in bfloat16.

    Skips the test where this version of transformers does not have the model.
    """
    import pytest
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = SIZES | CONFIGS[kind] | changes
    if "kv_lora_rank" in settings:
        del settings["head_dim"]
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if name in settings:
            settings[name] = [settings[name]] * layers
    if "layers_block_type" not in settings:
        settings["num_hidden_layers"] = layers
    try:
        config = AutoConfig.for_model(kind, **settings)
    except ValueError as error:
        pytest.skip(f"needs a transformers with {kind}: {error}"[:200])
    given = {} if implementation is None else {"experts_implementation": implementation}
    model = AutoModelForCausalLM.from_config(config, **given)
    model = model.eval().requires_grad_(False)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if (
            "norm" in name
        ):  # freshly made norms and biases are constant, which would hide a wrong one
            value.data += 0.1 * torch.randn_like(value)
        elif "bias" in name and value.is_floating_point():
            value.data = 0.1 * torch.randn_like(value)
        elif "experts" in name and value.dim() == 3:
            value.data = torch.randn_like(value) * value.shape[-1] ** -0.5
        elif value.dim() == 2 and value.shape[0] == EXPERTS:  # a router: scores that differ
            value.data = 0.3 * torch.randn_like(value)
    model = model.to(torch.bfloat16)
    return fusion_passes.quantize_(model, "fp8_block") if scheme == "fp8_block" else model


def tokens(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(3, SIZES["vocab_size"], (1, count), generator=generator)
