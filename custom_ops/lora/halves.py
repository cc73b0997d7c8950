"""The two halves of `lora_add_single`, for layers that read one activation and whose bases are other kernels' (FP8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.implementation import triton
from custom_ops.library import require
from custom_ops.lora import reference
from custom_ops.lora.checks import check_rank, tokens_of
from custom_ops.quantization.checks import (
    ACTIVATION_DTYPES,
    check_activation,
    check_choice,
    check_device,
)
from custom_ops.scales import known


def lora_shrink_single(x: Tensor, a: Sequence[Tensor]) -> Tensor:
    """y[i, t] = x[t] @ a[i].T for the adapters of several layers, in one kernel and in the rounding of PEFT's layer.

    x: bfloat16 or float16, [..., H] of T tokens. a: one [rank, H] per layer, of one rank from 1 to 256, all of x's
    dtype or all float32, any row pitch. Returns [layers, T, rank] of a's dtype, contiguous: of a 16-bit adapter each
    sum is rounded to it, of a float32 one everything is float32.

    Order of the sums is the implementation's. Implementations: Triton, reference. Raises ValueError for another dtype,
    shape or device. Source: arXiv:2106.09685.
    """
    return torch.ops.custom_ops.lora_shrink_single(x, a)


def _check_shrink(x: Tensor, a: Sequence[Tensor]) -> None:
    op = "lora_shrink_single"
    check_activation(op, "x", x)
    require(len(a) > 0, lambda: f"{op}: a is empty; accepted: one tensor per layer")
    for index, each in enumerate(a):
        name = f"a[{index}]"
        check_choice(op, f"{name}.dtype", each.dtype, (x.dtype, torch.float32))
        check_choice(op, f"{name}.dtype", each.dtype, (a[0].dtype,))
        check_device(op, name, each, "x", x)
        wrong = each.dim() != 2 or known(each.shape[1] != x.shape[-1])
        if wrong or known(each.shape[0] != a[0].shape[0]):
            raise ValueError(
                f"{op}: {name}.shape is {tuple(each.shape)}; accepted: [rank, H] with the H of x and one rank for all"
            )
    check_rank(op, "a", a[0].shape[0])


def _empty_shrink(x: Tensor, a: Sequence[Tensor]) -> Tensor:
    shape = (len(a), tokens_of(x), a[0].shape[0])
    return torch.empty(shape, dtype=a[0].dtype, device=x.device)


SHRINK_SINGLE = library.define(
    lora_shrink_single,
    "(Tensor x, Tensor[] a) -> Tensor",
    check=_check_shrink,
    empty=_empty_shrink,
    reference=reference.lora_shrink_single,
    implementations=(triton("custom_ops.lora.linear:lora_shrink_single"),),
)


def lora_expand_single(y: Tensor, base: Tensor, b: Tensor, scaling: float) -> Tensor:
    """`lora_add_single` after its shrink: base + y @ b.T * scaling, in the roundings of PEFT's layer.

    y: [T, rank], a row of what `lora_shrink_single` returns. base: bfloat16 or float16, [..., N] of T tokens. b:
    [N, rank] of y's dtype, which is base's or float32; any row pitch. Returns a new tensor as base, contiguous. With T
    one rounding to base's dtype:

        16-bit adapter:    out = T(base + T(T(y @ b.T) * scaling))
        float32 adapter:   out = T(float32(base) + (y @ b.T) * scaling), in float32 throughout

    Order of the sum is the implementation's; Triton's products of a float32 adapter have 22 bits or more of each
    factor. Implementations: Triton, reference. Raises ValueError for another dtype, shape or device.
    Source: arXiv:2106.09685.
    """
    return torch.ops.custom_ops.lora_expand_single(y, base, b, scaling)


def _check_expand(y: Tensor, base: Tensor, b: Tensor, scaling: float) -> None:
    op = "lora_expand_single"
    check_choice(op, "base.dtype", base.dtype, ACTIVATION_DTYPES)
    check_choice(op, "y.dtype", y.dtype, (base.dtype, torch.float32))
    check_choice(op, "b.dtype", b.dtype, (y.dtype,))
    check_device(op, "base", base, "y", y)
    check_device(op, "b", b, "y", y)
    if y.dim() != 2 or b.dim() != 2 or base.dim() < 1:
        raise ValueError(
            f"{op}: y, b and base have {y.dim()}, {b.dim()} and {base.dim()} dimensions; accepted: 2, 2 and 1 or more"
        )
    require(
        not known(base.shape[-1] != b.shape[0]) and not known(tokens_of(base) != y.shape[0]),
        lambda: (
            f"{op}: base.shape is {tuple(base.shape)}; accepted: [..., {b.shape[0]}] of {y.shape[0]} tokens, as b "
            "and y have"
        ),
    )
    require(
        not known(b.shape[1] != y.shape[1]),
        lambda: f"{op}: b.shape is {tuple(b.shape)}; accepted: [N, {y.shape[1]}], the rank of y",
    )
    check_rank(op, "b", b.shape[1])


def _empty_expand(y: Tensor, base: Tensor, b: Tensor, scaling: float) -> Tensor:
    return torch.empty(base.shape, dtype=base.dtype, device=base.device)


EXPAND_SINGLE = library.define(
    lora_expand_single,
    "(Tensor y, Tensor base, Tensor b, float scaling) -> Tensor",
    check=_check_expand,
    empty=_empty_expand,
    reference=reference.lora_expand_single,
    implementations=(triton("custom_ops.lora.linear:lora_expand_single"),),
)
