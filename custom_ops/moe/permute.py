"""Tokens to rows that lie by expert, and rows back to tokens: what surrounds a grouped GEMM.

Pairs, experts and the expert_map are as in `custom_ops.moe.align`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.implementation import cuda, triton
from custom_ops.library import require
from custom_ops.moe import permute_reference as reference
from custom_ops.moe.align import check_rows, indexing_kernel, padded_rows
from custom_ops.moe.checks import check_at_least, check_dims, check_dtype, check_ids, check_shape
from custom_ops.quantization.checks import check_activation, check_device
from custom_ops.quantization.ops import DYNAMIC_KEYWORDS, check_group
from custom_ops.scales import DEFAULT_MIN_AMAX, quant_spec


def moe_permute(
    x: Tensor,
    topk_ids: Tensor,
    num_experts: int,
    *,
    align: int = 1,
    expert_map: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copy each token to a row of each of its experts.

    x: bfloat16 or float16, [T, H], any strides. topk_ids: int32 or int64, [T, K]. num_experts: E, how many are here.
    align: the first row of every expert is a multiple of it (1: no padding; 128 for DeepGEMM). expert_map: int32.

    Returns, the last three int32:
    - rows [P, H], contiguous, P = `padded_rows(S, E, align)`; rows that are padding stay unwritten and hold whatever
      memory held.
    - row_of_pair [S]: -1 where the expert is elsewhere.
    - row_experts [P]: the expert of a row, -1 for padding.
    - offsets [E + 1]: the first row of each expert, and the rows in use. With align 1, offsets[1:] are the ends of
      groups that `torch._grouped_mm` takes.

    Raises ValueError for another dtype, number of dimensions, shape, device or number. No host synchronization.
    """
    return torch.ops.custom_ops.moe_permute(
        x, topk_ids, num_experts, align=align, expert_map=expert_map
    )


