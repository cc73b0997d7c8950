"""Mixtures of experts as people write them, in plain PyTorch, one choice of spelling at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LIMIT = 0.8  # within the values, and no number of 16 bits


@dataclass(frozen=True)
class Spelling:
    """How a mixture of experts is written.

    form: "grouped" or "batched" (a matrix for each row). activation: "silu_mul", "gelu_tanh_mul", "clamped_swiglu",
    "clamped_silu_mul" or "relu2". interleaved: gate and up in turns. transposed: weights are kept as [E, in, out].
    bias: of both products. order: how rows are sorted and put back. mask: rows of experts elsewhere are set to 0.
    weigh_last: the top-k weights are applied after the rows are put back. rounded_weights: they are in 16 bits.
    """

    form: str = "grouped"
    activation: str = "silu_mul"
    interleaved: bool = False
    transposed: bool = False
    bias: bool = False
    order: str = "index_put"
    tokens: str = "divided"
    counts: str = "histc"
    mask: bool = False
    weigh_last: bool = False
    rounded_weights: bool = False


@dataclass(frozen=True)
class Experts:
    """The arguments of a mixture of experts: [T, H], [E, out, in] twice, biases, [T, K] twice."""

    hidden: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor
    down_bias: Tensor
    weights: Tensor
    ids: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())


def draw(
    spelling: Spelling,
    tokens: int = 5,
    top_k: int = 2,
    experts: int = 6,
    hidden: int = 48,
    width: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Experts:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows = width if spelling.activation == "relu2" else 2 * width
    gate_up, down = (
        random(experts, rows, hidden) * hidden**-0.5,
        random(experts, hidden, width) * width**-0.5,
    )
    if spelling.transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    weights, ids = random(tokens, experts).softmax(-1).topk(top_k)
    return Experts(
        random(tokens, hidden).to(dtype), gate_up.to(dtype), down.to(dtype), random(experts, rows).to(dtype),
        random(experts, hidden).to(dtype), weights.to(dtype) if spelling.rounded_weights else weights, ids,
    )  # fmt: skip


def activate(rows: Tensor, spelling: Spelling) -> Tensor:
    if spelling.activation == "relu2":
        return F.relu(rows).square()
    gate, up = (rows[..., ::2], rows[..., 1::2]) if spelling.interleaved else rows.chunk(2, -1)
    if spelling.activation == "silu_mul":
        return F.silu(gate) * up
    if spelling.activation == "gelu_tanh_mul":
        return F.gelu(gate, approximate="tanh") * up
    gate, up = gate.clamp(max=LIMIT), up.clamp(min=-LIMIT, max=LIMIT)
    if spelling.activation == "clamped_silu_mul":
        return F.silu(gate) * up
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def mixture(spelling: Spelling):
    """A function of the tensors of :class:`Experts`."""

    def product(rows, weight, bias, ids, offsets):
        weight = weight if spelling.transposed else weight.transpose(1, 2)
        if spelling.form == "grouped":
            out = torch._grouped_mm(rows, weight, offs=offsets)
        elif spelling.transposed:
            out = torch.bmm(rows.unsqueeze(1), weight[ids]).squeeze(1)
        else:
            out = torch.bmm(weight.transpose(1, 2)[ids], rows.unsqueeze(-1)).squeeze(-1)
        return out + bias[ids] if spelling.bias else out

    def run(hidden, gate_up, down, gate_up_bias, down_bias, weights, ids):
        (num_tokens, top_k), experts, beyond = ids.shape, gate_up.shape[0], None
        flat, flat_weights, offsets = ids.reshape(-1), weights.reshape(-1), None
        pairs = torch.arange(num_tokens * top_k)
        if spelling.form == "grouped":
            flat, order = flat.sort() if spelling.order != "argsort" else (None, flat.argsort())
            if flat is None:
                flat = ids.reshape(-1)[order]
            flat_weights = flat_weights[order]
            tokens = order // top_k if spelling.tokens == "divided" else _counting(ids)[order]
            if spelling.counts == "histc":
                counts = torch.histc(flat.float(), bins=experts, min=0, max=experts - 1)
            else:
                counts = torch.bincount(flat, minlength=experts)
            offsets = counts.cumsum(0, dtype=torch.int32)
            rows = hidden[tokens]
        elif spelling.tokens == "divided":
            rows = hidden[pairs // top_k]
        else:
            rows = hidden.repeat_interleave(top_k, 0)
        if spelling.mask:
            beyond = (flat >= experts).unsqueeze(-1)
            rows, flat = rows.masked_fill(beyond, 0.0), flat.clamp(max=experts - 1)
        rows = product(rows, gate_up, gate_up_bias, flat, offsets)
        rows = product(activate(rows, spelling), down, down_bias, flat, offsets)
        if spelling.mask:
            rows = rows.masked_fill(beyond, 0.0)
        if not spelling.weigh_last:
            rows = rows * flat_weights.unsqueeze(-1)
        if spelling.form == "grouped":
            rows = rows[_inverse(order, pairs, spelling.order)]
        if spelling.weigh_last:
            rows = rows.view(num_tokens, top_k, -1) * weights.unsqueeze(-1)
        return rows.view(num_tokens, top_k, -1).sum(1).to(hidden.dtype)

    return run


def _counting(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[0]).unsqueeze(1).expand(-1, ids.shape[1]).reshape(-1)


def _inverse(order: Tensor, pairs: Tensor, how: str) -> Tensor:
    if how == "scatter":
        return torch.empty_like(order).scatter(0, order, pairs)
    if how == "argsort":
        return order.argsort()
    inverse = torch.empty_like(order)
    inverse[order] = pairs
    return inverse
