"""Routing: which experts a token goes to, and with what weight.

The routers of models differ in few points, and each is a keyword here:

| keyword         | meaning                                                                                   |
| --------------- | ----------------------------------------------------------------------------------------- |
| correction_bias | [E], added to what experts are chosen by, and not to the weights                          |
| softmax_first   | False: choose by the logits, and take the softmax over the chosen ones (gpt-oss)          |
| by_logits       | True: choose by the logits, and take the sigmoid of the chosen ones (Llama 4)             |
| renormalize     | divide the weights by max(their sum, renormalize_min) + renormalize_eps                   |
| scale           | what the weights are multiplied by at the end                                             |
| rounded         | True: every step is rounded to the dtype of the logits, as where eager never leaves it    |
| dtype           | of the weights: one cast at the end                                                       |

All is float32 unless `rounded`. Experts come in descending order of what they are chosen by. Among equals the lower
index comes first and -0 is 0, which are the experts that `torch.topk` selects on a GPU (in an order of its own). NaN
is above all, as in `torch.topk`: the ids of a token are distinct and in [0, E) whatever its logits are.

The reference adds the weights up as eager does on a GPU, pairs first, and the CUDA kernel takes softmax and sum in
eager's order; other implementations may differ from these by the last bits of a float32.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.implementation import Implementation, cuda, triton
from custom_ops.library import require
from custom_ops.moe import routing_reference as reference
from custom_ops.moe.checks import (
    FLOATS,
    check_at_least,
    check_dims,
    check_dtype,
    check_finite,
    check_shape,
)
from custom_ops.quantization.checks import check_bound, check_choice, check_device
from custom_ops.scales import known

# What a warp of the CUDA kernel holds in registers, and the groups that it compares at once.
CUDA_MAX_EXPERTS = 512
CUDA_MAX_GROUPS = 32

_KEYWORDS = (
    "bool renormalize=False, float renormalize_eps=0.0, float renormalize_min=0.0, float scale=1.0,"
    " bool rounded=False, ScalarType dtype=float32"
)


def topk_softmax(
    logits: Tensor,
    top_k: int,
    *,
    correction_bias: Tensor | None = None,
    softmax_first: bool = True,
    renormalize: bool = False,
    renormalize_eps: float = 0.0,
    renormalize_min: float = 0.0,
    scale: float = 1.0,
    rounded: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Route by softmax: that of all logits of a token, or (softmax_first=False) of the chosen ones.

    logits: float32, bfloat16 or float16, [T, E], any strides. top_k: K, 1 to E. correction_bias: float32, bfloat16
    or float16, [E]. The keywords, order and ties: see the module `custom_ops.moe.routing`.

    Returns weights, of `dtype`, and ids, int64, both [T, K] and contiguous. Raises ValueError for another dtype,
    number of dimensions, shape, device or value of a keyword.
    """
    return torch.ops.custom_ops.topk_softmax(
        logits,
        top_k,
        correction_bias=correction_bias,
        softmax_first=softmax_first,
        renormalize=renormalize,
        renormalize_eps=renormalize_eps,
        renormalize_min=renormalize_min,
        scale=scale,
        rounded=rounded,
        dtype=dtype,
    )


