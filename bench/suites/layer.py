"""A decoder layer of the shape of Llama-3-8B, with block-FP8 linear layers, from transformers; its rotary embedding.

Stock `torch.compile` of the same FP8 module is the baseline; the bfloat16 model that it was made from shows
what FP8 is worth at all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from bench.case import Case, Inputs, Target, Thunk, activation, close

FULL = {"hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8}
HEAD_DIM = FULL["hidden"] // FULL["heads"]
TINY = {"hidden": 256, "intermediate": 256, "heads": 4, "kv_heads": 2}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 8192)


class Stack(nn.Module):
    """The decoder layers and the last norm of a Llama: no embedding, no head, no cache.

    hidden_states: [1, tokens, hidden]. Without a mask, attention is causal.
    """

    def __init__(self, sizes: dict[str, int], device: torch.device) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        config = LlamaConfig(
            vocab_size=32,
            num_hidden_layers=1,
            hidden_size=sizes["hidden"],
            intermediate_size=sizes["intermediate"],
            num_attention_heads=sizes["heads"],
            num_key_value_heads=sizes["kv_heads"],
            max_position_embeddings=8192,
            attn_implementation="sdpa",
        )
        with torch.device(device):
            model = LlamaModel(config).to(torch.bfloat16).eval()
        self.layers, self.norm, self.rotary = model.layers, model.norm, model.rotary_emb

    def forward(self, hidden_states: Tensor) -> Tensor:
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)[None]
        embeddings = self.rotary(hidden_states, positions)
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings=embeddings)
        return self.norm(hidden_states)


@lru_cache(maxsize=1)
def models(device: torch.device, tiny: bool) -> tuple[nn.Module, nn.Module]:
    """The block-FP8 stack and the bfloat16 stack that it was made from; random weights."""
    import fusion_passes

    torch.manual_seed(0)
    plain = Stack(TINY if tiny else FULL, device)
    quantized = copy.deepcopy(plain)
    fusion_passes.quantize_(quantized, "fp8_block")
    return quantized.requires_grad_(False), plain.requires_grad_(False)


def decoder_layer(model: nn.Module, hidden_states: Tensor) -> Tensor:
    return model(hidden_states)


def rotary_embedding(
    q: Tensor, k: Tensor, positions: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """As transformers computes it, angles included. q, k: [1, tokens, heads * HEAD_DIM]."""
    angles = (inverse[None, :, None].float() @ positions[:, None, :].float()).transpose(1, 2)
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = (wave.to(q.dtype).unsqueeze(1) for wave in (angles.cos(), angles.sin()))

    def rotated(x: Tensor) -> Tensor:
        x = x.view(*x.shape[:-1], -1, HEAD_DIM).transpose(1, 2)
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), dim=-1) * sin

    return rotated(q), rotated(k)


def _rotary_inputs(device: torch.device, tokens: int) -> Inputs:
    kv = FULL["hidden"] * FULL["kv_heads"] // FULL["heads"]
    inverse = 5e5 ** -(torch.arange(0, HEAD_DIM, 2, device=device).float() / HEAD_DIM)
    return (
        activation(device, 1, tokens, FULL["hidden"]),
        activation(device, 1, tokens, kv),
        torch.arange(tokens, device=device)[None],
        inverse,
    )


def _rotary_case(tokens: int) -> Case:
    heads = FULL["heads"] + FULL["kv_heads"]
    return Case(
        name="rotary_embedding",
        sizes={"tokens": tokens, "heads": heads, "head_dim": HEAD_DIM},
        inputs=partial(_rotary_inputs, tokens=tokens),
        plain=rotary_embedding,
        check=close(1e-2),
        fusion="rotary_table",
        moved_bytes=4 * tokens * heads * HEAD_DIM,
        targets=(Target("of_inductor", 0.97),),
    )


def bf16_inductor(inputs: Inputs, tiny: bool) -> Thunk:
    hidden_states = inputs[1]
    compiled = torch.compile(models(hidden_states.device, tiny)[1], dynamic=False)
    return lambda: compiled(hidden_states)


def _inputs(device: torch.device, tokens: int, tiny: bool) -> Inputs:
    hidden = (TINY if tiny else FULL)["hidden"]
    return models(device, tiny)[0], activation(device, 1, tokens, hidden)


def cases(tiny: bool = False) -> Iterator[Case]:
    sizes = TINY if tiny else FULL
    hidden, intermediate = sizes["hidden"], sizes["intermediate"]
    kv = hidden * sizes["kv_heads"] // sizes["heads"]
    parameters = hidden * (2 * hidden + 2 * kv) + 3 * hidden * intermediate
    for tokens in (4,) if tiny else TOKENS:
        small, large = Target("of_inductor", 3.0), Target("of_inductor", 1.8)
        yield Case(
            name="llama_layer_fp8_block",
            sizes={"tokens": tokens, "hidden": hidden, "intermediate": intermediate},
            inputs=partial(_inputs, tokens=tokens, tiny=tiny),
            plain=decoder_layer,
            check=close(5e-2),
            moved_bytes=parameters + 4 * tokens * hidden,
            flops=2 * tokens * parameters,
            others={"bf16_inductor": partial(bf16_inductor, tiny=tiny)},
            targets=(small,) if tokens <= 64 else (large,) if tokens == 4096 else (),
        )
    for tokens in () if tiny else (256, 1024, 4096, 16384):
        yield _rotary_case(tokens)
