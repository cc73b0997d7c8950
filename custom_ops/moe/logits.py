"""The logits of a router whose operands have 16 bits and whose result has 32."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.implementation import triton
from custom_ops.moe.checks import check_dims, check_dtype, check_shape
from custom_ops.quantization.checks import ACTIVATION_DTYPES, check_device

_OP = "router_logits"


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """The logits of a router in float32: x @ weight.T of operands that are widened first, or as if they were.

    x: bfloat16 or float16, [..., K]. weight: of that dtype, [E, K]. Any strides; rows in one piece are read as they
    are. Returns float32, [..., E], contiguous: linear(x.float(), weight.float()), which DeepSeek-V3 and many others
    write so that close experts keep their order.

    A product of two 16-bit numbers is exact in float32, so matrix units for 16 bits do what float32 does, up to how
    sums are rounded; these are made of short ones, and are as near to float64 as those of eager. Raises ValueError for
    another dtype, shape or device. Source: arXiv:2412.19437.
    """
    return torch.ops.custom_ops.router_logits(x, weight)


def _check(x: Tensor, weight: Tensor) -> None:
    check_dtype(_OP, "x", x, ACTIVATION_DTYPES)
    if x.dim() < 1:
        raise ValueError(f"{_OP}: x has 0 dimensions; accepted: 1 or more")
    check_dims(_OP, "weight", weight, 2)
    check_dtype(_OP, "weight", weight, (x.dtype,))
    check_shape(_OP, "weight", weight, (weight.shape[0], x.shape[-1]))
    check_device(_OP, "weight", weight, "x", x)


def _empty(x: Tensor, weight: Tensor) -> Tensor:
    shape = (*x.shape[:-1], weight.shape[0])
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _reference(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x.float(), weight.float())


library.define(
    router_logits,
    "(Tensor x, Tensor weight) -> Tensor",
    check=_check,
    empty=_empty,
    reference=_reference,
    implementations=(triton("custom_ops.moe.triton_logits:router_logits"),),
)
