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

from functools import partial

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.implementation import cuda, triton
from custom_ops.library import require
from custom_ops.normalization import reference
from custom_ops.quantization.asymmetric import (
    TENSOR_QUANT_ASYMMETRIC,
    TENSOR_QUANT_STATIC_ASYMMETRIC,
    TOKEN_QUANT_ASYMMETRIC,
)
from custom_ops.quantization.checks import (
    check_activation,
    check_bound,
    check_choice,
    check_device,
    check_like,
)
from custom_ops.quantization.fused import Producer, fuse
from custom_ops.quantization.ops import (
    GROUP_QUANT,
    TENSOR_QUANT,
    TENSOR_QUANT_STATIC,
    TOKEN_QUANT,
)

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


def _check_norm(op: str, x: Tensor, weight: Tensor, eps: float, *, weight_mode: str) -> None:
    check_activation(op, "x", x)
    check_device(op, "weight", weight, "x", x)
    check_choice(op, "weight_mode", weight_mode, WEIGHT_MODES)
    if weight.dtype != x.dtype and (weight_mode == "rounded" or weight.dtype != torch.float32):
        accepted = f"{x.dtype}" if weight_mode == "rounded" else f"{x.dtype}, torch.float32"
        raise ValueError(
            f"{op}: weight.dtype is {weight.dtype}; accepted with weight_mode {weight_mode!r} and "
            f"x of {x.dtype}: {accepted}"
        )
    check_bound(op, "eps", eps)

    def shape() -> str:
        return f"{op}: weight.shape is {tuple(weight.shape)}; accepted: ({x.shape[-1]},), as x[-1]"

    require(weight.dim() == 1, shape)
    require(weight.shape[0] == x.shape[-1], shape)


def _check_add_norm(
    op: str, x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, weight_mode: str
) -> None:
    _check_norm(op, x, weight, eps, weight_mode=weight_mode)
    check_like(op, "residual", residual, "x", x)


def _empty_norm(x: Tensor, weight: Tensor, eps: float, *, weight_mode: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _empty_add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, weight_mode: str
) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out, torch.empty_like(out)


_KERNELS = "custom_ops.normalization.triton_kernels"

RMS_NORM = Producer(
    library.define(
        rms_norm,
        "(Tensor x, Tensor weight, float eps, *, str weight_mode='rounded') -> Tensor",
        check=partial(_check_norm, "rms_norm"),
        empty=_empty_norm,
        reference=reference.rms_norm,
        implementations=(cuda("rms_norm"), triton(f"{_KERNELS}:rms_norm")),
    ),
    _check_norm,
    _KERNELS,
)
ADD_RMS_NORM = Producer(
    library.define(
        add_rms_norm,
        "(Tensor x, Tensor residual, Tensor weight, float eps, *, str weight_mode='rounded')"
        " -> (Tensor out, Tensor residual_out)",
        check=partial(_check_add_norm, "add_rms_norm"),
        empty=_empty_add_norm,
        reference=reference.add_rms_norm,
        implementations=(cuda("add_rms_norm"), triton(f"{_KERNELS}:add_rms_norm")),
    ),
    _check_add_norm,
    _KERNELS,
    residual=True,
)

rms_norm_group_quant = fuse(RMS_NORM, GROUP_QUANT)
rms_norm_and_group_quant = fuse(RMS_NORM, GROUP_QUANT, keep=True)
rms_norm_token_quant = fuse(RMS_NORM, TOKEN_QUANT)
rms_norm_and_token_quant = fuse(RMS_NORM, TOKEN_QUANT, keep=True)
rms_norm_token_quant_asymmetric = fuse(RMS_NORM, TOKEN_QUANT_ASYMMETRIC)
rms_norm_tensor_quant = fuse(RMS_NORM, TENSOR_QUANT)
rms_norm_tensor_quant_asymmetric = fuse(RMS_NORM, TENSOR_QUANT_ASYMMETRIC)
rms_norm_tensor_quant_static = fuse(RMS_NORM, TENSOR_QUANT_STATIC)
rms_norm_tensor_quant_static_asymmetric = fuse(RMS_NORM, TENSOR_QUANT_STATIC_ASYMMETRIC)
add_rms_norm_group_quant = fuse(ADD_RMS_NORM, GROUP_QUANT)
add_rms_norm_and_group_quant = fuse(ADD_RMS_NORM, GROUP_QUANT, keep=True)
add_rms_norm_token_quant = fuse(ADD_RMS_NORM, TOKEN_QUANT)
add_rms_norm_and_token_quant = fuse(ADD_RMS_NORM, TOKEN_QUANT, keep=True)
add_rms_norm_token_quant_asymmetric = fuse(ADD_RMS_NORM, TOKEN_QUANT_ASYMMETRIC)
add_rms_norm_tensor_quant = fuse(ADD_RMS_NORM, TENSOR_QUANT)
add_rms_norm_tensor_quant_asymmetric = fuse(ADD_RMS_NORM, TENSOR_QUANT_ASYMMETRIC)
add_rms_norm_tensor_quant_static = fuse(ADD_RMS_NORM, TENSOR_QUANT_STATIC)
add_rms_norm_tensor_quant_static_asymmetric = fuse(ADD_RMS_NORM, TENSOR_QUANT_STATIC_ASYMMETRIC)
