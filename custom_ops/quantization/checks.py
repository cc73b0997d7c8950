"""Checks of arguments that every op on activations shares. They add no guard on symbolic sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from custom_ops.library import require
from custom_ops.scales import CODE_DTYPES, CODE_MODES, INT8_SCALE_MODES, SCALE_MODES, known

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16)


def check_choice(op: str, name: str, value: object, accepted: Sequence[object]) -> None:
    """An argument must be one of a few values."""
    if value not in accepted:
        given = repr(value) if isinstance(value, str) else value
        raise ValueError(f"{op}: {name} is {given}; accepted: {', '.join(map(str, accepted))}")


def check_bound(op: str, name: str, value: float) -> None:
    """A lower bound, an eps: finite and not negative. A SymFloat is checked when it runs."""
    if not (isinstance(value, torch.SymFloat) or 0.0 <= value < math.inf):
        raise ValueError(f"{op}: {name} is {value}; accepted: a finite number >= 0")


def check_activation(op: str, name: str, x: Tensor) -> None:
    """x must be a bfloat16 or float16 tensor of at least one dimension."""
    if x.dtype not in ACTIVATION_DTYPES:
        raise ValueError(
            f"{op}: {name}.dtype is {x.dtype}; accepted: torch.bfloat16, torch.float16"
        )
    if x.dim() < 1:
        raise ValueError(f"{op}: {name} has no dimension; accepted: [..., K]")


def check_channels(op: str, name: str, x: Tensor) -> None:
    """A token must have a channel, for the largest of none is not a number."""
    if known(x.shape[-1] == 0):
        raise ValueError(f"{op}: the last dimension of {name} is 0; accepted: 1 or more")


def check_like(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Two tensors must agree in dtype, device and shape."""
    check_device(op, name, tensor, other_name, other)
    if tensor.dtype != other.dtype:
        raise ValueError(
            f"{op}: {name}.dtype is {tensor.dtype}; accepted: {other.dtype}, as {other_name}"
        )
    same = tensor.dim() == other.dim()
    require(same, lambda: _shapes(op, name, tensor, other_name, other))
    for size, other_size in zip(tensor.shape, other.shape, strict=True):
        require(size == other_size, lambda: _shapes(op, name, tensor, other_name, other))


def _shapes(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> str:
    return f"{op}: {name}.shape is {tuple(tensor.shape)}; accepted: {tuple(other.shape)}, as {other_name}"


def check_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Two tensors must be on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}; accepted: {other.device}, as {other_name}"
        )


def check_given(
    op: str, name: str, given: Tensor, other_name: str, other: Tensor, dtypes: Sequence[torch.dtype]
) -> None:
    """A tensor of one element, on the device of another."""
    check_device(op, name, given, other_name, other)
    if given.dtype not in dtypes:
        accepted = ", ".join(map(str, dtypes))
        raise ValueError(f"{op}: {name}.dtype is {given.dtype}; accepted: {accepted}")
    require(
        given.numel() == 1,
        lambda: f"{op}: {name}.shape is {tuple(given.shape)}; accepted: one element",
    )


def check_codes(op: str, dtype: torch.dtype, code_mode: str) -> None:
    """How codes are made: the arguments of every quantization."""
    check_choice(op, "dtype", dtype, CODE_DTYPES)
    check_choice(op, "code_mode", code_mode, CODE_MODES)


def check_scales(
    op: str,
    scale_format: str,
    formats: Sequence[str],
    min_amax: float,
    min_scale: float,
    scale_mode: str,
    full: bool,
) -> None:
    """How scales are made: the arguments of every dynamic quantization; ``full``: whether codes may begin at -128."""
    check_choice(op, "scale_format", scale_format, formats)
    check_choice(op, "scale_mode", scale_mode, INT8_SCALE_MODES if full else SCALE_MODES)
    check_bound(op, "min_amax", min_amax)
    check_bound(op, "min_scale", min_scale)
