"""The semantics of `custom_ops.fused_moe` in plain PyTorch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from custom_ops.gemm.reference import BLOCK, block_scaled_mm
from custom_ops.moe.activation import Activation
from custom_ops.quantization.reference import group_quant


def local_experts(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None) -> Tensor:
    """The local expert of each pair, int64 of the shape of topk_ids; -1 for a pair whose expert is not here."""
    ids = topk_ids.long()
    if expert_map is not None:
        inside = (ids >= 0) & (ids < expert_map.shape[0])
        # An empty map has no element to look at.
        padded = torch.cat([expert_map.long(), expert_map.new_full((1,), -1, dtype=torch.long)])
        ids = torch.where(inside, padded[torch.where(inside, ids, -1)], -1)
    return torch.where((ids >= 0) & (ids < num_experts), ids, -1)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    x_scale: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    min_amax: float,
    scale_mode: str,
    code_mode: str,
) -> Tensor:
    """One product of one expert: [M, K] by [N, K] to [M, N] of a dtype, by default that of x. x_scale: of codes."""
    dtype = x.dtype if dtype is None else dtype
    if x_scale is not None and scale is not None:
        y = block_scaled_mm(x, x_scale, weight, scale, out_dtype=dtype)
    elif scale is None:
        y = (x.float() @ weight.float().t()).to(x.dtype)
    elif weight.dtype == torch.int8:
        y = ((x.float() @ weight.float().t()) * scale).to(x.dtype)
    else:
        padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % BLOCK))
        codes, x_scale = group_quant(
            padded, BLOCK, min_amax=min_amax, scale_mode=scale_mode, code_mode=code_mode
        )
        y = block_scaled_mm(codes[:, : x.shape[-1]], x_scale, weight, scale, out_dtype=dtype)
    return y if bias is None else y + bias


def reduce(pairs: Tensor, topk_weights: Tensor, here: Tensor) -> Tensor:
    """[T, K, H] results of pairs to [T, H]: products in the promoted dtype, then a float32 sum over k in order."""
    products = (pairs * topk_weights.unsqueeze(-1)).float()
    total = torch.zeros_like(products[:, 0])
    for k in range(pairs.shape[1]):
        # not a product with 0, which keeps a NaN
        total = total + torch.where(here[:, k, None], products[:, k], 0.0)
    return total.to(pairs.dtype)


def fused_moe(
    hidden_states: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu_mul",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    expert_map: Tensor | None = None,
    min_amax: float = 1e-10,
    scale_mode: str = "divide",
    code_mode: str = "divide",
    hidden_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    routed_experts: int = 0,
    up: Tensor | None = None,
) -> Tensor:
    """`custom_ops.fused_moe`, expert by expert. It reads on the host how many pairs an expert has."""
    act = Activation(activation, interleaved, alpha, limit)
    dtype = hidden_states.dtype if hidden_scale is None else out_dtype
    product = partial(
        linear, dtype=dtype, min_amax=min_amax, scale_mode=scale_mode, code_mode=code_mode
    )
    experts = local_experts(topk_ids, gate_up.shape[0], expert_map)
    num_tokens, top_k = topk_ids.shape
    pairs = hidden_states.new_zeros(num_tokens * top_k, hidden_states.shape[1], dtype=dtype)

    def of(tensor: Tensor | None, expert: int) -> Tensor | None:
        return None if tensor is None else tensor[expert]

    for expert in experts.unique().tolist():
        if expert < 0:
            continue
        weight = gate_up[expert] if up is None else torch.cat([gate_up[expert], up[expert]])
        chosen = (experts.flatten() == expert).nonzero().flatten()
        tokens = chosen // top_k
        x, x_scale = hidden_states[tokens], None if hidden_scale is None else hidden_scale[tokens]
        first = product(x, weight, of(gate_up_bias, expert), of(gate_up_scale, expert), x_scale)
        between = act.reference(first)
        second = product(between, down[expert], of(down_bias, expert), of(down_scale, expert))
        pairs[chosen] = second
    return reduce(pairs.view(num_tokens, top_k, pairs.shape[1]), topk_weights, experts >= 0)
