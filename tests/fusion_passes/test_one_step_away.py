"""Functions one step away from what whole-block fusions match: none fires, or the result is still right."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_passes import registry
from fusion_passes.testing import fuse
from tests.fusion_passes.experts_code import Spelling, draw
from tests.fusion_passes.helpers import assert_same, random
from tests.fusion_passes.test_routers import inputs

pytestmark = pytest.mark.usefixtures("references")


def run(fn, *tensors, names, **kwargs):
    """Fuse and compare; a walk or a rewrite that raises is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*raised")
        result = fuse(fn, *tensors, only=[registry()[name] for name in names], **kwargs)
    assert_same(result)
    return result


# ---- routers ------------------------------------------------------------------------------------------------------

ROUTERS = ("topk_softmax", "topk_sigmoid", "grouped_topk")
EXPERTS, TOP_K = 16, 4


def _route(logits: Tensor, bias: Tensor, change: str) -> tuple[Tensor, ...]:
    tokens, wide = logits.shape[0], logits.float()
    if change == "logits at the ids":
        ids = wide.softmax(-1).topk(TOP_K)[1]
        return wide.gather(1, ids), ids
    if change == "16-bit logits at the ids":
        ids = wide.sigmoid().topk(TOP_K)[1]
        return logits.gather(1, ids), ids
    if change == "sigmoid of the logits at the ids":
        ids = wide.sigmoid().topk(TOP_K)[1]
        return wide.gather(1, ids).sigmoid(), ids
    if change == "sigmoid of the logits at the ids, biased":
        ids = (wide.sigmoid() + bias).topk(TOP_K)[1]
        return wide.gather(1, ids).sigmoid(), ids
    if change == "softmax of the logits at the ids, biased":
        ids = (wide + bias).topk(TOP_K)[1]
        return wide.gather(1, ids).softmax(-1), ids
    if change == "softmax of each group":
        scores = wide.view(tokens, 4, 4).softmax(-1).view(tokens, EXPERTS)
        return scores.topk(TOP_K)
    if change == "softmax of all tokens":
        return wide.reshape(-1).softmax(0).view(tokens, EXPERTS).topk(TOP_K)
    if change == "softmax of all the chosen":
        values, ids = wide.topk(TOP_K)
        return values.reshape(-1).softmax(0).view(tokens, TOP_K), ids
    if change == "softmax of half the chosen":
        values, ids = wide.topk(TOP_K)
        return values.view(-1, 2).softmax(-1).view(tokens, TOP_K), ids
    if change == "bias of each token":
        ids = (wide.sigmoid() + bias[:tokens, None]).topk(TOP_K)[1]
        return wide.sigmoid().gather(1, ids), ids
    if change == "scores scaled and biased":
        ids = (torch.add(wide.sigmoid(), bias, alpha=2)).topk(TOP_K)[1]
        return wide.sigmoid().gather(1, ids), ids
    if change == "16-bit sum with the bias":
        scores = logits.sigmoid()
        ids = (scores + (bias.argsort() * 2).to(logits.dtype)).topk(TOP_K)[1]
        return scores.gather(1, ids), ids
    if change == "16-bit scores, wide bias":
        scores = logits.sigmoid()
        ids = (scores + bias.to(logits.dtype).float()).topk(TOP_K)[1]
        return scores.gather(1, ids), ids
    if change == "total of other tokens":
        weights, ids = wide.softmax(-1).topk(TOP_K)
        return weights / weights.sum(-1, keepdim=True).reshape(1, -1)[:, :TOP_K], ids
    if change == "values and the scores of others":
        values, ids = wide.softmax(-1).topk(TOP_K)
        return values, ids, wide.sigmoid().gather(1, ids)
    if change == "gathered at other ids":
        scores = wide.sigmoid()
        ids = (scores + bias).topk(TOP_K)[1]
        return scores.gather(1, ids.flip(-1)), ids
    if change == "temperature":
        return (wide / 3).softmax(-1).topk(TOP_K)
    weights, ids = wide.softmax(-1).topk(TOP_K)
    return _weigh(weights, change), ids


