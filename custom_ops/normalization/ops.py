"""RMSNorm in the spellings of real models, with the residual before it and the quantization after it.

The spellings differ in where they round, so each is its own `weight_mode` and none stands for another.
With T the dtype of x and y = float32(x) * rsqrt(mean(float32(x)^2) + eps):

| weight_mode          | result                         | dtype of weight | models                 |
| -------------------- | ------------------------------ | --------------- | ---------------------- |
| `"rounded"`          | T(weight * T(y))               | T               | Llama, Qwen, Mistral   |
| `"float32"`          | T(y * float32(weight))         | T or float32    | torch.nn.RMSNorm, OLMo2 |
| `"float32_plus_one"` | T(y * (1 + float32(weight)))   | T or float32    | Gemma                  |

A mean depends on the order of its sum: implementations differ from the reference by what one float32
rounding of the mean does: one step of T in at most 1e-4 of the elements (in "rounded", where that step
is multiplied and rounded again, up to two). The order depends on the hidden size and the group size only,
so a row gives the same bits in any batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.implementation import cuda, triton
from custom_ops.library import require
from custom_ops.normalization import reference
from custom_ops.quantization.ops import (
    check_activation,
    check_device,
    check_like,
    check_quant,
    empty_quant,
)
from custom_ops.scales import DEFAULT_MIN_AMAX

WEIGHT_MODES = ("rounded", "float32", "float32_plus_one")


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, weight_mode: str = "rounded") -> Tensor:
    """Root-mean-square normalization over the last dimension.

    x: bfloat16 or float16, [..., hidden_size], any strides. weight: [hidden_size], of the dtype that
    weight_mode accepts. eps: finite, >= 0, used as float32. Returns [..., hidden_size] in the dtype of x,
    contiguous. weight_mode and its rounding points: see the module `custom_ops.normalization.ops`.

    Raises ValueError for another dtype, shape, device, weight_mode or eps. Source: arXiv:1910.07467.
    """
    return torch.ops.custom_ops.rms_norm(x, weight, eps, weight_mode=weight_mode)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, weight_mode: str = "rounded"
) -> tuple[Tensor, Tensor]:
    """residual_out = x + residual, rounded to the dtype of x; out = rms_norm(residual_out, weight, eps).

    x, residual: as x in `rms_norm`, the same dtype and shape. Returns (out, residual_out), both
    contiguous. The norm reads the rounded sum. Raises ValueError as `rms_norm`, and when x and residual
    differ in dtype, shape or device.
    """
    return torch.ops.custom_ops.add_rms_norm(x, residual, weight, eps, weight_mode=weight_mode)


def rms_norm_group_quant(
    x: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    *,
    weight_mode: str = "rounded",
    scale_layout: str = "row_major",
    min_amax: float = DEFAULT_MIN_AMAX,
) -> tuple[Tensor, Tensor]:
    """`group_quant(rms_norm(x, weight, eps), group_size, ...)` in one pass over memory.

    Arguments as in `rms_norm` and `group_quant`; hidden_size is a multiple of group_size. Returns
    (q, scale). The norm is rounded to the dtype of x before it is quantized. Raises ValueError for what
    either op refuses.
    """
    return torch.ops.custom_ops.rms_norm_group_quant(
        x,
        weight,
        eps,
        group_size,
        weight_mode=weight_mode,
        scale_layout=scale_layout,
        min_amax=min_amax,
    )


def add_rms_norm_group_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    *,
    weight_mode: str = "rounded",
    scale_layout: str = "row_major",
    min_amax: float = DEFAULT_MIN_AMAX,
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_rms_norm` and `group_quant` of its output in one pass over memory.

    Arguments as in those two ops; hidden_size is a multiple of group_size. Returns (q, scale,
    residual_out). Raises ValueError for what either op refuses.
    """
    return torch.ops.custom_ops.add_rms_norm_group_quant(
        x,
        residual,
        weight,
        eps,
        group_size,
        weight_mode=weight_mode,
        scale_layout=scale_layout,
        min_amax=min_amax,
    )


