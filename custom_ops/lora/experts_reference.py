"""The semantics of `custom_ops.fused_moe_lora` in plain PyTorch: pair by pair of an expert and a slot."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.moe import reference
from custom_ops.moe.activation import Activation


def fused_moe_lora(
    hidden_states: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up_a: Tensor,
    gate_up_b: Tensor,
    down_a: Tensor,
    down_b: Tensor,
    scaling: Tensor,
    ranks: Tensor,
    token_slots: Tensor,
    *,
    activation: str = "silu_mul",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """`custom_ops.fused_moe_lora`. It reads on the host which experts and slots there are."""
    act = Activation(activation, interleaved, alpha, limit)
    tokens, top_k = topk_ids.shape
    experts = reference.local_experts(topk_ids, gate_up.shape[0], None)
    slot_of_pair = token_slots[:tokens].long()[:, None].expand(tokens, top_k).flatten()
    pairs = hidden_states.new_zeros(tokens * top_k, hidden_states.shape[1])
    both = torch.stack([experts.flatten(), slot_of_pair], 1)
    for expert, slot in both.unique(dim=0).tolist():
        if expert < 0:
            continue
        chosen = (both == torch.tensor([expert, slot], device=both.device)).all(1).nonzero()[:, 0]
        at = (slot, expert) if slot >= 0 else None
        weights = gate_up, gate_up_bias, gate_up_a, gate_up_b
        first = _linear(hidden_states[chosen // top_k], expert, at, *weights, scaling, ranks)
        weights = down, down_bias, down_a, down_b
        pairs[chosen] = _linear(act.reference(first), expert, at, *weights, scaling, ranks)
    by_token = pairs.view(tokens, top_k, pairs.shape[1])
    return reference.reduce(by_token, topk_weights, experts >= 0)


def _linear(
    x: Tensor,
    expert: int,
    adapter: tuple[int, int] | None,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: Tensor,
    ranks: Tensor,
) -> Tensor:
    """One linear of one expert. adapter: the slot and the expert of its adapter, or None without one."""
    base = (x.float() @ weight[expert].float().t()).to(x.dtype)
    if bias is not None:
        base = base + bias[expert]
    if adapter is None:
        return base
    rank = int(ranks[adapter[0]])
    y = x.float() @ a[adapter][:rank].float().t()
    return (base.float() + y @ b[adapter][:, :rank].float().t() * scaling[adapter[0]]).to(x.dtype)
