"""Stock transformers models with random weights, small enough for a CPU."""

from __future__ import annotations

import functools

import torch
from torch import nn

import fusion_passes

SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@functools.lru_cache(maxsize=2)
def build(kind: str, scheme: str, layers: int) -> nn.Module:
    """A causal language model by its transformers model type, in bfloat16, its linears as ``scheme`` says."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, num_hidden_layers=layers, **SIZES)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if (
            "norm" in name
        ):  # freshly made norms are all ones (or zeros), which would hide a wrong weight
            parameter.data += 0.1 * torch.randn_like(parameter)
    return fusion_passes.quantize_(model, "fp8_block") if scheme == "fp8_block" else model


def tokens(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, SIZES["vocab_size"], (1, count), generator=generator)


def fp8_matches(layers: int, **per_layer: int) -> dict[str, int]:
    """What fires in a pre-norm decoder with separate q/k/v and gate/up when every fusion is on."""
    counts = {
        "block_scaled_linear": 7,
        "shared_group_quant": 3,
        "silu_mul_group_quant": 1,
        "group_quant": 1,
    } | per_layer
    expected = {name: count * layers for name, count in counts.items() if count}
    # the first norm has no addition before it, the last one no quantization after it
    return expected | {
        "add_rms_norm_group_quant": 2 * layers - 1,
        "rms_norm_group_quant": 1,
        "add_rms_norm": 1,
    }
