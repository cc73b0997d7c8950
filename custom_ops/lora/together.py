"""Several linear layers with adapters that read one activation: q, k and v, gate and up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.implementation import Implementation, triton
from custom_ops.library import require
from custom_ops.lora import hopper, hopper_batch, reference
from custom_ops.lora.checks import (
    check_adapter,
    check_batch,
    check_expand_weights,
    check_linear,
    check_shape,
    check_shrink_weights,
    tokens_of,
)
from custom_ops.quantization.checks import check_choice

_OP = "lora_linears_single"


def lora_linears_single(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:
    """[lora_linear_single(x, weight, bias, a, b, scaling) for each layer], with one shrink for adapters of one rank.

    x: bfloat16 or float16, [..., H]. The others: a list each, of as many layers, at least one; what is in them is as
    `lora_linear_single` takes it. Adapters are of one dtype, their ranks may differ. Returns a list of [..., N of the
    layer], contiguous, with the roundings of that op. Sums are in the order in which it has them for the same sizes,
    where the same implementation runs. Implementations: CUDA C++ (Hopper, where the table has it for every layer: those
    of few tokens each with a shrink of its own), Triton, reference. Raises ValueError for another dtype, shape or
    device, or lists of different lengths. Source: arXiv:2106.09685.
    """
    return torch.ops.custom_ops.lora_linears_single(x, weights, biases, a, b, scalings)


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
) -> None:
    _check_layers(_OP, weights, {"biases": biases, "a": a, "b": b, "scalings": scalings})
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_linear(_OP, x, weight, bias)
        check_adapter(_OP, x, weight.shape[0], a[index], b[index])
        check_choice(_OP, f"a[{index}].dtype", a[index].dtype, (a[0].dtype,))


def _check_layers(op: str, weights: Sequence[Tensor], lists: dict[str, Sequence[Any]]) -> None:
    """One or more layers, and as many in each list."""
    require(len(weights) > 0, lambda: f"{op}: weights is empty; accepted: one or more layers")
    for name, each in lists.items():
        if len(each) != len(weights):
            raise ValueError(
                f"{op}: {name} has {len(each)} layers; accepted: {len(weights)}, as weights"
            )


def _empty(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:
    return _outputs(x, weights)


def _outputs(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
        for weight in weights
    ]


LINEARS_SINGLE = library.define(
    lora_linears_single,
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] a, Tensor[] b, float[] scalings) -> Tensor[]",
    check=_check,
    empty=_empty,
    reference=reference.lora_linears_single,
    implementations=(
        Implementation(
            "cuda", hopper.load_together, hopper.unavailable, hopper.unsupported_together
        ),
        triton("custom_ops.lora.linears:lora_linears_single"),
    ),
)


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
    """[lora_linear(x, weight, bias, [a], [b], scaling, ranks, ...) for each layer], with one shrink for all of them.

    x: bfloat16 or float16, [..., H]. weights, biases, a, b, scalings, ranks: a list each, of as many layers, at least
    one; what is in them is as `lora_linear` takes it, and all of a have one R. The batch is one for all. Returns a list
    of [..., N of the layer], contiguous, with the roundings of that op. Implementations: CUDA C++ (Hopper,
    where the table has it for every layer), Triton, reference. Raises ValueError for another dtype, shape, stride or
    device, or lists of different lengths. Source: arXiv:2106.09685, arXiv:2310.18547.
    """
    return torch.ops.custom_ops.lora_linears(
        x, weights, biases, a, b, scalings, ranks, token_slots, sorted_tokens, tiles
    )


def _check_batched(
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
) -> None:
    op = "lora_linears"
    lists = {"biases": biases, "a": a, "b": b, "scalings": scalings, "ranks": ranks}
    _check_layers(op, weights, lists)
    for weight, bias in zip(weights, biases, strict=True):
        check_linear(op, x, weight, bias)
    check_shrink_weights(op, a, x)
    check_expand_weights(op, b, a[0].shape[1], "x", x)
    check_choice(op, "b[0].dtype", b[0].dtype, (x.dtype,))
    for index, (weight, matrix) in enumerate(zip(weights, b, strict=True)):
        want = a[0].shape[0], weight.shape[0], None
        words = "[num_slots, N, rank] with the slots of a and the N of the layer's weight"
        check_shape(op, f"b[{index}]", matrix, want, words)
    for scaling, of_layer in zip(scalings, ranks, strict=True):
        batch = token_slots, sorted_tokens, tiles
        check_batch(op, "x", tokens_of(x), x, a[0].shape[0], of_layer, *batch, scaling)


def _empty_batched(
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
    return _outputs(x, weights)


LINEARS = library.define(
    lora_linears,
    "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] a, Tensor[] b, Tensor[] scalings, Tensor[] ranks, "
    "Tensor token_slots, Tensor sorted_tokens, Tensor tiles) -> Tensor[]",
    check=_check_batched,
    empty=_empty_batched,
    reference=reference.lora_linears,
    implementations=(
        Implementation(
            "cuda", hopper_batch.load_linears, hopper.unavailable, hopper.unsupported_batches
        ),
        triton("custom_ops.lora.linears:lora_linears"),
    ),
)
