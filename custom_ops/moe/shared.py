"""Routed experts, and beside them on a second stream the experts that every token goes through."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

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

T = TypeVar("T")
_OP = "fused_moe_and_shared"


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
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fused_moe` of tokens, and the experts that all of them share, at the same time: both results, [T, H].

    hidden_states: bfloat16 or float16, [T, H]. shared_gate, shared_up: [S, H], shared_down: [H, S], of that dtype, in
    any strides. All else: as `fused_moe` has it. The first result has its bits; the second is, with one rounding to the
    dtype of hidden_states at each step and the bits of `torch.nn.functional.linear`,

        linear(silu(linear(hidden_states, shared_gate)) * linear(hidden_states, shared_up), shared_down)

    On a GPU the shared experts run on a second stream, which waits for the current one and which the current one waits
    for: captured, a fork and a join of the CUDA graph. Nothing waits for the device. Raises ValueError as `fused_moe`
    does, and for a shared weight of another dtype, shape or device. Source: arXiv:2401.06066.
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
        up=up,
    )


def _of_the_op(function: Callable[..., T]) -> Callable[..., T]:
    """With the signature of the op, which what takes all of `fused_moe`'s arguments only hands on."""
    function.__signature__ = inspect.signature(fused_moe_and_shared)  # type: ignore[attr-defined]
    return function


@_of_the_op
def _check(hidden_states: Tensor, *args: Tensor, **kwargs: Any) -> None:
    *routed, gate, up, down = args
    out_dtype = hidden_states.dtype
    check_experts(hidden_states, *routed, **kwargs, hidden_scale=None, out_dtype=out_dtype)
    check_dims(_OP, "shared_gate", gate, 2)
    width, hidden = gate.shape[0], hidden_states.shape[1]
    for name, weight, shape in (
        ("shared_gate", gate, (width, hidden)),
        ("shared_up", up, (width, hidden)),
        ("shared_down", down, (hidden, width)),
    ):
        check_dtype(_OP, name, weight, (hidden_states.dtype,))
        check_shape(_OP, name, weight, shape)
        check_device(_OP, name, weight, "hidden_states", hidden_states)


@_of_the_op
def _empty(hidden_states: Tensor, *args: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    shape = hidden_states.shape
    return hidden_states.new_empty(shape), hidden_states.new_empty(shape)


@_of_the_op
def _reference(hidden_states: Tensor, *args: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    *routed, gate, up, down = args
    rows = hidden_states.contiguous()
    between = silu_mul(linear(rows, gate), linear(rows, up))
    return reference.fused_moe(hidden_states, *routed, **kwargs), linear(between, down)


def _side_by_side(hidden_states: Tensor, *args: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    *routed, gate, up, down = args
    # of the current stream, whose memory a caller may follow (torch.compile does, for its CUDA graphs)
    out = hidden_states.new_empty(hidden_states.shape)
    return beside(
        partial(torch.ops.custom_ops.fused_moe, hidden_states, *routed, **kwargs),
        partial(_shared, hidden_states, gate, up, down, out),
        hidden_states.device,
    )


def _shared(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, out: Tensor) -> Tensor:
    rows = x.contiguous()
    between = torch.ops.custom_ops.silu_mul(linear(rows, gate), linear(rows, up))
    return torch.mm(between, down.t(), out=out)


def _no_streams(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"needs a second stream, a {device.type} has none"


library.define(
    fused_moe_and_shared,
    "(Tensor hidden_states, Tensor gate_up, Tensor down, Tensor topk_weights, Tensor topk_ids, "
    "Tensor shared_gate, Tensor shared_up, Tensor shared_down, *, "
    "str activation='silu_mul', bool interleaved=False, float alpha=1.702, float limit=7.0, "
    "Tensor? gate_up_bias=None, Tensor? down_bias=None, Tensor? gate_up_scale=None, "
    "Tensor? down_scale=None, Tensor? expert_map=None, float min_amax=1e-10, "
    "str scale_mode='divide', str code_mode='divide', int routed_experts=0, Tensor? up=None) "
    "-> (Tensor routed, Tensor shared)",
    check=_check,
    empty=_empty,
    reference=_reference,
    implementations=(Implementation("streams", lambda: _side_by_side, _no_streams),),
)