def _weigh(weights: Tensor, change: str) -> Tensor:
    """The weights of the chosen, renormalized in another way."""
    if change == "sum of all tokens":
        return weights / weights.reshape(1, -1).sum(-1, keepdim=True)
    if change == "sum over tokens":
        return weights / weights.sum(0, keepdim=True)
    if change == "sum of halves":
        halves = weights.view(-1, 2)
        return (halves / halves.sum(-1, keepdim=True)).view(weights.shape)
    if change == "sum of all but the last":
        return weights / weights[:, :-1].sum(-1, keepdim=True)
    if change == "largest":
        return weights / weights.amax(-1, keepdim=True)
    if change == "mean":
        return weights / weights.mean(-1, keepdim=True)
    if change == "sum of squares":
        return weights / weights.square().sum(-1, keepdim=True)
    if change == "sum over the weights":
        return weights.sum(-1, keepdim=True) / weights
    if change == "twice":
        weights = weights / weights.sum(-1, keepdim=True)
        return weights / (weights.sum(-1, keepdim=True) + 1)
    if change == "eps, then a bound":
        return weights / (weights.sum(-1, keepdim=True) + 1.0).clamp(min=1.75)
    if change == "a bound, then eps":
        return weights / (weights.sum(-1, keepdim=True).clamp(min=1.75) + 1.0)
    if change == "bound from above":
        return weights / weights.sum(-1, keepdim=True).clamp(max=0.25)
    if change == "eps with alpha":
        total = weights.sum(-1, keepdim=True)
        return weights / torch.add(total, torch.full((1,), 0.5), alpha=3)
    if change == "scaled before the sum":
        weights = weights * 2.5
        return weights / (weights.sum(-1, keepdim=True) + 1.0)
    if change == "cast before the sum":
        weights = weights.bfloat16()
        return weights / weights.sum(-1, keepdim=True)
    if change == "cast, then scaled":
        return (weights / weights.sum(-1, keepdim=True)).bfloat16() * 2.3
    if change == "scaled twice":
        return weights * 2.5 * 0.3
    if change == "rows of some":
        return weights[:2] * 2.5
    if change == "rows of more":
        return weights.unsqueeze(1).expand(-1, 3, -1) * 2.5
    if change == "scaled by a column":
        return weights * torch.full((3, 1, 1), 2.5)
    if change == "also unscaled":
        return torch.stack([weights, weights * 2.5])
    raise AssertionError(change)


ROUTED = (
    "logits at the ids", "16-bit logits at the ids", "sigmoid of the logits at the ids",
    "sigmoid of the logits at the ids, biased", "softmax of the logits at the ids, biased", "softmax of each group",
    "softmax of all tokens", "softmax of all the chosen", "softmax of half the chosen", "bias of each token",
    "scores scaled and biased", "16-bit sum with the bias", "values and the scores of others",
    "16-bit scores, wide bias", "total of other tokens",
    "gathered at other ids", "temperature", "sum of all tokens", "sum over tokens", "sum of halves",
    "sum of all but the last", "largest", "mean", "sum of squares", "sum over the weights", "twice",
    "eps, then a bound", "a bound, then eps", "bound from above", "eps with alpha", "scaled before the sum",
    "cast before the sum", "cast, then scaled", "scaled twice", "rows of some", "rows of more", "scaled by a column",
    "also unscaled",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, TOP_K, EXPERTS])
@pytest.mark.parametrize("change", ROUTED)
def test_a_router_one_step_away(change, tokens, dtype):
    bias = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(1)) / 4
    logits = inputs(tokens, torch.float32, seed=3)[0]
    result = run(lambda *given: _route(*given, change), logits.to(dtype), bias, names=ROUTERS)
    assert torch.equal(result.expected[1], result.actual[1]), result.report


