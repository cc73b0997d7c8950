"""`moe_unpermute` and `moe_reduce` in Triton: a program to some columns of a token.

Grouping pairs by expert has no Triton implementation: it is a stable sort of all pairs, which programs that cannot
wait for each other would do in several launches, as the reference does with PyTorch's sort and scan.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from custom_ops.platform import on_device
from custom_ops.scales import as_rows
from custom_ops.triton_math import round_to, to_float32

COLUMNS = 1024


@triton.jit
def _sum(
    rows_ptr, index_ptr, map_ptr, weights_ptr, out_ptr, cols, known, experts, rows_step,
    weights_row, weights_col, index_row, index_col, map_step,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, BY: tl.constexpr, MAP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    T: tl.constexpr = rows_ptr.dtype.element_ty
    for k in range(TOP_K):
        row = token * TOP_K + k
        here = row >= 0
        if BY != "pair":
            index = tl.load(index_ptr + token * index_row + k * index_col).to(tl.int64)
            here = index >= 0
            if BY == "row":
                row = index
            else:
                here = here & (index < known)
                if MAP:
                    index = tl.load(map_ptr + index * map_step, mask=here, other=-1).to(tl.int64)
                here = here & (index >= 0) & (index < experts)
        mask = (column < cols) & here
        v = to_float32(tl.load(rows_ptr + row * rows_step + column, mask=mask, other=0.0))
        weight = tl.load(weights_ptr + token * weights_row + k * weights_col)
        product = v * to_float32(weight)
        if weight.dtype != tl.float32:
            product = to_float32(round_to(product, T))
        total += tl.where(mask, product, 0.0)
    tl.store(out_ptr + token * cols + column, round_to(total, T), mask=column < cols)


def _weighted_sum(
    rows: Tensor,
    topk_weights: Tensor,
    index: Tensor | None,
    by: str,
    num_experts: int = 0,
    expert_map: Tensor | None = None,
) -> Tensor:
    """index: [T, K] or None; what it holds says `by`: rows, experts, or nothing."""
    rows = as_rows(rows)
    tokens, count = topk_weights.shape
    cols = rows.shape[1]
    out = torch.empty((tokens, cols), dtype=rows.dtype, device=rows.device)
    if out.numel() == 0:
        return out
    known = num_experts if expert_map is None else expert_map.shape[0]
    block = min(COLUMNS, triton.next_power_of_2(cols))
    with on_device(rows):
        _sum[(tokens, triton.cdiv(cols, block))](
            rows,
            rows if index is None else index,
            rows if expert_map is None else expert_map,
            topk_weights,
            out,
            cols,
            known,
            num_experts,
            rows.stride(0),
            *topk_weights.stride(),
            *((0, 0) if index is None else index.stride()),
            0 if expert_map is None else expert_map.stride(0),
            TOP_K=count,
            BLOCK=block,
            BY=by,
            MAP=expert_map is not None,
            num_warps=4,
            enable_fp_fusion=False,  # a product is rounded before it is added
        )
    return out


def moe_unpermute(rows: Tensor, row_of_pair: Tensor, topk_weights: Tensor) -> Tensor:
    """As `custom_ops.moe_unpermute`."""
    return _weighted_sum(rows, topk_weights, row_of_pair.view(topk_weights.shape), "row")


def moe_reduce(
    y: Tensor,
    topk_weights: Tensor,
    *,
    topk_ids: Tensor | None,
    num_experts: int,
    expert_map: Tensor | None,
) -> Tensor:
    """As `custom_ops.moe_reduce`."""
    by = "pair" if topk_ids is None else "expert"
    return _weighted_sum(y, topk_weights, topk_ids, by, num_experts, expert_map)
