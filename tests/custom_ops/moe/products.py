"""The operands of experts in FP8 at the sizes of models, made on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import custom_ops
from custom_ops.moe.activation import Activation
from custom_ops.moe.problem import Problem
from custom_ops.moe.tiles import Aligned, Tile
from tests.custom_ops.moe.problems import route

BLOCK = 128
MODELS = {
    "Qwen3-30B-A3B": (8, 128, 2048, 768),
    "Mixtral-8x7B": (2, 8, 4096, 14336),
    "a slice of DeepSeek-V3": (1, 32, 7168, 2048),
}


class Products(NamedTuple):
    """FP8 operands of both products, made on the GPU: a model's weights take the host too long."""

    x: Tensor
    x_scale: Tensor
    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor
    ids: Tensor
    aligned: Aligned

    @classmethod
    def of(cls, tokens: int, top_k: int, experts: int, hidden: int, width: int, routing: str):
        generator = torch.Generator("cuda").manual_seed(tokens)

        def codes(*shape: int) -> Tensor:
            values = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
            return values.normal_(generator=generator).mul_(64).to(torch.float8_e4m3fn)

        def scales(*shape: int) -> Tensor:
            return torch.rand(shape, device="cuda", generator=generator) * 1e-3 + 1e-4

        ids = route(routing, tokens, experts, top_k, torch.Generator().manual_seed(tokens)).cuda()
        return cls(
            codes(tokens, hidden),
            scales(tokens, hidden // BLOCK),
            codes(experts, 2 * width, hidden),
            scales(experts, 2 * width // BLOCK, hidden // BLOCK),
            codes(experts, hidden, width),
            scales(experts, hidden // BLOCK, width // BLOCK),
            ids,
            Aligned(*custom_ops.moe_align_block_size(ids, BLOCK, experts), BLOCK),
        )

    def problem(self) -> Problem:
        return Problem.of(
            self.x,
            self.gate_up,
            self.down,
            torch.rand(self.ids.shape, generator=torch.Generator().manual_seed(1)).cuda(),
            self.ids,
            hidden_scale=self.x_scale,
            gate_up_scale=self.gate_up_scale,
            down_scale=self.down_scale,
        )

    def first(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Codes and scales of the rows of pairs."""
        from custom_ops.moe import triton_experts

        codes, scale = triton_experts.gate_up(
            self.x,
            self.gate_up,
            self.aligned,
            self.ids.shape[1],
            activation=Activation("silu_mul"),
            x_scale=self.x_scale,
            w_scale=self.gate_up_scale,
            quantize=True,
            dtype=torch.bfloat16,
            tile=tile,
        )
        return codes, scale

    def rows(self, tensor: Tensor) -> Tensor:
        """The bits of all rows but those of padding, which hold nothing."""
        return tensor.view(torch.uint8)[self.aligned.sorted_ids < self.ids.numel()]

    def second(self, act: tuple[Tensor, Tensor], tile: Tile) -> Tensor:
        from custom_ops.moe import triton_experts

        return triton_experts.down(
            act[0],
            self.down,
            self.aligned,
            self.ids.numel(),
            act_scale=act[1],
            w_scale=self.down_scale,
            dtype=torch.bfloat16,
            tile=tile,
        )
