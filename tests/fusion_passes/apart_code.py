"""Experts whose gate and up are two weights, as libraries other than transformers write them.

The blocks are written anew after gpt-fast's Mixtral, torchtitan, torchtune and Meta's Llama 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_passes import registry
from fusion_passes.testing import fuse
from fusion_passes.testing.equivalence import Result

FUSIONS = ("topk_softmax", "topk_sigmoid", "fused_moe")


@dataclass(frozen=True)
class Form:
    """How a block is written.

    form: "grouped" (rows sorted by expert), "einsum" (all matrices of a token at once) or "batched" (one a row).
    transposed: weights are kept as [E, in, out]. before: the top-k weights multiply what the experts read, and how:
    "wide" in float32, "narrow" in 16 bits. back: how results become one. rows: how sorted rows are taken.
    """

    form: str = "grouped"
    activation: str = "silu_mul"
    tokens: int = 5
    top_k: int = 2
    experts: int = 6
    transposed: bool = False
    before: str = ""
    back: str = "unsorted"
    rows: str = "index"
    scoring: str = "softmax"
    up_first: bool = False
    seed: int = 0
    hidden: int = 48
    width: int = 32


class Block(nn.Module):
    """Router and experts, in bfloat16."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        generator = torch.Generator().manual_seed(form.seed)

        def drawn(*shape: int) -> Tensor:
            value = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            if len(shape) == 3 and form.transposed:
                value = value.transpose(1, 2).contiguous()
            return value.bfloat16()

        e, h, i = form.experts, form.hidden, form.width
        self.register_buffer("gate", drawn(e, h))
        self.register_buffer("w1", drawn(e, i, h))
        self.register_buffer("w2", drawn(e, h, i))
        self.register_buffer("w3", drawn(e, i, h))

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.form.seed + 1)
        shape = (1, self.form.tokens, self.form.hidden)
        return torch.randn(shape, generator=generator).bfloat16()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, self.gate).float()
        scores = logits.softmax(-1) if self.form.scoring == "softmax" else logits.sigmoid()
        return torch.topk(scores, self.form.top_k, dim=-1)

    def between(self, gate: Tensor, up: Tensor) -> Tensor:
        activation = self.form.activation
        if activation == "silu_mul":
            return F.silu(gate) * up
        if activation == "gelu_tanh_mul":
            return F.gelu(gate, approximate="tanh") * up
        gate, up = gate.clamp(max=0.8), up.clamp(min=-0.8, max=0.8)
        if activation == "clamped_silu_mul":
            return F.silu(gate) * up
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))

    def both(self, product) -> tuple[Tensor, Tensor]:
        """Gate and up, in whichever order the code makes them."""
        if self.form.up_first:
            up = product(self.w3)
            return product(self.w1), up
        return product(self.w1), product(self.w3)

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.view(-1, x.shape[-1])
        weights, ids = self.route(x)
        how = {"grouped": self.grouped, "einsum": self.einsum, "batched": self.batched}
        return how[self.form.form](x, weights, ids).view(shape)

    def einsum(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """As gpt-fast has it for few tokens."""
        names = (
            ("ti,tkio->tko", "tko,tkoi->tki")
            if self.form.transposed
            else ("ti,tkoi->tko", "tko,tkio->tki")
        )
        gate, up = self.both(lambda w: torch.einsum(names[0], x, w[ids]))
        out = torch.einsum(names[1], self.between(gate, up), self.w2[ids])
        return torch.einsum("tki,tk->ti", out, weights.to(x.dtype))

    def weighted(self, rows: Tensor, weights: Tensor) -> Tensor:
        if self.form.before == "wide":
            return (rows.float() * weights.reshape(-1, 1)).to(rows.dtype)
        if self.form.before == "narrow":
            return rows * weights.reshape(-1, 1).to(rows.dtype)
        return rows

    def batched(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        rows = self.weighted(x.repeat_interleave(self.form.top_k, 0), weights).unsqueeze(-1)
        turn = (lambda w: w.transpose(1, 2)) if self.form.transposed else (lambda w: w)
        gate, up = self.both(lambda w: torch.bmm(turn(w)[flat], rows))
        out = torch.bmm(turn(self.w2)[flat], self.between(gate, up)).view(*ids.shape, -1)
        if self.form.before:
            return out.sum(1)
        return (out * weights.unsqueeze(-1)).sum(1).to(x.dtype)

    def grouped(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """As torchtitan and torchtune have it, the latter with transposed weights."""
        flat, top_k = ids.reshape(-1), self.form.top_k
        # its code counts the ids themselves, which no CPU does
        counts = torch.histc(flat.float(), self.form.experts, 0, self.form.experts)
        offsets = counts.cumsum(0, dtype=torch.int32)
        order = torch.argsort(flat, stable=True)
        spread = (order // top_k).reshape(-1, 1).expand(-1, x.shape[1])
        rows = x[order // top_k] if self.form.rows == "index" else torch.gather(x, 0, spread)
        rows = self.weighted(rows, weights.reshape(-1)[order])
        turn = (lambda w: w) if self.form.transposed else (lambda w: w.transpose(-2, -1))
        gate, up = self.both(lambda w: torch._grouped_mm(rows, turn(w), offs=offsets))
        out = torch._grouped_mm(self.between(gate, up), turn(self.w2), offs=offsets)
        if self.form.back == "scatter_add":
            if not self.form.before:
                out = (out.float() * weights.reshape(-1)[order].reshape(-1, 1)).to(x.dtype)
            return torch.zeros_like(x).scatter_add(0, spread, out)
        pairs = x.new_zeros(x.shape[0] * top_k, x.shape[1])
        pairs[order] = out
        pairs = pairs.reshape(-1, top_k, x.shape[1])
        if self.form.before:
            return pairs.sum(1)
        return torch.bmm(weights.unsqueeze(1), pairs.float()).squeeze(1).to(x.dtype)


def run(form: Form, block: nn.Module | None = None) -> Result:
    block = Block(form) if block is None else block
    x = Block(form).inputs()
    return fuse(block, x, only=[registry()[name] for name in FUSIONS])