def _groups(logits: Tensor, bias: Tensor, change: str) -> tuple[Tensor, Tensor]:
    scores = logits.softmax(-1) if change == "softmax" else logits.sigmoid()
    choice, tokens = scores + bias, logits.shape[0]
    grouped = (choice if change != "scores of logits" else logits).view(tokens, 4, 4)
    if change == "groups in turns":
        grouped = choice.view(tokens, 4, 4).transpose(1, 2)
    worth = grouped.topk(3 if change == "three best" else 2, -1)[0]
    worth = worth.mean(-1) if change == "mean of two" else worth.sum(-1)
    if change == "least of two":
        worth = grouped.topk(2, -1)[0].amin(-1)
    if change == "sum of all":
        worth = grouped.sum(-1)
    best = worth.topk(2, -1, largest=change != "worst groups")[1]
    if change == "values of groups":
        best = (worth.topk(2, -1)[0] > 0).long()
    mask = torch.zeros_like(worth)
    mask = torch.ones_like(worth) if change == "scatter over ones" else mask
    mask = mask.scatter(1, best, 0 if change == "scatter of zeros" else 1)
    spread = mask.unsqueeze(1 if change == "spread in turns" else -1).expand(-1, 4, 4)
    fill = {"minus one": -1.0, "zero": 0.0}.get(change, float("-inf"))
    of = scores if change == "scores are masked" else choice
    elsewhere = spread.reshape(tokens, -1).bool()
    elsewhere = elsewhere if change == "other groups" else ~elsewhere
    ids = of.masked_fill(elsewhere, fill).topk(4, -1)[1]
    weights = (choice if change == "biased weights" else scores).gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


GROUPED = (
    "", "softmax", "scores of logits", "groups in turns", "three best", "mean of two", "least of two", "sum of all",
    "worst groups", "values of groups", "scatter over ones", "scatter of zeros", "other groups", "spread in turns",
    "minus one", "zero", "scores are masked", "biased weights",
)  # fmt: skip


@pytest.mark.parametrize("change", GROUPED)
def test_groups_one_step_away(change):
    logits, bias = random(6, EXPERTS, dtype=torch.float32), random(EXPERTS, dtype=torch.float32) / 4
    result = run(lambda *given: _groups(*given, change), logits, bias, names=ROUTERS)
    assert result.report.matches == (
        {"grouped_topk": 1} if change in ("", "softmax", "zero") else {}
    )
    assert torch.equal(result.expected[1], result.actual[1]), result.report


# ---- experts ------------------------------------------------------------------------------------------------------


