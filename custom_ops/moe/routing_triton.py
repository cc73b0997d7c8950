"""Routing in Triton: a program to a token, whose scores stay in registers while the best are taken one by one."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from custom_ops.platform import on_device
from custom_ops.triton_math import INTERPRET, exp, round_to, to_float32

_MOST = tl.constexpr(2**31 - 1)
_REMOVED = tl.constexpr(-(2**31))  # below the key of every float


@triton.jit
def _rounded(v, DTYPE: tl.constexpr):
    """float32 rounded to DTYPE."""
    return v if tl.float32 == DTYPE else to_float32(round_to(v, DTYPE))


@triton.jit
def _load(pointer, mask, other):
    v = tl.load(pointer, mask=mask, other=other)
    return v if v.dtype == tl.float32 else to_float32(v)


@triton.jit
def _key(v):
    """Integers that compare as the floats do: -0 as 0, NaN above all."""
    bits = (v + 0.0).to(tl.int32, bitcast=True)
    return tl.where(v != v, _MOST, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _value(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _winner(key, index):
    """The largest key, and the lowest index that has it."""
    best = tl.max(key, axis=0)
    return best, tl.min(tl.where(key == best, index, _MOST), axis=0)


@triton.jit
def _log1p(v):
    return tl.log(1.0 + v) if INTERPRET else libdevice.log1p(v)


@triton.jit
def _softmax(v, mask):
    e = tl.where(mask, exp(v - _value(tl.max(tl.where(mask, _key(v), _REMOVED), axis=0))), 0.0)
    return tl.div_rn(e, tl.broadcast_to(tl.sum(e, axis=0), e.shape))


@triton.jit
def _groups(
    key, expert, size,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, KEPT: tl.constexpr, TOP2: tl.constexpr, CHOICE: tl.constexpr,
):  # fmt: skip
    """Whether each expert is in a group that stays."""
    group = tl.arange(0, BLOCK)
    score = tl.full((BLOCK,), _REMOVED, tl.int32)
    for g in range(GROUPS):
        own = tl.where(expert // size == g, key, _REMOVED)
        first, at = _winner(own, expert)
        value = tl.full((BLOCK,), 0.0, tl.float32) + _value(first)
        if TOP2:
            second = tl.max(tl.where(expert == at, _REMOVED, own), axis=0)
            value = _rounded(value + _value(second), CHOICE)
        score = tl.where(group == g, _key(value), score)
    kept = tl.zeros(expert.shape, tl.int1)
    for _ in range(KEPT):
        _, best = _winner(score, group)
        score = tl.where(group == best, _REMOVED, score)
        kept = kept | (expert // size == best)
    return kept


@triton.jit
def _route(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, experts, group_size,
    logits_row, logits_col, bias_step, eps, least, scale,
    BLOCK: tl.constexpr, TOP_K: tl.constexpr, CHOSEN: tl.constexpr, SCORING: tl.constexpr,
    BY_LOGITS: tl.constexpr, BIAS: tl.constexpr, RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_GROUPS: tl.constexpr, KEPT: tl.constexpr,
    TOP2: tl.constexpr, MASKED: tl.constexpr, STEP: tl.constexpr, CHOICE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    mask = expert < experts
    at = token * logits_row + expert.to(tl.int64) * logits_col
    logits = _load(logits_ptr + at, mask, -float("inf"))
    if SCORING == "softmax":
        score = _rounded(_softmax(logits, mask), STEP)
    elif SCORING == "sigmoid":
        one = tl.full((BLOCK,), 1.0, tl.float32)
        score = _rounded(tl.div_rn(one, 1.0 + exp(0.0 - logits)), STEP)
    elif SCORING == "sqrt_softplus":
        softplus = tl.where(logits > 20.0, logits, _log1p(exp(logits)))
        score = _rounded(tl.sqrt_rn(_rounded(softplus, STEP)), STEP)
    else:
        score = logits
    choice = logits if BY_LOGITS else score
    if BIAS:
        bias = _load(bias_ptr + expert.to(tl.int64) * bias_step, mask, 0.0)
        choice = _rounded(choice + bias, CHOICE)
    key = tl.where(mask, _key(choice), _REMOVED)
    if KEPT > 0:
        kept = _groups(key, expert, group_size, GROUPS, BLOCK_GROUPS, KEPT, TOP2, CHOICE)
        other = tl.full((BLOCK,), -float("inf") if MASKED == "-inf" else 0.0, tl.float32)
        key = tl.where(mask & (kept == 0), _key(other), key)
        if MASKED == "zero_weight":
            score = tl.where(kept, score, 0.0)

    k = tl.arange(0, CHOSEN)
    weight = tl.zeros((CHOSEN,), tl.float32)
    ids = tl.zeros((CHOSEN,), tl.int64)
    for i in range(TOP_K):
        _, best = _winner(key, expert)
        key = tl.where(expert == best, _REMOVED, key)
        # All others are zero, and so the sum is the one, whatever its value.
        weight = tl.where(k == i, tl.sum(tl.where(expert == best, score, 0.0), axis=0), weight)
        ids = tl.where(k == i, best.to(tl.int64), ids)
    if SCORING == "none":
        weight = _rounded(_softmax(weight, k < TOP_K), STEP)
    if RENORMALIZE:
        total = tl.broadcast_to(tl.sum(weight, axis=0), weight.shape)
        total = _rounded(total, STEP)
        bound = tl.full((CHOSEN,), 0.0, tl.float32) + least
        total = tl.where(total < bound, _rounded(bound, STEP), total)
        total = _rounded(total + eps, STEP)
        weight = _rounded(tl.div_rn(weight, total), STEP)
    weight = _rounded(weight * scale, STEP)
    out = round_to(weight, weights_ptr.dtype.element_ty)
    tl.store(weights_ptr + token * TOP_K + k, out, mask=k < TOP_K)
    tl.store(ids_ptr + token * TOP_K + k, ids, mask=k < TOP_K)


_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def _run(
    logits: Tensor,
    top_k: int,
    scoring: str,
    *,
    by_logits: bool = False,
    groups: int = 1,
    kept: int = 1,
    top2: bool = False,
    masked: str = "-inf",
    correction_bias: Tensor | None,
    renormalize: bool,
    renormalize_eps: float,
    renormalize_min: float,
    scale: float,
    rounded: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    tokens, experts = logits.shape
    weights = torch.empty((tokens, top_k), dtype=dtype, device=logits.device)
    ids = torch.empty((tokens, top_k), dtype=torch.int64, device=logits.device)
    if tokens == 0:
        return weights, ids
    step = logits.dtype if rounded else torch.float32
    bias = logits if correction_bias is None else correction_bias
    choice = step if correction_bias is None else torch.promote_types(step, bias.dtype)
    with on_device(logits):
        _route[(tokens,)](
            logits,
            bias,
            weights,
            ids,
            experts,
            experts // groups,
            *logits.stride(),
            bias.stride(0),
            renormalize_eps,
            renormalize_min,
            scale,
            BLOCK=triton.next_power_of_2(experts),
            TOP_K=top_k,
            CHOSEN=triton.next_power_of_2(top_k),
            SCORING=scoring,
            BY_LOGITS=by_logits,
            BIAS=correction_bias is not None,
            RENORMALIZE=renormalize,
            GROUPS=groups,
            BLOCK_GROUPS=triton.next_power_of_2(groups),
            KEPT=kept if kept < groups else 0,
            TOP2=top2,
            MASKED=masked,
            STEP=_TYPES[step],
            CHOICE=_TYPES[choice],
            num_warps=1 if experts <= 512 else 4,
        )
    return weights, ids


def topk_softmax(
    logits: Tensor, top_k: int, *, softmax_first: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """As `custom_ops.topk_softmax`."""
    scoring = "softmax" if softmax_first else "none"
    return _run(logits, top_k, scoring, by_logits=not softmax_first, **options)


def topk_sigmoid(
    logits: Tensor, top_k: int, *, by_logits: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """As `custom_ops.topk_sigmoid`."""
    return _run(logits, top_k, "sigmoid", by_logits=by_logits, **options)


def grouped_topk(
    logits: Tensor,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    *,
    scoring: str,
    group_score: str,
    masked: str,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """As `custom_ops.grouped_topk`."""
    return _run(
        logits,
        top_k,
        scoring,
        groups=num_groups,
        kept=topk_groups,
        top2=group_score == "top2",
        masked=masked,
        **options,
    )
