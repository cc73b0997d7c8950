"""Tokens to the ranks of their experts, through them, and back, as one op, which may choose how."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from custom_ops.expert_parallel import batches, groups
from custom_ops.expert_parallel.agreement import agree_once
from custom_ops.expert_parallel.collective import define
from custom_ops.expert_parallel.exchanges import Dispatch, Gather, Tokens
from custom_ops.implementation import Implementation
from custom_ops.library import ops, require
from custom_ops.moe.checks import check_at_least
from custom_ops.quantization.checks import check_choice

EXCHANGES = ("dispatch", "gather")
_OP = "ep_fused_moe"


def ep_fused_moe(
    x: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    num_experts: int,
    group: str,
    *,
    activation: str = "silu_mul",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    min_amax: float = 1e-10,
    scale_mode: str = "divide",
    code_mode: str = "divide",
    out_dtype: torch.dtype = torch.bfloat16,
    max_tokens: int = 0,
    exchange: str = "dispatch",
    split_from: int = 0,
) -> Tensor:
    """A mixture of experts whose experts live on several ranks: dispatch, the experts of each rank, combine.

    x, scale, topk_ids, topk_weights, num_experts, group, max_tokens: as `ep_dispatch` takes them; x is [T, H] in
    bfloat16 or float16, or float8_e4m3fn with the scales of `group_quant(..., 128)`, and then out_dtype, bfloat16 or
    float16, is what comes back. gate_up, down and the other keywords: the experts of this rank, E / N of them, as
    `fused_moe` takes them. All but T is the same on every rank.

    Returns [T, H], contiguous, what these three return, whatever the keywords below say:

        rows = ep_dispatch(x, scale, topk_ids, topk_weights, num_experts, group, max_tokens=max_tokens)
        y    = fused_moe(rows.recv_x, gate_up, down, rows.recv_weights, rows.recv_ids, ...)
        out  = ep_combine(y, <handle of rows>, group)

    - exchange: "dispatch"; or "gather": every token goes to every rank, which costs less where nearly every token has
      experts on nearly every rank. A zero may have the other sign.
    - split_from: 0, or from how many tokens on (the most that any rank has) they go in two halves, so that one half
      travels while the experts have the other. Bit for bit the same where `fused_moe` takes one implementation for a
      half as for the whole.

    With max_tokens, that is taken for the most tokens of any rank; without, ranks that gather or may split tell each
    other first how many they have, and the host waits for that. The overload `bounded` is the same op without the tag
    that keeps it out of CUDA graphs, for calls in which nobody waits: with max_tokens, and over DeepEP or to gather.

    Implementations: `gather` and `two_batches`, where the keywords ask for them, and the reference, the three ops.
    Errors: those of the three ops.
    """
    return torch.ops.custom_ops.ep_fused_moe(
        x,
        scale,
        topk_ids,
        topk_weights,
        gate_up,
        down,
        num_experts,
        group,
        activation=activation,
        interleaved=interleaved,
        alpha=alpha,
        limit=limit,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        gate_up_scale=gate_up_scale,
        down_scale=down_scale,
        min_amax=min_amax,
        scale_mode=scale_mode,
        code_mode=code_mode,
        out_dtype=out_dtype,
        max_tokens=max_tokens,
        exchange=exchange,
        split_from=split_from,
    )


def _of_the_op(function: Callable[..., Any]) -> Callable[..., Any]:
    """The arguments of the op, which it is called with, in full: what a function names are those that it looks at."""
    function.__signature__ = inspect.signature(ep_fused_moe)  # type: ignore[attr-defined]
    return function


@_of_the_op
def _check(
    x: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    num_experts: int,
    group: str,
    *,
    max_tokens: int,
    exchange: str,
    split_from: int,
    **how: Any,
) -> None:
    declared = ops()
    declared["ep_dispatch"].check(
        x, scale, topk_ids, topk_weights, num_experts, group, max_tokens=max_tokens
    )
    given = how | {"expert_map": None, "hidden_scale": scale, "routed_experts": 0, "up": None}
    declared["fused_moe"].check(x, gate_up, down, topk_weights, topk_ids, **given)
    check_choice(_OP, "exchange", exchange, EXCHANGES)
    check_at_least(_OP, "split_from", split_from, 0)
    local = num_experts // groups.size(_OP, group)
    require(
        gate_up.shape[0] == local,
        lambda: (
            f"{_OP}: gate_up has {gate_up.shape[0]} experts; accepted: {local}, those of a rank"
        ),
    )


@_of_the_op
def _empty(x: Tensor, scale: Tensor | None, *_: Any, out_dtype: torch.dtype, **how: Any) -> Tensor:
    dtype = x.dtype if scale is None else out_dtype
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@_of_the_op
def _reference(*args: Any, split_from: int, **how: Any) -> Tensor:
    return _run(Dispatch, *args, split_from=0, **how)


def _two_batches(*args: Any, **how: Any) -> Tensor:
    return _run(Dispatch, *args, **how)


def _gather(*args: Any, **how: Any) -> Tensor:
    return _run(Gather, *args, **how)


@_of_the_op
def _no_gathering(*_: Any, exchange: str, **how: Any) -> str | None:
    return None if exchange == "gather" else f"gathers tokens, exchange is {exchange!r}"


@_of_the_op
def _no_split(*_: Any, split_from: int, **how: Any) -> str | None:
    return None if split_from else "splits tokens, split_from is 0"


def _run(
    way: type[Dispatch] | type[Gather],
    x: Tensor,
    scale: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    num_experts: int,
    group: str,
    *,
    max_tokens: int,
    exchange: str,
    split_from: int,
    **how: Any,
) -> Tensor:
    def products(tokens: Tokens) -> Tensor:
        rest = tokens.weights, tokens.ids
        return torch.ops.custom_ops.fused_moe(
            tokens.x, gate_up, down, *rest, hidden_scale=tokens.scale, **how
        )

    tokens = Tokens(x, scale, topk_ids, topk_weights)
    about = {
        "x.dtype": x.dtype,
        "the last dimension of x": x.shape[1],
        "the last dimension of topk_ids": topk_ids.shape[1],
        "topk_weights.dtype": topk_weights.dtype,
        "num_experts": num_experts,
        "max_tokens": max_tokens,
        "split_from": split_from,
    }
    most, dtype = max_tokens, x.dtype if scale is None else how["out_dtype"]
    if not most and (way is Gather or split_from > 1):
        agree_once(_OP, group, x.device, about)
        most = groups.most(_OP, group, len(x), x.device)
        if way is Gather and not most:
            return x.new_empty(x.shape, dtype=dtype)
    elif way is Gather:
        agree_once(_OP, group, x.device, about)
    # What is only found out here does not bound what `ep_dispatch` returns, which would be rows that nobody needs.
    there_and_back = way(num_experts, group, most if way is Gather else max_tokens)
    if split_from and (split_from == 1 or most >= split_from):
        return batches.in_two(there_and_back, products, tokens, dtype)
    return batches.in_one(there_and_back, products, tokens)


define(
    ep_fused_moe,
    "(Tensor x, Tensor? scale, Tensor topk_ids, Tensor topk_weights, Tensor gate_up, Tensor down, int num_experts,"
    " str group, *, str activation='silu_mul', bool interleaved=False, float alpha=1.702, float limit=7.0,"
    " Tensor? gate_up_bias=None, Tensor? down_bias=None, Tensor? gate_up_scale=None, Tensor? down_scale=None,"
    " float min_amax=1e-10, str scale_mode='divide', str code_mode='divide', ScalarType out_dtype=bfloat16,"
    " int max_tokens=0, str exchange='dispatch', int split_from=0) -> Tensor",
    check=_check,
    empty=_empty,
    reference=_reference,
    implementations=[
        Implementation("gather", lambda: _gather, unsupported=_no_gathering),
        Implementation("two_batches", lambda: _two_batches, unsupported=_no_split),
    ],
    overload="bounded",
)
