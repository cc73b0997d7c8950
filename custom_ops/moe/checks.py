"""Checks of arguments that the routing and index ops share. They add no guard on symbolic sizes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from custom_ops.library import require
from custom_ops.quantization.checks import check_device

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(op: str, name: str, tensor: Tensor, accepted: tuple[torch.dtype, ...]) -> None:
    """The dtype of a tensor must be one of a few."""
    if tensor.dtype not in accepted:
        names = ", ".join(map(str, accepted))
        raise ValueError(f"{op}: {name}.dtype is {tensor.dtype}; accepted: {names}")


def check_dims(op: str, name: str, tensor: Tensor, dims: int) -> None:
    """A tensor must have so many dimensions."""
    if tensor.dim() != dims:
        raise ValueError(f"{op}: {name} has {tensor.dim()} dimensions; accepted: {dims}")


def check_shape(op: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """A tensor must have this shape."""
    check_dims(op, name, tensor, len(shape))
    for size, wanted in zip(tensor.shape, shape, strict=True):
        require(
            size == wanted,
            lambda: f"{op}: {name}.shape is {tuple(tensor.shape)}; accepted: {tuple(shape)}",
        )


def check_at_least(op: str, name: str, value: int, least: int) -> None:
    """An integer must not be below a bound."""
    require(value >= least, lambda: f"{op}: {name} is {value}; accepted: {least} or more")


def check_finite(op: str, name: str, value: float) -> None:
    """A number must be finite. A SymFloat is checked when it runs."""
    if not (isinstance(value, torch.SymFloat) or math.isfinite(value)):
        raise ValueError(f"{op}: {name} is {value}; accepted: a finite number")


def check_ids(op: str, topk_ids: Tensor, num_experts: int, expert_map: Tensor | None) -> None:
    """Expert ids [T, K], the number of experts that are here, and the map from all experts to these."""
    check_dtype(op, "topk_ids", topk_ids, (torch.int32, torch.int64))
    check_dims(op, "topk_ids", topk_ids, 2)
    check_at_least(op, "the last dimension of topk_ids", topk_ids.shape[1], 1)
    check_at_least(op, "num_experts", num_experts, 1)
    if expert_map is not None:
        check_device(op, "expert_map", expert_map, "topk_ids", topk_ids)
        check_dtype(op, "expert_map", expert_map, (torch.int32,))
        check_dims(op, "expert_map", expert_map, 1)
        check_at_least(op, "the length of expert_map", expert_map.shape[0], 1)
