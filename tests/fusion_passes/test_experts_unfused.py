"""Mixtures without a product that goes by expert: loops over experts, and experts with room for so many tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_passes import registry
from fusion_passes.testing import fuse
from fusion_passes.testing.equivalence import fuse_graphs
from tests.fusion_passes.helpers import misses

pytestmark = pytest.mark.usefixtures("references")


class Loop(nn.Module):
    """As Mixtral was in older transformers: the experts that are hit, one after the other."""

    def __init__(self, dense: bool) -> None:
        super().__init__()
        self.dense = dense
        self.gate = nn.Linear(48, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(48, 48, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = torch.topk(self.gate(x).float().softmax(-1), 2, dim=-1)
        out = torch.zeros_like(x)
        if self.dense:
            for index, expert in enumerate(self.experts):
                own = (weights * (ids == index)).sum(-1, keepdim=True)
                out = out + expert(x) * own.to(x.dtype)
            return out
        mask = F.one_hot(ids, 4).permute(2, 1, 0)
        for index in mask.sum((-1, -2)).nonzero():
            place, token = torch.where(mask[index].squeeze(0))
            rows = self.experts[index](x[token]) * weights[token, place, None]
            out = out.index_add(0, token, rows.to(x.dtype))
        return out


@pytest.mark.parametrize("dense", [False, True])
def test_loops_over_experts_are_named(dense):
    torch.manual_seed(0)
    loop = Loop(dense).bfloat16().requires_grad_(False)
    x = torch.randn(5, 48).bfloat16()
    results = fuse_graphs(loop, x, only=[registry()["fused_moe"]])
    assert all(result.report.matches == {} for result in results)
    reasons = [reason for result in results for reason in misses(result, "fused_moe")]
    assert any("as a loop over experts asks for its tokens" in reason for reason in reasons), (
        reasons
    )


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("activation", [F.relu, F.silu])
def test_capacity_is_named(activation, turned):
    """As in Switch and GShard: a product brings as many tokens to an expert as it has room for."""

    def switch(x, router, first, second):
        tokens, experts, room = x.shape[0], 4, 3
        score, ids = (x @ router).float().softmax(-1).max(-1)
        chosen = F.one_hot(ids, experts)
        place = chosen.cumsum(0) * chosen - 1
        here = ((place < room) & (chosen > 0)).unsqueeze(-1)
        sent = F.one_hot(place.clamp(0, room - 1), room) * here
        rows = torch.einsum("tec,th->ech", sent.to(x.dtype), x)
        if turned:  # weights as [E, out, in]
            first, second = first.transpose(1, 2), second.transpose(1, 2)
        out = torch.bmm(activation(torch.bmm(rows, first)), second)
        back = (sent * score[:, None, None]).to(x.dtype)
        return torch.einsum("tec,ech->th", back, out).view(tokens, -1)

    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 48), (48, 4), (4, 48, 32), (4, 32, 48)]
    shapes[2:] = reversed(shapes[2:]) if turned else shapes[2:]
    given = [(0.2 * torch.randn(shape, generator=generator)).bfloat16() for shape in shapes]
    result = fuse(switch, *given, only=[registry()["fused_moe"]])
    assert result.report.matches == {}
    (reason,) = misses(result, "fused_moe")
    assert "gives every expert rows of its own: none is routed" in reason
    assert "as many as an expert has room for" in reason


@pytest.mark.parametrize("turned", [False, True])
def test_attention_to_keys_that_are_given_is_no_mixture(turned):
    def attention(query, key, value):
        scores = torch.bmm(query, key if turned else key.transpose(1, 2))
        return torch.bmm(scores.float().softmax(-1).to(query.dtype), value)

    query, key, value = (torch.randn(4, size, 32).bfloat16() for size in (5, 7, 7))
    given = key.transpose(1, 2).contiguous() if turned else key
    result = fuse(attention, query, given, value, only=[registry()["fused_moe"]])
    assert misses(result, "fused_moe") == []
