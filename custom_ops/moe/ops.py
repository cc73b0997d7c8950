"""A mixture of experts as one op: the two grouped products, what stands between them, and the weighted sum."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.gemm.reference import BLOCK
from custom_ops.library import require
from custom_ops.moe import activation as activations
from custom_ops.moe import choice, reference
from custom_ops.quantization.checks import (
    ACTIVATION_DTYPES,
    check_bound,
    check_choice,
    check_device,
)
from custom_ops.scales import CODE_MODES, SCALE_MODES, known

FP8 = torch.float8_e4m3fn
ID_DTYPES = (torch.int32, torch.int64)
_OP = "fused_moe"


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
    """A mixture of experts: each token through its top_k experts, weighted and added up.

    T = num_tokens, H = hidden_size, I = intermediate_size, E = num_experts, K = top_k; every tensor in any strides.
    hidden_states: bfloat16 or float16, [T, H]. gate_up: [E, 2 * I, H], or [E, I, H] for "relu2", and down: [E, H, I],
    both of the dtype of hidden_states; or both float8_e4m3fn or int8, with gate_up_scale and down_scale, float32: for
    float8 one per 128 x 128 block of an expert, [E, ceil(2 * I / 128), ceil(H / 128)] and [E, ceil(H / 128),
    ceil(I / 128)], for int8 one per output channel, [E, 2 * I] and [E, H]. A transposed view serves weights that are
    kept as [E, H, 2 * I]. topk_weights: float32 or the dtype of hidden_states,
    [T, K], K >= 1. topk_ids: int32 or int64, [T, K]. activation, interleaved, alpha, limit: see
    `custom_ops.moe.activation`. gate_up_bias: [E, 2 * I] or [E, I]; down_bias: [E, H], both of the dtype of
    hidden_states. expert_map: int32, [num_global_experts]: the local index of each expert that topk_ids
    names, -1 for one elsewhere. A pair of a token and an expert that is elsewhere, or not in [0, E), adds nothing. An
    expert may be named by a token more than once. Returns [T, H], contiguous. With P the dtype that topk_weights and
    hidden_states promote to, T one rounding to that of hidden_states, and sums of products in float32, for each pair:

        a   = T(hidden_states[token] @ gate_up[expert].T),   T(a + gate_up_bias[expert])
        b   = activation(a)                                  with the roundings of the op of that name
        c   = T(b @ down[expert].T),                         T(c + down_bias[expert])
        out = T(sum over k = 0, 1, ... in float32 of P(c * topk_weights[token, k]))

    float8: hidden_states and b are quantized as `group_quant(..., 128)` does with min_amax, scale_mode and code_mode,
    and the products are those of `block_scaled_mm`, which does not round the dequantized operands. int8: activations
    are not quantized, and a product is T(sum * scale of the channel), in float32 up to T.

    hidden_scale: None, or hidden_states are quantized already, as `group_quant(..., 128)` does: float8_e4m3fn codes
    with one float32 scale per 128 channels, [T, ceil(H / 128)], for float8 weights; T above is then out_dtype, bfloat16
    or float16, which says nothing otherwise. The bits are those of quantizing here.

    up: None, or what gate is multiplied with is a weight of its own, as in Mixtral and torchtitan: gate_up is that of
    gate alone then, [E, I, H], and up one like it, of its dtype and shape. All is as for torch.cat([gate_up, up], 1),
    bias and scales of gate_up too; float8 needs I to be a multiple of 128. Not for interleaved ones or "relu2".

    routed_experts: among how many experts the router chose, where most of them are elsewhere and no expert_map says so;
    0 for those that are here. It decides what is fastest, and never what comes out.

    This is the arithmetic of transformers' experts. Order and precision of the sums within a product are the
    implementation's. Nothing waits for the device, except in the reference, which reads how many tokens an expert
    has: so the op can be captured in a CUDA graph. More tokens than CUSTOM_OPS_MOE_CHUNK_TOKENS are taken in chunks of
    that many, so that what a call allocates is bounded.

    Implementations: Triton, DeepGEMM (Hopper; bfloat16 and float8), `torch._grouped_mm` (bfloat16), FlashInfer (Hopper;
    chosen by no table until it has been measured), reference; the
    tables in `custom_ops/tables` say which is fastest where, and `custom_ops.moe.parts` what they are made of. Raises
    ValueError for another dtype, shape, device or value. Source: arXiv:2101.03961, arXiv:2412.19437.
    """
    return torch.ops.custom_ops.fused_moe(
        hidden_states,
        gate_up,
        down,
        topk_weights,
        topk_ids,
        activation=activation,
        interleaved=interleaved,
        alpha=alpha,
        limit=limit,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        gate_up_scale=gate_up_scale,
        down_scale=down_scale,
        expert_map=expert_map,
        min_amax=min_amax,
        scale_mode=scale_mode,
        code_mode=code_mode,
        hidden_scale=hidden_scale,
        out_dtype=out_dtype,
        routed_experts=routed_experts,
        up=up,
    )


def _check(
    hidden_states: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    expert_map: Tensor | None,
    min_amax: float,
    scale_mode: str,
    code_mode: str,
    hidden_scale: Tensor | None,
    out_dtype: torch.dtype,
    routed_experts: int,
    up: Tensor | None,
) -> None:
    activations.check(_OP, activation, interleaved, alpha, limit)
    if hidden_scale is None:
        check_choice(_OP, "hidden_states.dtype", hidden_states.dtype, ACTIVATION_DTYPES)
        dtype = hidden_states.dtype
        check_choice(_OP, "gate_up.dtype", gate_up.dtype, (dtype, FP8, torch.int8))
    else:
        check_choice(_OP, "out_dtype", out_dtype, ACTIVATION_DTYPES)
        dtype = out_dtype
        for name, tensor in (("hidden_states", hidden_states), ("gate_up", gate_up)):
            check_choice(_OP, f"{name}.dtype with hidden_scale", tensor.dtype, (FP8,))
    check_choice(_OP, "down.dtype", down.dtype, (gate_up.dtype,))
    _check_dims("hidden_states", hidden_states, "[num_tokens, hidden_size]")
    _check_dims("gate_up", gate_up, "[num_experts, 2 * intermediate_size, hidden_size]")
    _check_dims("topk_ids", topk_ids, "[num_tokens, top_k]")
    tokens, hidden = hidden_states.shape
    experts, rows, _ = gate_up.shape
    gated = activation != "relu2"
    if known(hidden == 0) or known(rows == 0):
        raise ValueError(f"{_OP}: gate_up.shape is {tuple(gate_up.shape)}; accepted: sizes >= 1")
    if up is not None:
        _check_up(gate_up, up, activation, interleaved)
        rows *= 2
    require(
        not gated or rows % 2 == 0,
        lambda: f"{_OP}: gate_up.shape[1] is {rows}; accepted for {activation!r}: an even number",
    )
    width = rows // 2 if gated else rows
    both = (experts, rows if up is None else width, hidden)
    _check_tensor("gate_up", gate_up, both, hidden_states)
    if up is not None:
        _check_tensor("up", up, both, hidden_states)
    _check_tensor("down", down, (experts, hidden, width), hidden_states)
    top_k = topk_ids.shape[1]
    if known(top_k == 0):
        raise ValueError(f"{_OP}: topk_ids.shape is {tuple(topk_ids.shape)}; accepted: top_k >= 1")
    check_choice(_OP, "topk_ids.dtype", topk_ids.dtype, ID_DTYPES)
    _check_tensor("topk_ids", topk_ids, (tokens, top_k), hidden_states)
    check_choice(_OP, "topk_weights.dtype", topk_weights.dtype, (torch.float32, dtype))
    _check_tensor("topk_weights", topk_weights, (tokens, top_k), hidden_states)
    for name, bias, shape in (
        ("gate_up_bias", gate_up_bias, (experts, rows)),
        ("down_bias", down_bias, (experts, hidden)),
    ):
        if bias is not None:
            check_choice(_OP, f"{name}.dtype", bias.dtype, (dtype,))
            _check_tensor(name, bias, shape, hidden_states)
    for name, scale, (n, k) in (
        ("gate_up_scale", gate_up_scale, (rows, hidden)),
        ("down_scale", down_scale, (hidden, width)),
    ):
        if (scale is None) != (gate_up.dtype == dtype):
            given = "None" if scale is None else "a tensor"
            wanted = "a tensor" if scale is None else "None"
            raise ValueError(
                f"{_OP}: {name} is {given}; accepted for weights of {gate_up.dtype}: {wanted}"
            )
        if scale is not None:
            check_choice(_OP, f"{name}.dtype", scale.dtype, (torch.float32,))
            blocks = (-(-n // BLOCK), -(-k // BLOCK)) if gate_up.dtype == FP8 else (n,)
            _check_tensor(name, scale, (experts, *blocks), hidden_states)
    if hidden_scale is not None:
        check_choice(_OP, "hidden_scale.dtype", hidden_scale.dtype, (torch.float32,))
        _check_tensor("hidden_scale", hidden_scale, (tokens, -(-hidden // BLOCK)), hidden_states)
    if expert_map is not None:
        check_choice(_OP, "expert_map.dtype", expert_map.dtype, (torch.int32,))
        _check_dims("expert_map", expert_map, "[num_global_experts]")
        check_device(_OP, "expert_map", expert_map, "hidden_states", hidden_states)
    if routed_experts < 0:
        raise ValueError(f"{_OP}: routed_experts is {routed_experts}; accepted: 0 or more")
    check_bound(_OP, "min_amax", min_amax)
    check_choice(_OP, "scale_mode", scale_mode, SCALE_MODES)
    check_choice(_OP, "code_mode", code_mode, CODE_MODES)


def _check_up(gate: Tensor, up: Tensor, activation: str, interleaved: bool) -> None:
    if interleaved or activation == "relu2":
        how = "interleaved" if interleaved else f"activation {activation!r}"
        raise ValueError(f"{_OP}: up is a tensor; accepted with {how}: None")
    check_choice(_OP, "up.dtype", up.dtype, (gate.dtype,))
    if gate.dtype == FP8 and known(gate.shape[1] % BLOCK != 0):
        raise ValueError(
            f"{_OP}: gate_up.shape[1] is {gate.shape[1]}; accepted for {FP8} with up: a multiple of {BLOCK}"
        )


def _check_dims(name: str, tensor: Tensor, sizes: str) -> None:
    wanted = sizes.count(",") + 1
    if tensor.dim() != wanted:
        raise ValueError(
            f"{_OP}: {name} has {tensor.dim()} dimensions; accepted: {wanted}, {sizes}"
        )


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], hidden_states: Tensor) -> None:
    check_device(_OP, name, tensor, "hidden_states", hidden_states)
    if tensor.dim() != len(shape) or any(
        known(have != want) for have, want in zip(tensor.shape, shape, strict=True)
    ):
        raise ValueError(f"{_OP}: {name}.shape is {tuple(tensor.shape)}; accepted: {shape}")


def _empty(
    hidden_states: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    expert_map: Tensor | None,
    min_amax: float,
    scale_mode: str,
    code_mode: str,
    hidden_scale: Tensor | None,
    out_dtype: torch.dtype,
    routed_experts: int,
    up: Tensor | None,
) -> Tensor:
    dtype = hidden_states.dtype if hidden_scale is None else out_dtype
    return torch.empty(hidden_states.shape, dtype=dtype, device=hidden_states.device)


FUSED_MOE = library.define(
    fused_moe,
    "(Tensor hidden_states, Tensor gate_up, Tensor down, Tensor topk_weights, Tensor topk_ids, *, "
    "str activation='silu_mul', bool interleaved=False, float alpha=1.702, float limit=7.0, "
    "Tensor? gate_up_bias=None, Tensor? down_bias=None, Tensor? gate_up_scale=None, "
    "Tensor? down_scale=None, Tensor? expert_map=None, float min_amax=1e-10, "
    "str scale_mode='divide', str code_mode='divide', Tensor? hidden_scale=None, "
    "ScalarType out_dtype=bfloat16, int routed_experts=0, Tensor? up=None) -> Tensor",
    check=_check,
    empty=_empty,
    reference=reference.fused_moe,
    implementations=choice.implementations(),
)