def _experts(tensors: tuple[Tensor, ...], change: str) -> Tensor:
    """A matrix for each pair, with one thing that is not as it should be."""
    hidden, gate_up, down, gate_up_bias, down_bias, weights, ids = tensors
    (tokens, top_k), experts = ids.shape, gate_up.shape[0]
    flat = ids.reshape(-1)
    first_ids = flat.flip(0) if change == "ids flipped" else flat
    if change == "ids through bool":
        flat = first_ids = flat.bool().long()
    if change == "ids through 16 bits":
        flat = first_ids = ((flat + 512).bfloat16().long() - 512).clamp(0, experts - 1)
    if change == "ids modulo":
        flat = first_ids = flat % (experts - 1)
    rows = hidden.repeat_interleave(top_k, 0)
    if change == "rows in turns":
        rows = hidden.repeat(top_k, 1)
    if change == "rows of the first":
        rows = hidden[:1].expand(tokens * top_k, -1)
    if change == "rows rolled":
        rows = rows.roll(1, 0)
    up = torch.bmm(gate_up[first_ids], rows.unsqueeze(-1)).squeeze(-1)
    if change == "bias of another id":
        up = up + gate_up_bias[flat.flip(0)]
    elif change == "bias with alpha":
        up = torch.add(up, gate_up_bias[flat], alpha=2)
    elif change == "bias subtracted":
        up = up - gate_up_bias[flat]
    elif change == "one bias":
        up = up + gate_up_bias[0]
    elif change == "bias twice":
        up = up + gate_up_bias[flat] + gate_up_bias[flat]
    elif change == "narrow bias":
        up = up + gate_up_bias[:, :1][flat]
    else:
        up = up + gate_up_bias[flat]
    if change == "weights before the activation":
        up = (up * weights.reshape(-1, 1)).to(hidden.dtype)
    if change == "scaled before the activation":
        up = up * 2
    if change == "residual":
        up = up + up.flip(0)
    gate, value = up.chunk(2, -1)
    if change == "swapped":
        gate, value = value, gate
    if change == "interleaved halves":
        gate, value = up[:, ::2], up[:, up.shape[1] // 2 :]
    if change == "gate twice":
        value = gate
    between = F.silu(gate) * value
    if change == "other alpha":
        between = gate * torch.sigmoid(1.5 * gate) * value
    if change in ("other limits", "limits of the gate", "no one added", "limits"):
        low = -6.0 if change == "other limits" else -7.0
        gate = gate.clamp(low, 7.0) if change == "limits of the gate" else gate.clamp(max=7.0)
        value = value.clamp(low, 7.0) + (0 if change == "no one added" else 1)
        between = value * (gate * torch.sigmoid(gate * 1.702))
    if change == "scaled between":
        between = between * 0.5
    if change == "plus between":
        between = between + 1
    out = torch.bmm(down[flat], between.unsqueeze(-1)).squeeze(-1)
    if change == "bias after the weights":
        out = out * weights.reshape(-1, 1).to(out.dtype) + down_bias[flat]
        return out.view(tokens, top_k, -1).sum(1)
    if change == "down bias of the token":
        out = out + down_bias[ids[:, :1].expand(-1, top_k).reshape(-1)]
    applied = weights.reshape(-1, 1)
    if change == "weights twice":
        out = out * applied
    if change == "weights in turns":
        applied = weights.t().reshape(-1, 1)
    if change == "weights of channels":
        applied = weights.reshape(-1)[:1]
    if change == "weights squared":
        applied = applied * applied
    if change == "scaled by a number":
        out = out * 0.5
    out = out * applied
    if change == "scaled after the weights":
        out = out * 0.5
    pairs = out.view(tokens, top_k, -1)
    if change == "mean":
        return pairs.mean(1).to(hidden.dtype)
    if change == "in turns":
        return out.view(top_k, tokens, -1).sum(0).to(hidden.dtype)
    if change == "transposed view":
        return out.view(top_k, tokens, -1).sum(1).to(hidden.dtype)
    if change == "not all experts":
        return pairs[:, : top_k - 1].sum(1).to(hidden.dtype)
    if change == "not all tokens":
        return pairs[:1].sum(1).to(hidden.dtype)
    if change == "cumulated":
        return pairs.cumsum(1)[:, -1].to(hidden.dtype)
    if change == "shared expert inside":
        return (pairs.sum(1) + hidden).to(hidden.dtype)
    if change == "cast to another":
        return pairs.sum(1).to(torch.float16)
    return pairs.sum(1).to(hidden.dtype)


UNLIKE = (
    "ids flipped", "rows in turns", "rows of the first", "rows rolled", "bias of another id", "bias with alpha",
    "bias subtracted", "one bias", "bias twice", "narrow bias", "weights before the activation",
    "scaled before the activation", "residual", "swapped", "interleaved halves", "gate twice", "other alpha",
    "other limits", "limits of the gate", "no one added", "scaled between", "plus between", "bias after the weights",
    "down bias of the token", "weights twice", "weights of channels", "scaled by a number",
    "scaled after the weights", "mean", "in turns", "transposed view", "not all experts", "not all tokens",
    "cumulated", "shared expert inside", "cast to another",
)  # fmt: skip
ALIKE = (
    "", "limits", "weights in turns", "weights squared", "ids through bool", "ids through 16 bits", "ids modulo",
)  # fmt: skip


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 2), (2, 1), (3, 3), (5, 2)])
@pytest.mark.parametrize("change", ["", *UNLIKE, *ALIKE[1:]])
def test_experts_one_step_away(change, tokens, top_k):
    tensors = draw(Spelling(form="batched", bias=True), tokens=tokens, top_k=top_k).tensors
    run(lambda *given: _experts(given, change), *tensors, names=("fused_moe",))


