"""Experts one step away from those that are found: none fires, or the result is still right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_passes import registry
from fusion_passes.testing import fuse
from tests.fusion_passes.experts_code import Spelling, draw
from tests.fusion_passes.helpers import assert_same, random
from tests.fusion_passes.one_step_away import run

pytestmark = pytest.mark.usefixtures("references")


# of SiLU-mul: the bounds of the gate, and that of up
SILU_LIMITS = {
    "limits of SiLU": (None, 0.5, 0.5),
    "a limit of 0": (None, 0.0, 0.0),
    "no limits of SiLU": (None, float("inf"), float("inf")),
    "gate clamped from below": (-0.5, 0.5, 0.5),
    "two limits": (None, 0.5, 0.75),
    "a limit that is not a number": (None, float("nan"), float("nan")),
}


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
    if change in SILU_LIMITS:
        low, most, limit = SILU_LIMITS[change]
        between = F.silu(gate.clamp(low, most)) * value.clamp(-limit, limit)
    if change == "clamped after SiLU":
        between = F.silu(gate).clamp(max=0.5) * value.clamp(-0.5, 0.5)
    if change == "clamped GELU":
        between = F.gelu(gate.clamp(max=0.5), approximate="tanh") * value.clamp(-0.5, 0.5)
    if change == "clamped gate alone":
        between = F.silu(gate.clamp(max=0.5)) * value
    if change == "clamped by another dtype":
        gate, value = gate.clamp(max=0.5).half(), value.clamp(-0.5, 0.5).half()
        between = (F.silu(gate) * value).to(hidden.dtype)
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
    "cumulated", "shared expert inside", "cast to another", "gate clamped from below", "two limits",
    "a limit that is not a number", "clamped after SiLU", "clamped GELU", "clamped gate alone",
    "clamped by another dtype",
)  # fmt: skip
ALIKE = (
    "", "limits", "weights in turns", "weights squared", "ids through bool", "ids through 16 bits", "ids modulo",
    "limits of SiLU", "a limit of 0", "no limits of SiLU",
)  # fmt: skip


@pytest.mark.parametrize(("tokens", "top_k"), [(1, 2), (2, 1), (3, 3), (5, 2)])
@pytest.mark.parametrize("change", ["", *UNLIKE, *ALIKE[1:]])
def test_experts_one_step_away(change, tokens, top_k):
    tensors = draw(Spelling(form="batched", bias=True), tokens=tokens, top_k=top_k).tensors
    run(lambda *given: _experts(given, change), *tensors, names=("fused_moe",))


@pytest.mark.parametrize("change", SILU_LIMITS)
def test_one_limit_of_gate_and_up_is_the_ops(change):
    """Within the values, so that a bound that is lost would be seen."""
    tensors = draw(Spelling(form="batched", bias=True), tokens=5, top_k=2).tensors
    result = run(lambda *given: _experts(given, change), *tensors, names=("fused_moe",))
    _, most, limit = SILU_LIMITS[change]
    assert result.report.matches == ({"fused_moe": 1} if change in ALIKE else {}), result.report
    if change not in ALIKE:
        (miss,) = [m for m in result.report.near_misses if m.fusion == "fused_moe"]
        assert "gate to at most a limit and up between -limit and limit" in miss.reason
        return
    (fused,) = [n for n in result.after.graph.nodes if "fused_moe" in str(n.target)]
    if limit == float("inf"):
        assert "limit" not in fused.kwargs
    else:
        assert (fused.kwargs["activation"], fused.kwargs["limit"]) == ("clamped_silu_mul", most)


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
