"""Routed experts, and beside them on a second stream the experts that every token goes through."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from custom_ops import library
from custom_ops.activation.reference import silu_mul
from custom_ops.implementation import Implementation
from custom_ops.moe import reference
from custom_ops.moe.beside import beside
from custom_ops.moe.checks import check_dims, check_dtype, check_shape
from custom_ops.moe.ops import _check as check_experts
from custom_ops.quantization.checks import check_device
from custom_ops.scales import known

_OP = "fused_moe_and_shared"
# Widths that are no multiple of this one are not taken by two streams.
_MULTIPLE = 128


def fused_moe_and_shared(
    hidden_states: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared_gate: Tensor,
    shared_up: Tensor,
    shared_down: Tensor,
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
    routed_experts: int = 0,
) -> tuple[Tensor, Tensor]:
    """`fused_moe` of tokens, and the experts that all of them share, at the same time: both results, [T, H].

    hidden_states: bfloat16 or float16, [T, H]. shared_gate, shared_up: [S, H], shared_down: [H, S], of that dtype, in
    any strides. All else: as `fused_moe` has it. The first result has its bits; the second is, with one rounding to the
    dtype of hidden_states at each step and the bits of `torch.nn.functional.linear`,

        linear(silu(linear(hidden_states, shared_gate)) * linear(hidden_states, shared_up), shared_down)

    On a GPU the shared experts run on a second stream, which waits for the current one and which the current one waits
    for: captured, a fork and a join of the CUDA graph. Nothing waits for the device. They run after the routed ones
    where H, S or the width of a routed expert is not a multiple of 128: kernels side by side have ended in an illegal
    instruction there on an H100, now and then, and the cause is not found. Implementations: streams, in_turn,
    reference. Raises ValueError as `fused_moe` does, and for a shared weight of another dtype, shape or device. Source:
    arXiv:2401.06066.
    """
    return torch.ops.custom_ops.fused_moe_and_shared(
        hidden_states,
        gate_up,
        down,
        topk_weights,
        topk_ids,
        shared_gate,
        shared_up,
        shared_down,
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
        routed_experts=routed_experts,
    )


def _check(
    hidden_states: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared_gate: Tensor,
    shared_up: Tensor,
    shared_down: Tensor,
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
    routed_experts: int,
) -> None:
    check_experts(
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
        routed_experts=routed_experts,
        hidden_scale=None,
        out_dtype=hidden_states.dtype,
    )
    check_dims(_OP, "shared_gate", shared_gate, 2)
    width, hidden = shared_gate.shape[0], hidden_states.shape[1]
    for name, weight, shape in (
        ("shared_gate", shared_gate, (width, hidden)),
        ("shared_up", shared_up, (width, hidden)),
        ("shared_down", shared_down, (hidden, width)),
    ):
        check_dtype(_OP, name, weight, (hidden_states.dtype,))
        check_shape(_OP, name, weight, shape)
        check_device(_OP, name, weight, "hidden_states", hidden_states)


def _empty(
    hidden_states: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared_gate: Tensor,
    shared_up: Tensor,
    shared_down: Tensor,
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
    routed_experts: int,
) -> tuple[Tensor, Tensor]:
    def one() -> Tensor:
        return torch.empty(
            hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device
        )

    return one(), one()


def _reference(
    hidden_states: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared_gate: Tensor,
    shared_up: Tensor,
    shared_down: Tensor,
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
    routed_experts: int,
) -> tuple[Tensor, Tensor]:
    routed = reference.fused_moe(
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
        routed_experts=routed_experts,
    )
    rows = hidden_states.contiguous()
    between = silu_mul(linear(rows, shared_gate), linear(rows, shared_up))
    return routed, linear(between, shared_down)


def _side_by_side(
    hidden_states: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared_gate: Tensor,
    shared_up: Tensor,
    shared_down: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    # of the current stream, whose memory a caller may follow (torch.compile does, for its CUDA graphs)
    out = hidden_states.new_empty(hidden_states.shape)
    return beside(
        partial(
            torch.ops.custom_ops.fused_moe,
            hidden_states,
            gate_up,
            down,
            topk_weights,
            topk_ids,
            **kwargs,
        ),
        partial(_shared, hidden_states, shared_gate, shared_up, shared_down, out),
        hidden_states.device,
    )


def _in_turn(
    hidden_states: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared_gate: Tensor,
    shared_up: Tensor,
    shared_down: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    routed = torch.ops.custom_ops.fused_moe(
        hidden_states, gate_up, down, topk_weights, topk_ids, **kwargs
    )
    out = hidden_states.new_empty(hidden_states.shape)
    return routed, _shared(hidden_states, shared_gate, shared_up, shared_down, out)


def _shared(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, out: Tensor) -> Tensor:
    rows = x.contiguous()
    between = torch.ops.custom_ops.silu_mul(linear(rows, gate), linear(rows, up))
    return torch.mm(between, down.t(), out=out)


def _no_streams(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"needs a second stream, a {device.type} has none"


def _not_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"needs a CUDA tensor, this one is on {device.type}"


def _not_on_two_streams(
    hidden_states: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    shared_gate: Tensor,
    shared_up: Tensor,
    shared_down: Tensor,
    **kwargs: Any,
) -> str | None:
    widths = {
        "hidden_states": hidden_states.shape[1],
        "down": down.shape[2],
        "shared_gate": shared_gate.shape[0],
    }
    for name, width in widths.items():
        if not known(width % _MULTIPLE == 0):
            return f"takes widths that are multiples of {_MULTIPLE}, that of {name} is {width}"
    return None


library.define(
    fused_moe_and_shared,
    "(Tensor hidden_states, Tensor gate_up, Tensor down, Tensor topk_weights, Tensor topk_ids, "
    "Tensor shared_gate, Tensor shared_up, Tensor shared_down, *, "
    "str activation='silu_mul', bool interleaved=False, float alpha=1.702, float limit=7.0, "
    "Tensor? gate_up_bias=None, Tensor? down_bias=None, Tensor? gate_up_scale=None, "
    "Tensor? down_scale=None, Tensor? expert_map=None, float min_amax=1e-10, "
    "str scale_mode='divide', str code_mode='divide', int routed_experts=0) "
    "-> (Tensor routed, Tensor shared)",
    check=_check,
    empty=_empty,
    reference=_reference,
    implementations=(
        Implementation("streams", lambda: _side_by_side, _no_streams, _not_on_two_streams),
        Implementation("in_turn", lambda: _in_turn, _not_cuda),
    ),
)