def _sorted_experts(tensors: tuple[Tensor, ...], change: str) -> Tensor:
    """Rows sorted by expert, with one thing that is not as it should be."""
    hidden, gate_up, down, _, down_bias, weights, ids = tensors
    (tokens, top_k), experts = ids.shape, gate_up.shape[0]
    flat = ids.reshape(-1)
    other = (flat + 1) % experts
    by = other if change == "everything by other ids" else flat
    values, order = by.sort()
    if change == "ids taken by themselves":
        values = flat[values % flat.shape[0]]
    if change == "counts of the sorted twice":
        values = flat[order][order]
    if change == "counts of some":
        values = values[: flat.shape[0] // 2]
    if change == "counts by another order":
        values = flat[other.sort()[1]]
    if change == "counts through 8 bits":
        values = ((values + 256).to(torch.int8)).long()
    counted = values if change != "counts of other ids" else other.sort()[0]
    low, high = (1, experts) if change == "bins moved" else (0, experts - 1)
    counts = torch.histc(counted.float(), bins=experts, min=low, max=high)
    offsets = counts.cumsum(0, dtype=torch.int32)
    if change == "offsets shifted":
        offsets = F.pad(offsets[:-1], (1, 0)) + 0 * offsets
    if change == "offsets plus one":
        offsets = (offsets + 1).clamp(max=flat.shape[0])
    rows_order = order.flip(0) if change == "rows flipped" else order
    rows = hidden[rows_order // (top_k + 1 if change == "another divisor" else top_k)]
    if change == "rows of pairs":
        rows = hidden.repeat_interleave(top_k, 0)[order]
    up = torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=offsets)
    gate, value = up.chunk(2, -1)
    out = torch._grouped_mm(F.silu(gate) * value, down.transpose(1, 2), offs=offsets)
    if change == "bias unsorted":
        out = out + down_bias[flat]
    if change == "bias sorted":
        out = out + down_bias[flat[order]]
    applied = weights.reshape(-1)[
        other.sort()[1] if change == "weights by another order" else order
    ]
    if change == "weights at the ids":
        applied = weights.reshape(-1)[flat[order] % weights.numel()]
    if change == "weights by the inverse":
        applied = weights.reshape(-1)[order.argsort()]
    if change == "more weights":
        applied = torch.cat([weights, weights * 2]).reshape(-1)[order]
    out = out * applied.unsqueeze(-1)
    if change == "inverse of another order":
        order = other.argsort()
    inverse = order.argsort(descending=change == "inverse descending")
    if change == "inverse of the inverse":
        inverse = inverse.argsort()
    if change == "inverse accumulated":
        inverse = torch.zeros_like(order).index_put((order,), torch.arange(len(order)), True)
        inverse = inverse.index_put((order,), torch.arange(len(order)), True).clamp(
            max=len(order) - 1
        )
    if change == "inverse from one":
        inverse = torch.zeros_like(order).scatter(0, order, torch.arange(1, 1 + len(order)))
        inverse = inverse.clamp(max=len(order) - 1)
    if change == "inverse from another arange":
        inverse = torch.zeros_like(order).scatter(0, order, torch.arange(len(order)).flip(0))
    if change == "put back twice":
        return out[inverse][inverse].view(tokens, top_k, -1).sum(1).to(hidden.dtype)
    return out[inverse].view(tokens, top_k, -1).sum(1).to(hidden.dtype)


SORTED = (
    "",  "everything by other ids", "ids taken by themselves", "counts of the sorted twice",
    "counts of some", "counts by another order", "counts through 8 bits", "counts of other ids", "bins moved",
    "offsets shifted", "offsets plus one", "rows flipped", "another divisor", "rows of pairs", "bias unsorted",
    "bias sorted", "weights by another order", "weights at the ids", "weights by the inverse", "more weights",
    "inverse of another order", "inverse descending", "inverse of the inverse", "inverse accumulated",
    "inverse from one", "inverse from another arange", "put back twice",
)  # fmt: skip


@pytest.mark.parametrize(("tokens", "top_k"), [(2, 1), (3, 3), (6, 2)])
@pytest.mark.parametrize("change", SORTED)
def test_sorted_experts_one_step_away(change, tokens, top_k):
    tensors = draw(Spelling(), tokens=tokens, top_k=top_k).tensors
    fusions = [registry()["fused_moe"]]
    result = fuse(lambda *given: _sorted_experts(given, change), *tensors, only=fusions)
    if result.report.matches:  # else rows beyond the last offset may hold anything, on either side
        assert_same(result)
    if change in ("", "rows of pairs", "bias sorted", "everything by other ids"):
        assert change == "rows of pairs" or result.report.matches == {"fused_moe": 1}
    else:
        assert result.report.matches == {}, result.report


def test_a_clamp_of_ids_that_is_known_only_at_run_time():
    tensors = draw(Spelling(form="batched"), tokens=6).tensors
    cut = torch.randn(3, 2)
    torch._dynamo.mark_dynamic(cut, 0)

    def block(cut, hidden, gate_up, down, _bias, _other, weights, ids):
        flat = ids.reshape(-1).clamp(max=cut.shape[0])
        rows = hidden.repeat_interleave(ids.shape[1], 0).unsqueeze(-1)
        gate, value = torch.bmm(gate_up[flat], rows).squeeze(-1).chunk(2, -1)
        out = torch.bmm(down[flat], (F.silu(gate) * value).unsqueeze(-1)).squeeze(-1)
        return (out * weights.reshape(-1, 1)).view(*ids.shape, -1).sum(1).to(hidden.dtype)

    run(block, cut, *tensors, names=("fused_moe",))


# ---- LoRA ---------------------------------------------------------------------------------------------------------


def _lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, change: str) -> tuple[Tensor, ...]:
    base = F.linear(x * 2 if change == "base of another x" else x, weight)
    inner = x.to(a.dtype)
    if change == "scaled x":
        inner = inner * 0.5
    shrunk = F.linear(inner, a)
    if change == "scaled between":
        shrunk = shrunk * 0.5
    if change == "activation between":
        shrunk = F.relu(shrunk)
    delta = F.linear(shrunk, b)
    if change == "magnitude":
        delta = delta * b[:, 0]
    if change == "scaled by tokens":
        delta = delta * x[..., :1].to(a.dtype)
    if change == "other order of products":
        delta = F.linear(x.to(a.dtype), b @ a)
    if change == "subtracted":
        return ((base - delta * 2.0).to(x.dtype),)
    if change == "alpha":
        return (torch.add(base, delta * 2.0, alpha=3).to(x.dtype),)
    if change == "scaled sum":
        return (((base + delta) * 2.0).to(x.dtype),)
    if change == "scaled twice":
        return ((base + delta * 2.0 * 0.3).to(x.dtype),)
    if change == "scaled base":
        return ((base * 0.5 + delta * 2.0).to(x.dtype),)
    if change == "two adapters":
        return ((base + delta * 2.0 + F.linear(F.linear(inner, a.flip(0)), b) * 0.5).to(x.dtype),)
    if change == "the same adapter twice":
        return ((base + delta * 2.0 + delta * 0.5).to(x.dtype),)
    if change == "nested":
        return ((base + F.linear(F.linear(base.to(a.dtype), a[:, :32]), b) * 2.0).to(x.dtype),)
    if change == "rows of the first":
        return ((base + delta[:1] * 2.0).to(x.dtype),)
    if change == "one row":
        return ((base[:1] + delta[:1] * 2.0).to(x.dtype),)
    if change == "rows of some":
        return ((base[:2] + delta[:2] * 2.0).to(x.dtype),)
    if change == "delta transposed":
        return (
            (base + delta.reshape(delta.shape[-1], -1).t().reshape(delta.shape) * 2.0).to(x.dtype),
        )
    result = (base + delta * 2.0).to(x.dtype)
    if change == "base outside":
        return result, base
    if change == "delta outside":
        return result, delta
    if change == "shrunk outside":
        return result, shrunk
    return (result,)


