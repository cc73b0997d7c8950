"""Tokens to rows by expert and back in plain PyTorch, on any device and without host synchronization."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.moe.align_reference import Groups, _local_experts, group_pairs
from custom_ops.quantization import reference as quantization
from custom_ops.scales import quant_spec


def moe_permute(
    x: Tensor, topk_ids: Tensor, num_experts: int, *, align: int, expert_map: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    groups = group_pairs(topk_ids, align, num_experts, expert_map)
    rows = x.index_select(0, _token_of_row(groups, topk_ids))
    return rows.contiguous(), *_indices(groups)


def moe_permute_group_quant(
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
    codes, scale = quantization.group_quant(
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
    groups = group_pairs(topk_ids, align, num_experts, expert_map)
    token = _token_of_row(groups, topk_ids)
    spec = quant_spec(dtype, (1, group_size), scale_format, scale_layout)
    rows, row_scale = spec.empty((groups.rows, x.shape[1]), x.device)
    rows.view(torch.uint8).copy_(codes.view(torch.uint8).index_select(0, token))
    row_scale.copy_(scale.index_select(0, token))
    return rows, row_scale, *_indices(groups)


def _token_of_row(groups: Groups, topk_ids: Tensor) -> Tensor:
    """int32 [P]; padding, which may hold anything, holds the first token."""
    pair = torch.arange(topk_ids.numel(), device=topk_ids.device)
    return groups.scatter(pair // topk_ids.shape[1], 0)


def _indices(groups: Groups) -> tuple[Tensor, Tensor, Tensor]:
    return (
        groups.row_of_pair.to(torch.int32),
        groups.scatter(groups.expert_of_pair, -1),
        groups.offsets.to(torch.int32),
    )


def moe_unpermute(rows: Tensor, row_of_pair: Tensor, topk_weights: Tensor) -> Tensor:
    of_pairs = rows.index_select(0, row_of_pair.clamp(min=0))
    return _weighted_sum(of_pairs, topk_weights, row_of_pair >= 0)


def moe_reduce(
    y: Tensor,
    topk_weights: Tensor,
    *,
    topk_ids: Tensor | None,
    num_experts: int,
    expert_map: Tensor | None,
) -> Tensor:
    here = None
    if topk_ids is not None:
        here = _local_experts(topk_ids, num_experts, expert_map) < num_experts
    return _weighted_sum(y, topk_weights, here)


def _weighted_sum(of_pairs: Tensor, topk_weights: Tensor, here: Tensor | None) -> Tensor:
    """[S, H] and [T, K] to [T, H]: products in their promoted dtype, added in float32 from k = 0 on."""
    tokens, count = topk_weights.shape
    width = of_pairs.shape[1]
    products = of_pairs.reshape(tokens, count, width) * topk_weights[..., None]
    if here is not None:
        products = products.masked_fill(~here.view(tokens, count, 1), 0.0)
    out = torch.zeros(tokens, width, dtype=torch.float32, device=of_pairs.device)
    for k in range(count):
        out = out + products[:, k].float()
    return out.to(of_pairs.dtype)
