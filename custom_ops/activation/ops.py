"""Gated activations of MLPs, alone and with the quantization of what they return."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.activation import reference
from custom_ops.implementation import cuda, triton
from custom_ops.quantization.asymmetric import (
    TENSOR_QUANT_ASYMMETRIC,
    TENSOR_QUANT_STATIC_ASYMMETRIC,
    TOKEN_QUANT_ASYMMETRIC,
)
from custom_ops.quantization.checks import check_activation, check_bound, check_like
from custom_ops.quantization.fused import Producer, fuse
from custom_ops.quantization.ops import (
    GROUP_QUANT,
    TENSOR_QUANT,
    TENSOR_QUANT_STATIC,
    TOKEN_QUANT,
)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up.

    gate, up: bfloat16 or float16 (the same), [..., I], any strides: the two halves of a packed
    [..., 2 * I] tensor are read in place. Returns [..., I], contiguous. With T the dtype:

        s   = T(g / (1 + exp(-g)))        in float32, g = float32(gate)
        out = T(float32(s) * float32(up))

    An exp is not reproducible bit for bit between libraries: in at most 1e-4 of the elements s differs
    by one step of T, and out by up to two. Raises ValueError when dtypes, shapes or
    devices differ. Source: torch.nn.functional.silu, arXiv:2002.05202.
    """
    return torch.ops.custom_ops.silu_mul(gate, up)