LORA = (
    "", "base of another x", "scaled x", "scaled between", "activation between", "magnitude", "scaled by tokens",
    "other order of products", "subtracted", "alpha", "scaled sum", "scaled twice", "scaled base", "two adapters",
    "the same adapter twice", "nested", "rows of the first", "one row", "rows of some", "delta transposed",
    "base outside", "delta outside", "shrunk outside",
)  # fmt: skip


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("rank", "tokens"), [(1, 4), (8, 4), (8, 1)])
@pytest.mark.parametrize("change", LORA)
def test_lora_one_step_away(change, rank, tokens, wide):
    dtype = torch.float32 if wide else torch.bfloat16
    tensors = (
        random(tokens, 32),
        random(32, 32) / 6,
        random(rank, 32, dtype=dtype) / 6,
        random(32, rank, dtype=dtype),
    )
    result = run(lambda *given: _lora(*given, change), *tensors, names=("lora_linear",))
    assert change or result.report.matches == {"lora_linear": 1}


# ---- quantizations ------------------------------------------------------------------------------------------------


def _asymmetric(x: Tensor, change: str) -> tuple[Tensor, ...]:
    x = x.float()
    dim = 0 if change == "of channels" else -1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    if change == "of everything":
        low, high = x.amin().reshape(1, 1), x.amax().reshape(1, 1)
    if change == "of other tokens":
        low = low.flip(0)
    if change != "range without zero":
        low, high = low.clamp(max=0), high.clamp(min=1 if change == "range with one" else 0)
    levels = {"254": 254.0, "256": 256.0}.get(change, 255.0)
    scale = ((high - low) / levels).clamp(min=1e-5)
    if change == "bound from above":
        scale = ((high - low) / levels).clamp(max=0.01)
    least = {"unsigned": 0, "-127": -127}.get(change, -128)
    start = high if change == "from the highest" else low
    zero = (least - torch.round(start / scale)).clamp(-128, 127)
    if change == "zero added":
        zero = (least + torch.round(start / scale)).clamp(-128, 127)
    if change == "zero not rounded":
        zero = (least - start / scale).clamp(-128, 127)
    values = x / scale
    if change == "rounded later":
        codes = torch.round(values + zero)
    elif change == "rounded down":
        codes = torch.floor(values) + zero
    elif change == "zero subtracted":
        codes = torch.round(values) - zero
    else:
        codes = torch.round(values) + zero
    codes = codes.clamp(-128, 100 if change == "clamped to 100" else 127)
    return (
        codes.to(torch.int8),
        scale * 2 if change == "twice the scale" else scale,
        zero.to(torch.int8),
    )


