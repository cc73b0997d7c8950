"""Routers and the ops that bring tokens to experts and back, for Qwen3-30B-A3B's sizes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import custom_ops
from bench.case import Case, Inputs, activation, quantized_bytes, same, tensors
from custom_ops.moe import align_reference, permute_reference
from custom_ops.quantization.reference import group_quant

TOKENS = (1, 16, 64, 512, 4096)
EXPERTS, TOP_K, HIDDEN, BLOCK_M = 128, 8, 2048, 64
GROUPS, TOPK_GROUPS, GROUP_EXPERTS = 8, 4, 256
GROUP = 128


def topk_softmax(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The router of Qwen3-MoE."""
    scores = torch.nn.functional.softmax(logits, dtype=torch.float32, dim=-1)
    weights, ids = torch.topk(scores, top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype), ids


def topk_sigmoid(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The router of MiniMax-M2."""
    scores = torch.sigmoid(logits.float())
    ids = torch.topk(scores + bias, top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    return weights / weights.sum(dim=-1, keepdim=True), ids


def grouped_topk(logits: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The router of DeepSeek-V3."""
    scores = logits.sigmoid()
    choice = scores + bias
    of_groups = choice.view(-1, GROUPS, choice.shape[-1] // GROUPS).topk(2, dim=-1)[0].sum(dim=-1)
    groups = torch.topk(of_groups, k=TOPK_GROUPS, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(of_groups).scatter_(1, groups, 1)
    mask = mask.unsqueeze(-1).expand(-1, GROUPS, choice.shape[-1] // GROUPS).reshape_as(choice)
    choice = choice.masked_fill(~mask.bool(), float("-inf"))
    ids = torch.topk(choice, k=top_k, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * 2.5, ids


def same_choice(expected: Any, actual: Any) -> str | None:
    """The same experts with weights of the same values, in any order of a token's experts."""
    (weights, ids), (our_weights, our_ids) = expected, actual
    order, ours = ids.argsort(-1), our_ids.argsort(-1)
    if not torch.equal(ids.gather(1, order).long(), our_ids.gather(1, ours).long()):
        return "other experts are chosen"
    want, got = weights.gather(1, order), our_weights.gather(1, ours)
    if want.dtype != got.dtype or not torch.allclose(want, got, rtol=1e-5, atol=0):
        return "the weights differ by more than sums in another order"
    return None


def same_rows(expected: Any, actual: Any) -> str | None:
    """Equal where a row is somebody's: the others hold whatever memory held."""
    *values, row_of_pair, row_experts, offsets = tensors(expected)
    *ours, our_pairs, our_experts, our_offsets = tensors(actual)
    for want, got in (
        (row_of_pair, our_pairs),
        (row_experts, our_experts),
        (offsets, our_offsets),
    ):
        if not torch.equal(want, got):
            return "the rows of the pairs differ"
    used = row_experts >= 0
    for want, got in zip(values, ours, strict=True):
        if not torch.equal(_bytes(want)[used], _bytes(got)[used]):
            return "rows differ"
    return None


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.element_size() == 1 else x


def _logits(device: torch.device, tokens: int, experts: int, dtype: torch.dtype) -> Inputs:
    return torch.randn(tokens, experts, device=device).to(dtype), TOP_K


def _biased(device: torch.device, tokens: int, experts: int) -> Inputs:
    logits = torch.randn(tokens, experts, device=device)
    return logits, 0.1 * torch.randn(experts, device=device), TOP_K


def _ids(device: torch.device, tokens: int) -> Tensor:
    return torch.rand(tokens, EXPERTS, device=device).topk(TOP_K, dim=1).indices


def _align_inputs(device: torch.device, tokens: int) -> Inputs:
    return _ids(device, tokens), BLOCK_M, EXPERTS


def _permute_inputs(device: torch.device, tokens: int, hidden: int) -> Inputs:
    return activation(device, tokens, hidden), _ids(device, tokens), EXPERTS


def _unpermute_inputs(device: torch.device, tokens: int, hidden: int) -> Inputs:
    x, ids, _ = _permute_inputs(device, tokens, hidden)
    rows, row_of_pair, *_ = custom_ops.moe_permute(x, ids, EXPERTS)
    return rows, row_of_pair, torch.rand(tokens, TOP_K, device=device)


def _reduce_inputs(device: torch.device, tokens: int, hidden: int) -> Inputs:
    return activation(device, tokens * TOP_K, hidden), torch.rand(tokens, TOP_K, device=device)


def align(topk_ids: Tensor, block_size: int, num_experts: int) -> Any:
    return align_reference.moe_align_block_size(topk_ids, block_size, num_experts, expert_map=None)


def permute(x: Tensor, topk_ids: Tensor, num_experts: int) -> Any:
    return permute_reference.moe_permute(x, topk_ids, num_experts, align=1, expert_map=None)


def permute_group_quant(x: Tensor, topk_ids: Tensor, num_experts: int) -> Any:
    codes, scale = group_quant(x, GROUP)
    rows, *indices = permute(codes.view(torch.uint8), topk_ids, num_experts)
    return rows.view(codes.dtype), permute(scale, topk_ids, num_experts)[0], *indices


def unpermute(rows: Tensor, row_of_pair: Tensor, topk_weights: Tensor) -> Tensor:
    """As transformers has it, of rows that are all somebody's."""
    pairs = rows[row_of_pair] * topk_weights.reshape(-1, 1)
    return pairs.view(*topk_weights.shape, -1).sum(dim=1).to(rows.dtype)


def reduce(y: Tensor, topk_weights: Tensor) -> Tensor:
    pairs = y * topk_weights.reshape(-1, 1)
    return pairs.view(*topk_weights.shape, -1).sum(dim=1).to(y.dtype)


def cases(tiny: bool = False) -> Iterator[Case]:
    hidden = GROUP if tiny else HIDDEN
    for tokens in (4,) if tiny else TOKENS:
        yield from _routers(tokens)
        yield from _rows(tokens, hidden)


def _routers(tokens: int) -> Iterator[Case]:
    chosen = 12 * tokens * TOP_K
    yield Case(
        name="topk_softmax",
        sizes={"tokens": tokens, "experts": EXPERTS},
        # in float32: two logits of bfloat16 are often equal, and which one wins is not specified
        inputs=partial(_logits, tokens=tokens, experts=EXPERTS, dtype=torch.float32),
        plain=topk_softmax,
        check=same_choice,
        op="topk_softmax",
        op_args=lambda logits, top_k: (
            (logits, top_k),
            {"renormalize": True, "dtype": logits.dtype},
        ),
        fusion="topk_softmax",
        moved_bytes=4 * tokens * EXPERTS + chosen,
    )
    for name, plain, experts, extra in (
        ("topk_sigmoid", topk_sigmoid, EXPERTS, {}),
        ("grouped_topk", grouped_topk, GROUP_EXPERTS, {"renormalize_eps": 1e-20, "scale": 2.5}),
    ):
        grouped = (GROUPS, TOPK_GROUPS) if name == "grouped_topk" else ()
        yield Case(
            name=name,
            sizes={"tokens": tokens, "experts": experts},
            inputs=partial(_biased, tokens=tokens, experts=experts),
            plain=plain,
            check=same_choice,
            op=name,
            op_args=lambda logits, bias, top_k, grouped=grouped, extra=extra: (
                (logits, top_k, *grouped),
                {"correction_bias": bias, "renormalize": True, **extra},
            ),
            fusion=name,
            moved_bytes=4 * tokens * experts + chosen,
        )


def _rows(tokens: int, hidden: int) -> Iterator[Case]:
    pairs = tokens * TOP_K
    both: dict[str, Any] = {"sizes": {"tokens": tokens, "experts": EXPERTS}}
    yield Case(
        name="moe_align_block_size",
        inputs=partial(_align_inputs, tokens=tokens),
        plain=align,
        check=same,
        op="moe_align_block_size",
        op_args=lambda *args: (args, {}),
        moved_bytes=12 * pairs,
        **both,
    )
    both["sizes"] = {**both["sizes"], "hidden": hidden}
    permuting = partial(_permute_inputs, tokens=tokens, hidden=hidden)
    yield Case(
        name="moe_permute",
        inputs=permuting,
        plain=permute,
        check=same_rows,
        op="moe_permute",
        op_args=lambda *args: (args, {}),
        moved_bytes=2 * hidden * (tokens + pairs) + 16 * pairs,
        **both,
    )
    yield Case(
        name="moe_permute_group_quant",
        inputs=permuting,
        plain=permute_group_quant,
        check=same_rows,
        op="moe_permute_group_quant",
        op_args=lambda *args: ((*args, GROUP), {}),
        moved_bytes=2 * hidden * tokens + quantized_bytes(pairs, hidden) + 16 * pairs,
        **both,
    )
    yield Case(
        name="moe_unpermute",
        inputs=partial(_unpermute_inputs, tokens=tokens, hidden=hidden),
        plain=unpermute,
        check=same,
        op="moe_unpermute",
        op_args=lambda *args: (args, {}),
        moved_bytes=2 * hidden * (tokens + pairs) + 8 * pairs,
        **both,
    )
    yield Case(
        name="moe_reduce",
        inputs=partial(_reduce_inputs, tokens=tokens, hidden=hidden),
        plain=reduce,
        check=same,
        op="moe_reduce",
        op_args=lambda *args: (args, {}),
        moved_bytes=2 * hidden * (tokens + pairs) + 4 * pairs,
        **both,
    )
