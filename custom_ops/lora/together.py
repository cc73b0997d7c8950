"""Several linear layers with one adapter each that read one activation: q, k and v, gate and up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.implementation import Implementation, triton
from custom_ops.library import require
from custom_ops.lora import hopper, reference
from custom_ops.lora.checks import check_adapter, check_linear
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
    device, or lists of different lengths.
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
    require(len(weights) > 0, lambda: f"{_OP}: weights is empty; accepted: one or more layers")
    lists = {"biases": biases, "a": a, "b": b, "scalings": scalings}
    for name, each in lists.items():
        if len(each) != len(weights):
            raise ValueError(
                f"{_OP}: {name} has {len(each)} layers; accepted: {len(weights)}, as weights"
            )
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_linear(_OP, x, weight, bias)
        check_adapter(_OP, x, weight.shape[0], a[index], b[index])
        check_choice(_OP, f"a[{index}].dtype", a[index].dtype, (a[0].dtype,))


def _empty(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
) -> list[Tensor]:
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
        triton("custom_ops.lora.linear:lora_linears_single"),
    ),
)