def moe_permute_group_quant(
    x: Tensor,
    topk_ids: Tensor,
    num_experts: int,
    group_size: int,
    *,
    align: int = 1,
    expert_map: Tensor | None = None,
    scale_layout: str = "row_major",
    min_amax: float = DEFAULT_MIN_AMAX,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: str = "float32",
    min_scale: float = 0.0,
    scale_mode: str = "divide",
    code_mode: str = "divide",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`moe_permute` of what `group_quant` makes of x, each token quantized once.

    x, topk_ids, num_experts, align, expert_map: as `moe_permute`. group_size and the other keywords: as
    `group_quant`, and so are the bits.

    Returns codes, of `dtype`, [P, H], contiguous; scale, that of a [P, H] tensor in its layout; row_of_pair,
    row_experts and offsets as `moe_permute`. Codes and scales of padding stay unwritten. Raises ValueError as
    `moe_permute` and `group_quant`.
    """
    return torch.ops.custom_ops.moe_permute_group_quant(
        x,
        topk_ids,
        num_experts,
        group_size,
        align=align,
        expert_map=expert_map,
        scale_layout=scale_layout,
        min_amax=min_amax,
        dtype=dtype,
        scale_format=scale_format,
        min_scale=min_scale,
        scale_mode=scale_mode,
        code_mode=code_mode,
    )


def moe_unpermute(rows: Tensor, row_of_pair: Tensor, topk_weights: Tensor) -> Tensor:
    """Add up the rows of each token with their weights.

    rows: bfloat16 or float16, [P, H], any strides. row_of_pair: int32, [S], below P; a pair with a negative row adds
    nothing. topk_weights: float32 or the dtype of rows, [T, K].

    Returns [T, H] of rows' dtype, contiguous: products in the promoted dtype of rows and weights (so rounded to
    rows' dtype unless the weights are float32), their sum in float32 from k = 0 on, one rounding. Every
    implementation equals the reference bit for bit. Raises ValueError for another dtype, shape or device.
    """
    return torch.ops.custom_ops.moe_unpermute(rows, row_of_pair, topk_weights)


def moe_reduce(
    y: Tensor,
    topk_weights: Tensor,
    *,
    topk_ids: Tensor | None = None,
    num_experts: int = 0,
    expert_map: Tensor | None = None,
) -> Tensor:
    """Add up the rows of each token with their weights, where rows lie by pair.

    y: bfloat16 or float16, [S, H], any strides. topk_weights: float32 or the dtype of y, [T, K]. topk_ids: None if
    every pair counts; otherwise, with num_experts and expert_map as in `moe_align_block_size`, pairs whose expert
    is elsewhere are not read.

    Returns [T, H] of y's dtype, as `moe_unpermute`, and raises as it does.
    """
    return torch.ops.custom_ops.moe_reduce(
        y, topk_weights, topk_ids=topk_ids, num_experts=num_experts, expert_map=expert_map
    )


def _check_rows(
    op: str,
    x: Tensor,
    topk_ids: Tensor,
    num_experts: int,
    align: int,
    expert_map: Tensor | None,
) -> None:
    check_activation(op, "x", x)
    check_dims(op, "x", x, 2)
    check_ids(op, topk_ids, num_experts, expert_map)
    check_device(op, "topk_ids", topk_ids, "x", x)
    require(
        topk_ids.shape[0] == x.shape[0],
        lambda: (
            f"{op}: topk_ids.shape is {tuple(topk_ids.shape)}; accepted: ({x.shape[0]}, K), as x has tokens"
        ),
    )
    check_at_least(op, "align", align, 1)
    check_rows(op, topk_ids, num_experts, align)


def _check_permute(
    x: Tensor, topk_ids: Tensor, num_experts: int, *, align: int, expert_map: Tensor | None
) -> None:
    _check_rows("moe_permute", x, topk_ids, num_experts, align, expert_map)


def _check_quant(
    x: Tensor,
    topk_ids: Tensor,
    num_experts: int,
    group_size: int,
    *,
    align: int,
    expert_map: Tensor | None,
    scale_layout: str,
    min_amax: float,
    dtype: torch.dtype,
    scale_format: str,
    min_scale: float,
    scale_mode: str,
    code_mode: str,
) -> None:
    op = "moe_permute_group_quant"
    _check_rows(op, x, topk_ids, num_experts, align, expert_map)
    check_group(
        op,
        "x",
        x,
        group_size,
        scale_layout=scale_layout,
        min_amax=min_amax,
        dtype=dtype,
        scale_format=scale_format,
        min_scale=min_scale,
        scale_mode=scale_mode,
        code_mode=code_mode,
    )


def _check_sum(
    op: str, name: str, rows: Tensor, topk_weights: Tensor, other: str, pairs: int
) -> None:
    """other, pairs: what has a row per pair, and how many."""
    check_activation(op, name, rows)
    check_dims(op, name, rows, 2)
    check_device(op, "topk_weights", topk_weights, name, rows)
    check_dtype(op, "topk_weights", topk_weights, (torch.float32, rows.dtype))
    check_dims(op, "topk_weights", topk_weights, 2)
    tokens, count = topk_weights.shape
    check_at_least(op, "the number of weights of a token", count, 1)
    require(
        tokens * count == pairs,
        lambda: (
            f"{op}: topk_weights.shape is {tuple(topk_weights.shape)}; accepted: a weight for each of the "
            f"{pairs} pairs of {other}"
        ),
    )


def _check_unpermute(rows: Tensor, row_of_pair: Tensor, topk_weights: Tensor) -> None:
    op = "moe_unpermute"
    check_dims(op, "row_of_pair", row_of_pair, 1)
    _check_sum(op, "rows", rows, topk_weights, "row_of_pair", row_of_pair.shape[0])
    check_device(op, "row_of_pair", row_of_pair, "rows", rows)
    check_dtype(op, "row_of_pair", row_of_pair, (torch.int32,))


def _check_reduce(
    y: Tensor,
    topk_weights: Tensor,
    *,
    topk_ids: Tensor | None,
    num_experts: int,
    expert_map: Tensor | None,
) -> None:
    op = "moe_reduce"
    check_dims(op, "y", y, 2)
    _check_sum(op, "y", y, topk_weights, "y", y.shape[0])
    if topk_ids is not None:
        check_ids(op, topk_ids, num_experts, expert_map)
        check_device(op, "topk_ids", topk_ids, "y", y)
        check_shape(op, "topk_ids", topk_ids, tuple(topk_weights.shape))
    elif expert_map is not None:
        raise ValueError(f"{op}: expert_map is given without topk_ids; accepted: both, or topk_ids")


def _empty_indices(
    topk_ids: Tensor, num_experts: int, align: int
) -> tuple[int, tuple[Tensor, Tensor, Tensor]]:
    pairs = topk_ids.shape[0] * topk_ids.shape[1]
    rows = padded_rows(pairs, num_experts, align)
    row_of_pair = torch.empty(pairs, dtype=torch.int32, device=topk_ids.device)
    return rows, (row_of_pair, row_of_pair.new_empty(rows), row_of_pair.new_empty(num_experts + 1))


def _empty_permute(
    x: Tensor, topk_ids: Tensor, num_experts: int, *, align: int, expert_map: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, indices = _empty_indices(topk_ids, num_experts, align)
    return torch.empty((rows, x.shape[1]), dtype=x.dtype, device=x.device), *indices


def _empty_quant(
    x: Tensor,
    topk_ids: Tensor,
    num_experts: int,
    group_size: int,
    *,
    align: int,
    expert_map: Tensor | None,
    scale_layout: str,
    min_amax: float,
    dtype: torch.dtype,
    scale_format: str,
    min_scale: float,
    scale_mode: str,
    code_mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, indices = _empty_indices(topk_ids, num_experts, align)
    spec = quant_spec(dtype, (1, group_size), scale_format, scale_layout)
    return *spec.empty((rows, x.shape[1]), x.device), *indices


def _empty_unpermute(rows: Tensor, row_of_pair: Tensor, topk_weights: Tensor) -> Tensor:
    shape = (topk_weights.shape[0], rows.shape[1])
    return torch.empty(shape, dtype=rows.dtype, device=rows.device)


def _empty_reduce(
    y: Tensor,
    topk_weights: Tensor,
    *,
    topk_ids: Tensor | None,
    num_experts: int,
    expert_map: Tensor | None,
) -> Tensor:
    return torch.empty((topk_weights.shape[0], y.shape[1]), dtype=y.dtype, device=y.device)


library.define(
    moe_permute,
    "(Tensor x, Tensor topk_ids, int num_experts, *, int align=1, Tensor? expert_map=None)"
    " -> (Tensor rows, Tensor row_of_pair, Tensor row_experts, Tensor offsets)",
    check=_check_permute,
    empty=_empty_permute,
    reference=reference.moe_permute,
    implementations=(indexing_kernel("moe_permute", ids=1),),
)
library.define(
    moe_permute_group_quant,
    "(Tensor x, Tensor topk_ids, int num_experts, int group_size, *, int align=1, Tensor? expert_map=None,"
    f" str scale_layout='row_major', {DYNAMIC_KEYWORDS})"
    " -> (Tensor codes, Tensor scale, Tensor row_of_pair, Tensor row_experts, Tensor offsets)",
    check=_check_quant,
    empty=_empty_quant,
    reference=reference.moe_permute_group_quant,
    implementations=(indexing_kernel("moe_permute_group_quant", ids=1),),
)
library.define(
    moe_unpermute,
    "(Tensor rows, Tensor row_of_pair, Tensor topk_weights) -> Tensor",
    check=_check_unpermute,
    empty=_empty_unpermute,
    reference=reference.moe_unpermute,
    implementations=(
        cuda("moe_unpermute"),
        triton("custom_ops.moe.permute_triton:moe_unpermute"),
    ),
)
library.define(
    moe_reduce,
    "(Tensor y, Tensor topk_weights, *, Tensor? topk_ids=None, int num_experts=0, Tensor? expert_map=None)"
    " -> Tensor",
    check=_check_reduce,
    empty=_empty_reduce,
    reference=reference.moe_reduce,
    implementations=(
        cuda("moe_reduce"),
        triton("custom_ops.moe.permute_triton:moe_reduce"),
    ),
)