def gelu_tanh_mul(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate, approximate="tanh") * up.

    gate, up: as in `silu_mul`. Returns [..., I], contiguous. With T the dtype, g = float32(gate):

        s   = T(0.5 * g * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g^3))))        in float32
        out = T(float32(s) * float32(up))

    A tanh is not reproducible bit for bit between libraries: in at most 1e-3 of the elements s differs by one
    step of T, and out by up to two; for g below -3, where 1 + tanh cancels, by as much as one float32 step of
    the tanh makes of it. Raises ValueError as `silu_mul`. Source: torch.nn.functional.gelu, arXiv:1606.08415.
    """
    return torch.ops.custom_ops.gelu_tanh_mul(gate, up)


def clamped_swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """The gated activation of gpt-oss: (clamp(up) + 1) * gate * sigmoid(alpha * gate), gate clamped from above.

    gate, up: as in `silu_mul`; the even and odd columns of one interleaved [..., 2 * I] tensor are read in
    place too. alpha: finite (1.702 in gpt-oss). limit: finite and >= 0 (7). Returns [..., I], contiguous.
    With T the dtype, float32 within each T(...):

        g   = min(gate, T(limit)),  u = max(min(up, T(limit)), T(-limit))        NaN stays NaN
        glu = T(g * T(sigmoid(T(g * alpha))))
        out = T(T(u + 1) * glu)

    As in `silu_mul`, in at most 1e-4 of the elements the sigmoid differs by one step of T, and out by up to
    three. Raises ValueError as `silu_mul`, and for another alpha or limit. Source: the gpt-oss model card.
    """
    return torch.ops.custom_ops.clamped_swiglu(gate, up, alpha, limit)


def _check_pair(op: str, gate: Tensor, up: Tensor) -> None:
    check_activation(op, "gate", gate)
    check_like(op, "up", up, "gate", gate)


def _check_clamped(op: str, gate: Tensor, up: Tensor, alpha: float, limit: float) -> None:
    _check_pair(op, gate, up)
    if not (isinstance(alpha, torch.SymFloat) or math.isfinite(alpha)):
        raise ValueError(f"{op}: alpha is {alpha}; accepted: a finite number")
    check_bound(op, "limit", limit)


def _empty(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _empty_clamped(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


_KERNELS = "custom_ops.activation.triton_kernels"

SILU_MUL = Producer(
    library.define(
        silu_mul,
        "(Tensor gate, Tensor up) -> Tensor",
        check=partial(_check_pair, "silu_mul"),
        empty=_empty,
        reference=reference.silu_mul,
        implementations=(cuda("silu_mul"), triton(f"{_KERNELS}:silu_mul")),
    ),
    _check_pair,
    _KERNELS,
)
GELU_TANH_MUL = Producer(
    library.define(
        gelu_tanh_mul,
        "(Tensor gate, Tensor up) -> Tensor",
        check=partial(_check_pair, "gelu_tanh_mul"),
        empty=_empty,
        reference=reference.gelu_tanh_mul,
        implementations=(cuda("gelu_tanh_mul"), triton(f"{_KERNELS}:gelu_tanh_mul")),
    ),
    _check_pair,
    _KERNELS,
)
CLAMPED_SWIGLU = Producer(
    library.define(
        clamped_swiglu,
        "(Tensor gate, Tensor up, float alpha, float limit) -> Tensor",
        check=partial(_check_clamped, "clamped_swiglu"),
        empty=_empty_clamped,
        reference=reference.clamped_swiglu,
        implementations=(cuda("clamped_swiglu"), triton(f"{_KERNELS}:clamped_swiglu")),
    ),
    _check_clamped,
    _KERNELS,
)

silu_mul_group_quant = fuse(SILU_MUL, GROUP_QUANT)
silu_mul_token_quant = fuse(SILU_MUL, TOKEN_QUANT)
silu_mul_token_quant_asymmetric = fuse(SILU_MUL, TOKEN_QUANT_ASYMMETRIC)
silu_mul_tensor_quant = fuse(SILU_MUL, TENSOR_QUANT)
silu_mul_tensor_quant_asymmetric = fuse(SILU_MUL, TENSOR_QUANT_ASYMMETRIC)
silu_mul_tensor_quant_static = fuse(SILU_MUL, TENSOR_QUANT_STATIC)
silu_mul_tensor_quant_static_asymmetric = fuse(SILU_MUL, TENSOR_QUANT_STATIC_ASYMMETRIC)
gelu_tanh_mul_group_quant = fuse(GELU_TANH_MUL, GROUP_QUANT)
gelu_tanh_mul_token_quant = fuse(GELU_TANH_MUL, TOKEN_QUANT)
gelu_tanh_mul_token_quant_asymmetric = fuse(GELU_TANH_MUL, TOKEN_QUANT_ASYMMETRIC)
gelu_tanh_mul_tensor_quant = fuse(GELU_TANH_MUL, TENSOR_QUANT)
gelu_tanh_mul_tensor_quant_asymmetric = fuse(GELU_TANH_MUL, TENSOR_QUANT_ASYMMETRIC)
gelu_tanh_mul_tensor_quant_static = fuse(GELU_TANH_MUL, TENSOR_QUANT_STATIC)
gelu_tanh_mul_tensor_quant_static_asymmetric = fuse(GELU_TANH_MUL, TENSOR_QUANT_STATIC_ASYMMETRIC)
clamped_swiglu_group_quant = fuse(CLAMPED_SWIGLU, GROUP_QUANT)
clamped_swiglu_token_quant = fuse(CLAMPED_SWIGLU, TOKEN_QUANT)
clamped_swiglu_token_quant_asymmetric = fuse(CLAMPED_SWIGLU, TOKEN_QUANT_ASYMMETRIC)
clamped_swiglu_tensor_quant = fuse(CLAMPED_SWIGLU, TENSOR_QUANT)
clamped_swiglu_tensor_quant_asymmetric = fuse(CLAMPED_SWIGLU, TENSOR_QUANT_ASYMMETRIC)
clamped_swiglu_tensor_quant_static = fuse(CLAMPED_SWIGLU, TENSOR_QUANT_STATIC)
clamped_swiglu_tensor_quant_static_asymmetric = fuse(CLAMPED_SWIGLU, TENSOR_QUANT_STATIC_ASYMMETRIC)
