"""The semantics of the LoRA ops in plain PyTorch. They loop over the adapters in use, for which a GPU has to wait."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from custom_ops.scales import to_contiguous


def _in_use(
    token_slots: Tensor, num_tokens: int, ranks: Tensor
) -> Iterator[tuple[int, Tensor, int]]:
    """(slot, its tokens, its rank) of the adapters that the first num_tokens tokens use."""
    slots = token_slots[:num_tokens]
    for slot in slots.unique().tolist():
        if slot >= 0:
            yield slot, (slots == slot).nonzero()[:, 0], int(ranks[slot])


def rows_of(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def lora_shrink(
    x: Tensor,
    a: Sequence[Tensor],
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> Tensor:
    """`custom_ops.lora_shrink`."""
    rows = rows_of(x)
    y = torch.zeros((len(a), rows.shape[0], a[0].shape[1]), dtype=torch.float32, device=x.device)
    for slot, tokens, rank in _in_use(token_slots, rows.shape[0], ranks):
        for out, weights in zip(y, a, strict=True):
            out[tokens, :rank] = rows[tokens].float() @ weights[slot, :rank].float().t()
    return y


def lora_expand(
    y: Tensor,
    b: Sequence[Tensor],
    base: Tensor | None,
    scaling: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> Tensor:
    """`custom_ops.lora_expand`."""
    columns = sum(weights.shape[1] for weights in b)
    if base is None:
        base = y.new_zeros((y.shape[1], columns), dtype=b[0].dtype)
    out = rows_of(base).float()
    for slot, tokens, rank in _in_use(token_slots, y.shape[1], ranks):
        slices = [
            part[tokens, :rank] @ weights[slot, :, :rank].float().t()
            for part, weights in zip(y, b, strict=True)
        ]
        out[tokens] += torch.cat(slices, 1) * scaling[slot]
    return to_contiguous(out.to(base.dtype).reshape(base.shape))


def lora_add(
    x: Tensor,
    base: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> Tensor:
    """`custom_ops.lora_add`."""
    batch = token_slots, sorted_tokens, tiles
    return lora_expand(lora_shrink(x, a, ranks, *batch), b, base, scaling, ranks, *batch)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> Tensor:
    """`custom_ops.lora_linear`."""
    base = torch.nn.functional.linear(x, weight, bias)
    return lora_add(x, base, a, b, scaling, ranks, token_slots, sorted_tokens, tiles)


def lora_add_single(x: Tensor, base: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`custom_ops.lora_add_single`: what PEFT's layer does, in the dtype of its adapter."""
    delta = torch.nn.functional.linear(torch.nn.functional.linear(x.to(a.dtype), a), b) * scaling
    return to_contiguous((base + delta).to(base.dtype))


def lora_shrink_single(x: Tensor, a: Sequence[Tensor]) -> Tensor:
    """`custom_ops.lora_shrink_single`."""
    rows = x.reshape(-1, x.shape[-1]).to(a[0].dtype)
    return torch.stack([torch.nn.functional.linear(rows, each) for each in a])


def lora_expand_single(y: Tensor, base: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`custom_ops.lora_expand_single`: `lora_add_single` from its second product on."""
    delta = (torch.nn.functional.linear(y, b) * scaling).reshape(base.shape)
    return to_contiguous((base + delta).to(base.dtype))


def lora_linears_single(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:
    """`custom_ops.lora_linears_single`."""
    layers = zip(weights, biases, a, b, scalings, strict=True)
    return [lora_linear_single(x, *layer) for layer in layers]


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[Tensor],
    ranks: Sequence[Tensor],
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
) -> list[Tensor]:
    """`custom_ops.lora_linears`."""
    batch = token_slots, sorted_tokens, tiles
    layers = zip(weights, biases, a, b, scalings, ranks, strict=True)
    return [
        lora_linear(x, weight, bias, [of_a], [of_b], scaling, rank, *batch)
        for weight, bias, of_a, of_b, scaling, rank in layers
    ]


def lora_linear_single(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """`custom_ops.lora_linear_single`."""
    return lora_add_single(x, torch.nn.functional.linear(x, weight, bias), a, b, scaling)