ASYMMETRIC = (
    "", "of channels", "of everything", "of other tokens", "range without zero", "range with one", "254", "256",
    "bound from above", "unsigned", "-127", "from the highest", "zero added", "zero not rounded", "rounded later",
    "rounded down", "zero subtracted", "clamped to 100", "twice the scale",
)  # fmt: skip


@pytest.mark.parametrize("change", ASYMMETRIC)
def test_asymmetric_quantization_one_step_away(change):
    x = random(4, 64) + 0.25
    result = run(lambda x: _asymmetric(x, change), x, names=("token_quant_asymmetric",))
    # all of it is one long token
    assert len(result.report.matches) == (change in ("", "twice the scale", "of everything"))


def _in_blocks(x: Tensor, change: str) -> tuple[Tensor, Tensor]:
    size = 64 if change == "smaller blocks" else 128
    blocks = x.float().unflatten(1, (-1, size)).unflatten(0, (-1, 128))
    dims = {"rows": (3,), "columns": (1,), "across": (0, 3)}.get(change, (1, 3))
    amax = (
        blocks.amax(dims, keepdim=True)
        if change == "no abs"
        else blocks.abs().amax(dims, keepdim=True)
    )
    if change == "square":
        amax = blocks.square().amax(dims, keepdim=True)
    amax = amax.clamp(max=2.0) if change == "bound from above" else amax.clamp(min=1e-4)
    scale = amax / (amax.new_full((), 240.0 if change == "240" else 448.0))
    values = blocks * scale if change == "multiplied" else blocks / scale
    limit = 400.0 if change == "clamped to 400" else 448.0
    codes = values.clamp(-limit, limit).to(torch.float8_e4m3fn)
    return codes.reshape(x.shape), scale