def topk_sigmoid(
    logits: Tensor,
    top_k: int,
    *,
    correction_bias: Tensor | None = None,
    by_logits: bool = False,
    renormalize: bool = False,
    renormalize_eps: float = 0.0,
    renormalize_min: float = 0.0,
    scale: float = 1.0,
    rounded: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Route by the sigmoid of each logit.

    Arguments, returned values and errors: as `topk_softmax`. Distinct logits may have one sigmoid, so by_logits
    decides ties.
    """
    return torch.ops.custom_ops.topk_sigmoid(
        logits,
        top_k,
        correction_bias=correction_bias,
        by_logits=by_logits,
        renormalize=renormalize,
        renormalize_eps=renormalize_eps,
        renormalize_min=renormalize_min,
        scale=scale,
        rounded=rounded,
        dtype=dtype,
    )


def grouped_topk(
    logits: Tensor,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    *,
    correction_bias: Tensor | None = None,
    scoring: str = "sigmoid",
    group_score: str = "top2",
    masked: str = "-inf",
    renormalize: bool = False,
    renormalize_eps: float = 0.0,
    renormalize_min: float = 0.0,
    scale: float = 1.0,
    rounded: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Route to the best experts of the best groups of experts, as DeepSeek-V2 and -V3 do.

    num_groups: divides E; a group is E / num_groups neighbours. topk_groups: how many groups stay, 1 to num_groups.
    scoring: "sigmoid", "softmax" or "sqrt_softplus" (the root of softplus). group_score: what groups are chosen by,
    "top2" (the sum of the two best of a group, of 2 or more experts) or "max", both with the correction bias.
    masked: what an expert of another group is chosen by: "-inf", "zero" (so it may win against a negative one), or
    "zero_weight" (also its weight is then zero, as where the masked scores themselves are taken). It matters where
    fewer than top_k experts remain, or their scores are not positive.

    Other arguments, returned values and errors: as `topk_softmax`. Source: DeepSeek-V3 (arXiv:2412.19437, 2.1.2).
    """
    return torch.ops.custom_ops.grouped_topk(
        logits,
        top_k,
        num_groups,
        topk_groups,
        correction_bias=correction_bias,
        scoring=scoring,
        group_score=group_score,
        masked=masked,
        renormalize=renormalize,
        renormalize_eps=renormalize_eps,
        renormalize_min=renormalize_min,
        scale=scale,
        rounded=rounded,
        dtype=dtype,
    )


def _check_router(
    op: str,
    logits: Tensor,
    top_k: int,
    correction_bias: Tensor | None,
    renormalize_eps: float,
    renormalize_min: float,
    scale: float,
    dtype: torch.dtype,
) -> None:
    check_dtype(op, "logits", logits, FLOATS)
    check_dims(op, "logits", logits, 2)
    experts = logits.shape[1]
    check_at_least(op, "top_k", top_k, 1)
    require(
        top_k <= experts, lambda: f"{op}: top_k is {top_k}; accepted: 1 to {experts}, as experts"
    )
    if correction_bias is not None:
        check_device(op, "correction_bias", correction_bias, "logits", logits)
        check_dtype(op, "correction_bias", correction_bias, FLOATS)
        check_shape(op, "correction_bias", correction_bias, (experts,))
    check_bound(op, "renormalize_eps", renormalize_eps)
    check_bound(op, "renormalize_min", renormalize_min)
    check_finite(op, "scale", scale)
    check_choice(op, "dtype", dtype, FLOATS)


def _check_softmax(
    logits: Tensor,
    top_k: int,
    *,
    correction_bias: Tensor | None,
    softmax_first: bool,
    renormalize: bool,
    renormalize_eps: float,
    renormalize_min: float,
    scale: float,
    rounded: bool,
    dtype: torch.dtype,
) -> None:
    numbers = (renormalize_eps, renormalize_min, scale)
    _check_router("topk_softmax", logits, top_k, correction_bias, *numbers, dtype)


def _check_sigmoid(
    logits: Tensor,
    top_k: int,
    *,
    correction_bias: Tensor | None,
    by_logits: bool,
    renormalize: bool,
    renormalize_eps: float,
    renormalize_min: float,
    scale: float,
    rounded: bool,
    dtype: torch.dtype,
) -> None:
    numbers = (renormalize_eps, renormalize_min, scale)
    _check_router("topk_sigmoid", logits, top_k, correction_bias, *numbers, dtype)


def _check_grouped(
    logits: Tensor,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    *,
    correction_bias: Tensor | None,
    scoring: str,
    group_score: str,
    masked: str,
    renormalize: bool,
    renormalize_eps: float,
    renormalize_min: float,
    scale: float,
    rounded: bool,
    dtype: torch.dtype,
) -> None:
    op = "grouped_topk"
    numbers = (renormalize_eps, renormalize_min, scale)
    _check_router(op, logits, top_k, correction_bias, *numbers, dtype)
    check_choice(op, "scoring", scoring, ("sigmoid", "softmax", "sqrt_softplus"))
    check_choice(op, "group_score", group_score, ("top2", "max"))
    check_choice(op, "masked", masked, ("-inf", "zero", "zero_weight"))
    check_at_least(op, "num_groups", num_groups, 1)
    check_at_least(op, "topk_groups", topk_groups, 1)
    require(
        topk_groups <= num_groups,
        lambda: f"{op}: topk_groups is {topk_groups}; accepted: 1 to {num_groups}, as num_groups",
    )
    experts = logits.shape[1]
    require(
        experts % num_groups == 0,
        lambda: f"{op}: num_groups is {num_groups}; accepted: a divisor of the {experts} experts",
    )
    if group_score == "top2" and topk_groups < num_groups:
        require(
            experts >= 2 * num_groups,
            lambda: (
                f"{op}: num_groups is {num_groups}; accepted with group_score 'top2': groups of 2 or "
                f"more of the {experts} experts"
            ),
        )


def _empty(logits: Tensor, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    weights = torch.empty(shape, dtype=dtype, device=logits.device)
    return weights, torch.empty(shape, dtype=torch.int64, device=logits.device)


def _empty_softmax(
    logits: Tensor,
    top_k: int,
    *,
    correction_bias: Tensor | None,
    softmax_first: bool,
    renormalize: bool,
    renormalize_eps: float,
    renormalize_min: float,
    scale: float,
    rounded: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _empty(logits, top_k, dtype)


def _empty_sigmoid(
    logits: Tensor,
    top_k: int,
    *,
    correction_bias: Tensor | None,
    by_logits: bool,
    renormalize: bool,
    renormalize_eps: float,
    renormalize_min: float,
    scale: float,
    rounded: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _empty(logits, top_k, dtype)


def _empty_grouped(
    logits: Tensor,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    *,
    correction_bias: Tensor | None,
    scoring: str,
    group_score: str,
    masked: str,
    renormalize: bool,
    renormalize_eps: float,
    renormalize_min: float,
    scale: float,
    rounded: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    return _empty(logits, top_k, dtype)


def _cuda_unsupported(logits: Tensor, top_k: int, *groups: int, **kwargs: object) -> str | None:
    if not known(logits.shape[1] <= CUDA_MAX_EXPERTS):
        return f"takes at most {CUDA_MAX_EXPERTS} experts, here are {logits.shape[1]}"
    if groups and not known(groups[0] <= CUDA_MAX_GROUPS):
        return f"takes at most {CUDA_MAX_GROUPS} groups, here are {groups[0]}"
    return None


def _implementations(name: str) -> tuple[Implementation, ...]:
    return (
        replace(cuda(name), unsupported=_cuda_unsupported),
        triton(f"custom_ops.moe.routing_triton:{name}"),
    )


library.define(
    topk_softmax,
    f"(Tensor logits, int top_k, *, Tensor? correction_bias=None, bool softmax_first=True, {_KEYWORDS})"
    " -> (Tensor weights, Tensor ids)",
    check=_check_softmax,
    empty=_empty_softmax,
    reference=reference.topk_softmax,
    implementations=_implementations("topk_softmax"),
)
library.define(
    topk_sigmoid,
    f"(Tensor logits, int top_k, *, Tensor? correction_bias=None, bool by_logits=False, {_KEYWORDS})"
    " -> (Tensor weights, Tensor ids)",
    check=_check_sigmoid,
    empty=_empty_sigmoid,
    reference=reference.topk_sigmoid,
    implementations=_implementations("topk_sigmoid"),
)
library.define(
    grouped_topk,
    "(Tensor logits, int top_k, int num_groups, int topk_groups, *, Tensor? correction_bias=None,"
    " str scoring='sigmoid', str group_score='top2', str masked='-inf',"
    f" {_KEYWORDS}) -> (Tensor weights, Tensor ids)",
    check=_check_grouped,
    empty=_empty_grouped,
    reference=reference.grouped_topk,
    implementations=_implementations("grouped_topk"),
)
