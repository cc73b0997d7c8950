"""SiLU-mul and group quantization between two masked grouped GEMMs: of each expert's rows as many as it has."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.activation import reference
from custom_ops.implementation import cuda, triton
from custom_ops.library import require
from custom_ops.quantization.checks import check_device
from custom_ops.quantization.ops import DYNAMIC_KEYWORDS, check_group
from custom_ops.scales import DEFAULT_MIN_AMAX, quant_spec


def silu_mul_group_quant_masked(
    gate_up: Tensor,
    counts: Tensor,
    group_size: int,
    *,
    scale_layout: str = "column_major_tma",
    min_amax: float = DEFAULT_MIN_AMAX,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: str = "float32",
    min_scale: float = 0.0,
    scale_mode: str = "divide",
    code_mode: str = "divide",
) -> tuple[Tensor, Tensor]:
    """`silu_mul_group_quant` of the first counts[e] rows of each expert e.

    gate_up: bfloat16 or float16, [num_experts, max_tokens, 2 * I], gate before up, any strides; I is a multiple
    of group_size. counts: int32, [num_experts], on the device of gate_up, where alone it is read; a count above
    max_tokens counts as max_tokens. group_size and the keywords: as in `group_quant`.

    Returns q, of `dtype`, [num_experts, max_tokens, I], contiguous, and scale, float32, [num_experts,
    max_tokens, I // group_size] (int32 and a quarter as wide if packed): for each expert the scale of a
    [max_tokens, I] tensor in its layout, one after the other, which is what DeepGEMM's masked grouped GEMM
    reads. Rows past the count are not read and stay unwritten: q and scale hold there whatever memory held.

    Raises ValueError for another dtype, number of dimensions, shape or device, and as `group_quant`.
    """
    return torch.ops.custom_ops.silu_mul_group_quant_masked(
        gate_up,
        counts,
        group_size,
        scale_layout=scale_layout,
        min_amax=min_amax,
        dtype=dtype,
        scale_format=scale_format,
        min_scale=min_scale,
        scale_mode=scale_mode,
        code_mode=code_mode,
    )


def _check(
    gate_up: Tensor,
    counts: Tensor,
    group_size: int,
    *,
    scale_layout: str,
    min_amax: float,
    dtype: torch.dtype,
    scale_format: str,
    min_scale: float,
    scale_mode: str,
    code_mode: str,
) -> None:
    op = "silu_mul_group_quant_masked"
    if gate_up.dim() != 3:
        raise ValueError(f"{op}: gate_up has {gate_up.dim()} dimensions; accepted: 3")
    check_group(
        op,
        "gate_up",
        gate_up,
        group_size,
        scale_layout=scale_layout,
        min_amax=min_amax,
        dtype=dtype,
        scale_format=scale_format,
        min_scale=min_scale,
        scale_mode=scale_mode,
        code_mode=code_mode,
    )
    require(
        gate_up.shape[-1] % (2 * group_size) == 0,
        lambda: (
            f"{op}: the last dimension of gate_up is {gate_up.shape[-1]}; accepted: a multiple of "
            f"2 * group_size = {2 * group_size}"
        ),
    )
    check_device(op, "counts", counts, "gate_up", gate_up)
    if counts.dtype != torch.int32:
        raise ValueError(f"{op}: counts.dtype is {counts.dtype}; accepted: torch.int32")

    def shape() -> str:
        return f"{op}: counts.shape is {tuple(counts.shape)}; accepted: ({gate_up.shape[0]},)"

    require(counts.dim() == 1, shape)
    require(counts.shape[0] == gate_up.shape[0], shape)


def _empty(
    gate_up: Tensor,
    counts: Tensor,
    group_size: int,
    *,
    scale_layout: str,
    min_amax: float,
    dtype: torch.dtype,
    scale_format: str,
    min_scale: float,
    scale_mode: str,
    code_mode: str,
) -> tuple[Tensor, Tensor]:
    experts, tokens, width = gate_up.shape
    spec = quant_spec(dtype, (1, group_size), scale_format, scale_layout)
    return spec.empty_of_experts((experts, tokens, width // 2), gate_up.device)


library.define(
    silu_mul_group_quant_masked,
    f"(Tensor gate_up, Tensor counts, int group_size, *, str scale_layout='column_major_tma', {DYNAMIC_KEYWORDS})"
    " -> (Tensor q, Tensor scale)",
    check=_check,
    empty=_empty,
    reference=reference.silu_mul_group_quant_masked,
    implementations=(
        cuda("silu_mul_group_quant_masked"),
        triton("custom_ops.activation.masked_triton:silu_mul_group_quant_masked"),
    ),
)