BLOCKS = (
    "", "smaller blocks", "rows", "columns", "across", "no abs", "square", "bound from above", "240", "multiplied",
    "clamped to 400",
)  # fmt: skip


@pytest.mark.parametrize("change", BLOCKS)
def test_block_quantization_one_step_away(change):
    result = run(lambda x: _in_blocks(x, change), random(256, 384), names=("block_quant",))
    assert len(result.report.matches) == (change == "")


# ---- FP8 experts --------------------------------------------------------------------------------------------------

BLOCK = 128


def _rounded(x: Tensor, change: str = "") -> Tensor:
    """Quantized in groups of 128 channels, and dequantized."""
    rows = torch.cat([x, x * 2]) if change == "some rows" else x
    groups = rows.float().unflatten(-1, (-1, BLOCK))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448.0
    codes = (groups / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    if change == "scales of other rows":
        scale = scale.flip(0)
    if change == "twice the scale":
        scale = scale * 2
    return (codes[: x.shape[0]].float() * scale[: x.shape[0]]).flatten(-2).to(x.dtype)


def _fp8_experts(
    hidden: Tensor, weights: Tensor, ids: Tensor, *stored: Tensor, change: str
) -> Tensor:
    if change == "some experts":
        stored = tuple(tensor[:4] for tensor in stored)
    if change == "scales of other experts":
        stored = (stored[0][:4], stored[1][2:], stored[2][:4], stored[3][:4])
    gate_up, down = (
        (codes.float() * scale.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)).to(
            hidden.dtype
        )
        for codes, scale in zip(stored[::2], stored[1::2], strict=True)
    )
    rows = _rounded(hidden, change)
    rows = (rows * 2 if change == "scaled" else rows).repeat_interleave(ids.shape[1], 0)
    flat = ids.reshape(-1)
    gate, value = torch.bmm(gate_up[flat], rows.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
    between = F.silu(gate) * value
    between = between if change == "not quantized between" else _rounded(between)
    out = torch.bmm(down[flat], between.unsqueeze(-1)).squeeze(-1) * weights.reshape(-1, 1)
    return out.view(*ids.shape, -1).sum(1).to(hidden.dtype)


@pytest.mark.parametrize(
    "change",
    ["scaled", "some rows", "scales of other rows", "twice the scale", "some experts", "scales of other experts",
     "not quantized between"],
)  # fmt: skip
def test_fp8_experts_one_step_away(change):
    generator = torch.Generator().manual_seed(0)
    sizes = ((6, 256, 128), (6, 2, 1), (6, 128, 128), (6, 1, 1))
    gate_up, gate_up_scale, down, down_scale = (torch.rand(s, generator=generator) for s in sizes)
    weights, ids = torch.rand(5, 4, generator=generator).topk(2)
    stored = [(gate_up - 0.5).to(torch.float8_e4m3fn), gate_up_scale / 8]
    stored += [(down - 0.5).to(torch.float8_e4m3fn), down_scale / 8]

    def block(*given):
        return _fp8_experts(*given, change=change)

    result = run(block, random(5, 128), weights, ids, *stored, names=("fused_moe",))
    assert result.report.matches == {}