def _check_norm(op: str, x: Tensor, weight: Tensor, eps: float, weight_mode: str) -> None:
    check_activation(op, "x", x)
    check_device(op, "weight", weight, "x", x)
    if weight_mode not in WEIGHT_MODES:
        raise ValueError(
            f"{op}: weight_mode is {weight_mode!r}; accepted: {', '.join(WEIGHT_MODES)}"
        )
    if weight.dtype != x.dtype and (weight_mode == "rounded" or weight.dtype != torch.float32):
        accepted = f"{x.dtype}" if weight_mode == "rounded" else f"{x.dtype}, torch.float32"
        raise ValueError(
            f"{op}: weight.dtype is {weight.dtype}; accepted with weight_mode {weight_mode!r} and "
            f"x of {x.dtype}: {accepted}"
        )
    if not (
        isinstance(eps, torch.SymFloat) or 0.0 <= eps < math.inf
    ):  # a SymFloat is checked when it runs
        raise ValueError(f"{op}: eps is {eps}; accepted: a finite number >= 0")

    def shape() -> str:
        return f"{op}: weight.shape is {tuple(weight.shape)}; accepted: ({x.shape[-1]},), as x[-1]"

    require(weight.dim() == 1, shape)
    require(weight.shape[0] == x.shape[-1], shape)


def _check_rms_norm(x: Tensor, weight: Tensor, eps: float, *, weight_mode: str) -> None:
    _check_norm("rms_norm", x, weight, eps, weight_mode)


def _empty_rms_norm(x: Tensor, weight: Tensor, eps: float, *, weight_mode: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _check_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, weight_mode: str
) -> None:
    _check_norm("add_rms_norm", x, weight, eps, weight_mode)
    check_like("add_rms_norm", "residual", residual, "x", x)


def _empty_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, weight_mode: str
) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out, torch.empty_like(out)


def _check_rms_norm_group_quant(
    x: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    *,
    weight_mode: str,
    scale_layout: str,
    min_amax: float,
) -> None:
    _check_norm("rms_norm_group_quant", x, weight, eps, weight_mode)
    check_quant("rms_norm_group_quant", "x", x, group_size, scale_layout, min_amax)


def _empty_rms_norm_group_quant(
    x: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    *,
    weight_mode: str,
    scale_layout: str,
    min_amax: float,
) -> tuple[Tensor, Tensor]:
    return empty_quant(x, group_size, scale_layout)


def _check_add_rms_norm_group_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    *,
    weight_mode: str,
    scale_layout: str,
    min_amax: float,
) -> None:
    op = "add_rms_norm_group_quant"
    _check_norm(op, x, weight, eps, weight_mode)
    check_like(op, "residual", residual, "x", x)
    check_quant(op, "x", x, group_size, scale_layout, min_amax)


def _empty_add_rms_norm_group_quant(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    group_size: int,
    *,
    weight_mode: str,
    scale_layout: str,
    min_amax: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, scale = empty_quant(x, group_size, scale_layout)
    return q, scale, torch.empty(x.shape, dtype=x.dtype, device=x.device)


_KERNELS = "custom_ops.normalization.triton_kernels:"
_QUANT = "str weight_mode='rounded', str scale_layout='row_major', float min_amax=1e-10"

library.define(
    rms_norm,
    "(Tensor x, Tensor weight, float eps, *, str weight_mode='rounded') -> Tensor",
    check=_check_rms_norm,
    empty=_empty_rms_norm,
    reference=reference.rms_norm,
    implementations=(cuda("rms_norm"), triton(_KERNELS + "rms_norm")),
)
library.define(
    add_rms_norm,
    "(Tensor x, Tensor residual, Tensor weight, float eps, *, str weight_mode='rounded')"
    " -> (Tensor out, Tensor residual_out)",
    check=_check_add_rms_norm,
    empty=_empty_add_rms_norm,
    reference=reference.add_rms_norm,
    implementations=(cuda("add_rms_norm"), triton(_KERNELS + "add_rms_norm")),
)
library.define(
    rms_norm_group_quant,
    f"(Tensor x, Tensor weight, float eps, int group_size, *, {_QUANT})"
    " -> (Tensor q, Tensor scale)",
    check=_check_rms_norm_group_quant,
    empty=_empty_rms_norm_group_quant,
    reference=reference.rms_norm_group_quant,
    implementations=(
        cuda("rms_norm_group_quant"),
        triton(_KERNELS + "rms_norm_group_quant"),
    ),
)
library.define(
    add_rms_norm_group_quant,
    f"(Tensor x, Tensor residual, Tensor weight, float eps, int group_size, *, {_QUANT})"
    " -> (Tensor q, Tensor scale, Tensor residual_out)",
    check=_check_add_rms_norm_group_quant,
    empty=_empty_add_rms_norm_group_quant,
    reference=reference.add_rms_norm_group_quant,
    implementations=(
        cuda("add_rms_norm_group_quant"),
        triton(_KERNELS + "add_rms_norm_group_quant"),
    ),
)
