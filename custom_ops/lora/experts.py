"""A mixture of experts whose experts have adapters, another one for every token of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.implementation import triton
from custom_ops.library import require
from custom_ops.lora import experts_reference as reference
from custom_ops.lora.checks import check_rank, check_shape
from custom_ops.moe import activation as activations
from custom_ops.quantization.checks import ACTIVATION_DTYPES, check_choice, check_device
from custom_ops.scales import known

_OP = "fused_moe_lora"
ID_DTYPES = (torch.int32, torch.int64)


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
    """`fused_moe` with an adapter on both linears of each expert, of the slot that a token has in a batch.

    T = num_tokens, H = hidden_size, I = intermediate_size, E = num_experts, R = rank, from 1 to 256. hidden_states:
    bfloat16 or float16, [T, H]. gate_up [E, 2 * I, H] ([E, I, H] for "relu2"), down [E, H, I], topk_weights, topk_ids
    [T, K], activation, interleaved, alpha, limit, gate_up_bias, down_bias: as for `fused_moe`, weights of 16 bits.
    gate_up_a: [slots, E, R, H], gate_up_b: [slots, E, 2 * I, R], down_a: [slots, E, R, I], down_b: [slots, E, H, R],
    contiguous, of the dtype of hidden_states. scaling: float32 [slots]. ranks: int32 [slots], the rank of the adapter
    in a slot, up to R: what lies from there to the next multiple of 16 must be zero, what is after that is never read.
    token_slots: int32, [T or more], as of a `LoRABatch`; -1 is no adapter. It is read from the device when the kernels
    run. Returns [T, H], contiguous. With T one rounding to the dtype of hidden_states, for a pair of a token and an
    expert:

        a = T(T(x @ gate_up.T + bias) + ((x @ gate_up_a.T) @ gate_up_b.T) * scaling)        x the hidden state
        b = activation(a)
        c = T(T(b @ down.T + bias) + ((b @ down_a.T) @ down_b.T) * scaling)

    and the sum over the pairs of a token as in `fused_moe`; a bias is added to what is rounded, as there. A pair whose
    expert is not in [0, E) adds nothing. Order and precision of the sums within a product are the implementation's.
    Nothing waits for the device, except in the reference. Implementations: Triton, reference. Raises ValueError for
    another dtype, shape, stride or device. Source: arXiv:2106.09685, arXiv:2101.03961.
    """
    return torch.ops.custom_ops.fused_moe_lora(
        *(hidden_states, gate_up, down, topk_weights, topk_ids),
        *(gate_up_a, gate_up_b, down_a, down_b, scaling, ranks, token_slots),
        activation=activation,
        interleaved=interleaved,
        alpha=alpha,
        limit=limit,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
    )


def _check(
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
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> None:
    activations.check(_OP, activation, interleaved, alpha, limit)
    dtype = hidden_states.dtype
    check_choice(_OP, "hidden_states.dtype", dtype, ACTIVATION_DTYPES)
    check_choice(_OP, "topk_ids.dtype", topk_ids.dtype, ID_DTYPES)
    check_choice(_OP, "topk_weights.dtype", topk_weights.dtype, (torch.float32, dtype))
    check_shape(_OP, "hidden_states", hidden_states, (None, None), "[num_tokens, hidden_size]")
    words = "[num_experts, 2 * intermediate_size, hidden_size]"
    check_shape(_OP, "gate_up", gate_up, (None, None, None), words)
    tokens, hidden = hidden_states.shape
    experts, rows, _ = gate_up.shape
    require(
        activation == "relu2" or rows % 2 == 0,
        lambda: f"{_OP}: gate_up.shape[1] is {rows}; accepted for {activation!r}: an even number",
    )
    width = rows if activation == "relu2" else rows // 2
    check_shape(_OP, "gate_up_a", gate_up_a, (None, None, None, None), "[slots, E, rank, H]")
    slots, _, rank, _ = gate_up_a.shape
    check_rank(_OP, "gate_up_a", rank)
    top_k = topk_ids.shape[-1]
    wanted = {
        "gate_up": (gate_up, (experts, rows, hidden), dtype),
        "down": (down, (experts, hidden, width), dtype),
        "topk_ids": (topk_ids, (tokens, top_k), topk_ids.dtype),
        "topk_weights": (topk_weights, (tokens, top_k), topk_weights.dtype),
        "gate_up_a": (gate_up_a, (slots, experts, rank, hidden), dtype),
        "gate_up_b": (gate_up_b, (slots, experts, rows, rank), dtype),
        "down_a": (down_a, (slots, experts, rank, width), dtype),
        "down_b": (down_b, (slots, experts, hidden, rank), dtype),
        "scaling": (scaling, (slots,), torch.float32),
        "ranks": (ranks, (slots,), torch.int32),
        "token_slots": (token_slots, (None,), torch.int32),
        "gate_up_bias": (gate_up_bias, (experts, rows), dtype),
        "down_bias": (down_bias, (experts, hidden), dtype),
    }
    for name, (tensor, shape, of) in wanted.items():
        if tensor is None:
            continue
        check_choice(_OP, f"{name}.dtype", tensor.dtype, (of,))
        check_device(_OP, name, tensor, "hidden_states", hidden_states)
        check_shape(_OP, name, tensor, shape, str(tuple("any" if s is None else s for s in shape)))
    for name in ("gate_up_a", "gate_up_b", "down_a", "down_b", "scaling", "ranks", "token_slots"):
        if not wanted[name][0].is_contiguous():  # type: ignore[union-attr]
            stride = wanted[name][0].stride()  # type: ignore[union-attr]
            raise ValueError(f"{_OP}: {name} has strides {stride}; accepted: contiguous")
    if known(top_k == 0) or known(experts == 0) or known(slots == 0):
        given = f"{experts} experts, {slots} slots, top_k {top_k}"
        raise ValueError(f"{_OP}: there are {given}; accepted: 1 or more of each")
    require(
        tokens <= token_slots.shape[0],
        lambda: f"{_OP}: token_slots has {token_slots.shape[0]} tokens; accepted: {tokens} or more",
    )


def _empty(
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
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    return torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)


FUSED_MOE_LORA = library.define(
    fused_moe_lora,
    "(Tensor hidden_states, Tensor gate_up, Tensor down, Tensor topk_weights, Tensor topk_ids, "
    "Tensor gate_up_a, Tensor gate_up_b, Tensor down_a, Tensor down_b, Tensor scaling, Tensor ranks, "
    "Tensor token_slots, *, str activation='silu_mul', bool interleaved=False, float alpha=1.702, "
    "float limit=7.0, Tensor? gate_up_bias=None, Tensor? down_bias=None) -> Tensor",
    check=_check,
    empty=_empty,
    reference=reference.fused_moe_lora,
    implementations=(triton("custom_ops.lora.experts_triton:fused_moe_lora"),),
)
