"""Checks of arguments that the LoRA ops share. They add no guard on symbolic sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from custom_ops.library import require
from custom_ops.quantization.checks import (
    ACTIVATION_DTYPES,
    check_activation,
    check_choice,
    check_device,
)
from custom_ops.scales import known

MAX_RANK = 256


def check_shape(
    op: str, name: str, tensor: Tensor, shape: Sequence[int | torch.SymInt | None], words: str
) -> None:
    """A tensor must have these sizes; None is any."""
    same = tensor.dim() == len(shape) and not any(
        want is not None and known(have != want)
        for have, want in zip(tensor.shape, shape, strict=True)
    )
    require(same, lambda: f"{op}: {name}.shape is {tuple(tensor.shape)}; accepted: {words}")


def check_rank(op: str, name: str, rank: int) -> None:
    require(rank >= 1, lambda: f"{op}: the rank of {name} is {rank}; accepted: 1 to {MAX_RANK}")
    require(
        rank <= MAX_RANK, lambda: f"{op}: the rank of {name} is {rank}; accepted: 1 to {MAX_RANK}"
    )


def check_slices(op: str, a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """The two matrices of an adapter have as many slices."""
    if len(a) != len(b):
        raise ValueError(f"{op}: b has {len(b)} slices; accepted: {len(a)}, as a")


def check_weights(
    op: str, name: str, weights: Sequence[Tensor], other_name: str, other: Tensor
) -> None:
    """One tensor per slice, [num_slots, ., .], contiguous, of one dtype and on one device."""
    if not weights:
        raise ValueError(f"{op}: {name} is empty; accepted: one tensor per slice")
    first = weights[0]
    for index, each in enumerate(weights):
        label = f"{name}[{index}]"
        check_choice(op, f"{label}.dtype", each.dtype, ACTIVATION_DTYPES)
        check_choice(op, f"{label}.dtype", each.dtype, (first.dtype,))
        check_device(op, label, each, other_name, other)
        if each.dim() != 3:
            raise ValueError(
                f"{op}: {label} has {each.dim()} dimensions; accepted: 3, [num_slots, ...]"
            )
        if known(each.shape[0] != first.shape[0]):
            raise ValueError(
                f"{op}: {label} has {each.shape[0]} slots; accepted: {first.shape[0]}, as {name}[0]"
            )
        if not each.is_contiguous():
            raise ValueError(f"{op}: {label} has strides {each.stride()}; accepted: contiguous")


def check_shrink_weights(op: str, a: Sequence[Tensor], x: Tensor) -> None:
    check_weights(op, "a", a, "x", x)
    check_choice(op, "a[0].dtype", a[0].dtype, (x.dtype,))
    for index, each in enumerate(a):
        want = (None, a[0].shape[1], x.shape[-1])
        words = "[num_slots, rank, H] with the H of x and one rank for all slices"
        check_shape(op, f"a[{index}]", each, want, words)
    check_rank(op, "a", a[0].shape[1])


def check_expand_weights(
    op: str, b: Sequence[Tensor], rank: int, other_name: str, other: Tensor
) -> None:
    check_weights(op, "b", b, other_name, other)
    for index, each in enumerate(b):
        words = "[num_slots, width of the slice, rank] with the rank of a"
        check_shape(op, f"b[{index}]", each, (None, None, rank), words)
    check_rank(op, "b", rank)


def check_batch(
    op: str,
    name: str,
    num_tokens: int,
    other: Tensor,
    num_slots: int,
    ranks: Tensor,
    token_slots: Tensor,
    sorted_tokens: Tensor,
    tiles: Tensor,
    scaling: Tensor | None = None,
) -> None:
    """The tensors of a LoRABatch that has room for the tokens, and those with one number per slot."""
    batch = {"token_slots": token_slots, "sorted_tokens": sorted_tokens, "tiles": tiles}
    for label, tensor in {"ranks": ranks, **batch}.items():
        check_choice(op, f"{label}.dtype", tensor.dtype, (torch.int32,))
        check_device(op, label, tensor, name, other)
    check_shape(op, "ranks", ranks, (num_slots,), "[num_slots]")
    if scaling is not None:
        check_choice(op, "scaling.dtype", scaling.dtype, (torch.float32,))
        check_device(op, "scaling", scaling, name, other)
        check_shape(op, "scaling", scaling, (num_slots,), "[num_slots]")
    check_shape(op, "token_slots", token_slots, (None,), "[max_tokens], of a LoRABatch")
    check_shape(
        op, "sorted_tokens", sorted_tokens, (token_slots.shape[0],), "[max_tokens], of a LoRABatch"
    )
    check_shape(op, "tiles", tiles, (2, None, 4), "[2, max_tiles, 4], of a LoRABatch")
    for label, tensor in {"ranks": ranks, **batch}.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {label} has strides {tensor.stride()}; accepted: contiguous")
    require(
        num_tokens <= token_slots.shape[0],
        lambda: (
            f"{op}: {name} has {num_tokens} tokens; accepted: up to {token_slots.shape[0]}, "
            "the max_tokens of the LoRABatch"
        ),
    )


def check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """weight [N, H] and bias [N] of the dtype of x."""
    check_activation(op, "x", x)
    for name, tensor, shape in (
        ("weight", weight, (None, x.shape[-1])),
        ("bias", bias, (weight.shape[0],)),
    ):
        if tensor is not None:
            check_choice(op, f"{name}.dtype", tensor.dtype, (x.dtype,))
            check_device(op, name, tensor, "x", x)
            words = "[N, H] with the H of x" if name == "weight" else "[N] with the N of weight"
            check_shape(op, name, tensor, shape, words)


def check_adapter(op: str, x: Tensor, columns: int, a: Tensor, b: Tensor) -> None:
    """a [rank, H] and b [columns, rank] of one adapter, both of the dtype of x or both float32."""
    for name, tensor in (("a", a), ("b", b)):
        check_choice(op, f"{name}.dtype", tensor.dtype, (x.dtype, torch.float32))
        check_choice(op, f"{name}.dtype", tensor.dtype, (a.dtype,))
        check_device(op, name, tensor, "x", x)
        if tensor.dim() != 2:
            raise ValueError(f"{op}: {name} has {tensor.dim()} dimensions; accepted: 2")
    require(
        not known(a.shape[1] != x.shape[-1]),
        lambda: f"{op}: a.shape is {tuple(a.shape)}; accepted: [rank, H] with the H of x",
    )
    require(
        not known(b.shape[0] != columns) and not known(b.shape[1] != a.shape[0]),
        lambda: (
            f"{op}: b.shape is {tuple(b.shape)}; accepted: [{columns}, {a.shape[0]}], "
            "the columns of the base and the rank of a"
        ),
    )
    check_rank(op, "a", a.shape[0])


def check_base(
    op: str, base: Tensor, like: Sequence[int], columns: int, dtype: torch.dtype
) -> None:
    """A base of these leading dimensions and that many columns."""
    check_choice(op, "base.dtype", base.dtype, (dtype,))
    words = f"{(*like, columns)}: as many tokens as x, and the widths of all slices"
    check_shape(op, "base", base, (*like, columns), words)


def tokens_of(x: Tensor) -> int:
    return math.prod(x.shape[:-1])
