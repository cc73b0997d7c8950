"""SiLU-mul (the gate of a SwiGLU MLP), alone and with group quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.activation import reference
from custom_ops.implementation import cuda, triton
from custom_ops.quantization.ops import check_activation, check_like, check_quant, empty_quant
from custom_ops.scales import DEFAULT_MIN_AMAX


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


def silu_mul_group_quant(
    gate: Tensor,
    up: Tensor,
    group_size: int,
    *,
    scale_layout: str = "row_major",
    min_amax: float = DEFAULT_MIN_AMAX,
) -> tuple[Tensor, Tensor]:
    """`group_quant(silu_mul(gate, up), group_size, ...)` in one pass over memory.

    gate, up: as in `silu_mul`, with I a multiple of group_size. Returns (q, scale) as `group_quant` does.
    The product is rounded to the input dtype before it is quantized, as in the composition. Raises
    ValueError for what either of the two ops refuses.
    """
    return torch.ops.custom_ops.silu_mul_group_quant(
        gate, up, group_size, scale_layout=scale_layout, min_amax=min_amax
    )


def _check(gate: Tensor, up: Tensor) -> None:
    check_activation("silu_mul", "gate", gate)
    check_like("silu_mul", "up", up, "gate", gate)


def _empty(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _check_quant(
    gate: Tensor, up: Tensor, group_size: int, *, scale_layout: str, min_amax: float
) -> None:
    op = "silu_mul_group_quant"
    check_activation(op, "gate", gate)
    check_like(op, "up", up, "gate", gate)
    check_quant(op, "gate", gate, group_size, scale_layout, min_amax)


def _empty_quant(
    gate: Tensor, up: Tensor, group_size: int, *, scale_layout: str, min_amax: float
) -> tuple[Tensor, Tensor]:
    return empty_quant(gate, group_size, scale_layout)


library.define(
    silu_mul,
    "(Tensor gate, Tensor up) -> Tensor",
    check=_check,
    empty=_empty,
    reference=reference.silu_mul,
    implementations=(
        cuda("silu_mul"),
        triton("custom_ops.activation.triton_kernels:silu_mul"),
    ),
)
library.define(
    silu_mul_group_quant,
    "(Tensor gate, Tensor up, int group_size, *, str scale_layout='row_major', float min_amax=1e-10)"
    " -> (Tensor q, Tensor scale)",
    check=_check_quant,
    empty=_empty_quant,
    reference=reference.silu_mul_group_quant,
    implementations=(
        cuda("silu_mul_group_quant"),
        triton("custom_ops.activation.triton_kernels:silu_mul_group_quant"),
    ),
)
