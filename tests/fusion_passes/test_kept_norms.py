"""Norms that are quantized and read by something else too: an adapter, a router, the next layer's residual."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fusion_passes
from fusion_passes.testing import fuse

FP8 = torch.float8_e4m3fn
HIDDEN, RANK = 256, 16


def llama_norm(x: Tensor, weight: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(x.dtype)


def per_group(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.float().unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (groups / scale).clamp(-448.0, 448.0).to(FP8).flatten(-2), scale.squeeze(-1)


def per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (x.float() / scale).clamp(-448.0, 448.0).to(FP8), scale


SCHEMES = {"group_quant": per_group, "token_quant": per_token}
OTHERS = ("adapter", "router in float32", "residual", "itself")


class Block(nn.Module):
    """A norm of x (or of a sum), quantized, and what else reads it: before or after the quantization in the graph."""

    def __init__(self, scheme: str, adds: bool, live: bool, other: str, before: bool) -> None:
        super().__init__()
        self.scheme, self.adds, self.live = scheme, adds, live
        self.other, self.before = other, before
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(HIDDEN, generator=generator).to(torch.bfloat16)
        low = torch.randn(RANK, HIDDEN, generator=generator).to(torch.bfloat16)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.low = nn.Parameter(low, requires_grad=False)

    def read(self, normed: Tensor, x: Tensor) -> Tensor:
        if self.other == "adapter":
            return F.linear(normed, self.low)
        if self.other == "router in float32":
            flat = normed.reshape(-1, HIDDEN)
            return F.linear(flat.float(), self.low.float()).softmax(-1)
        return normed + x if self.other == "residual" else normed

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        total = x + residual if self.adds else x
        normed = llama_norm(total, self.weight)
        found = self.read(normed, x) if self.before else None
        q, scale = SCHEMES[self.scheme](normed)
        found = self.read(normed, x) if found is None else found
        return q, scale, found, *((total,) if self.adds and self.live else ())


def check(block: Block, *shape: int, dtype: torch.dtype = torch.bfloat16) -> None:
    x, residual = torch.randn(2, *shape).to(dtype).unbind(0)
    block.to(dtype)
    # the router's product in float32 is the subject of another fusion, whose kernel takes long in the interpreter
    others = [f for name, f in fusion_passes.registry().items() if name != "router_logits"]
    result = fuse(block, x, residual, only=others)
    name = f"{'add_' * block.adds}rms_norm"
    assert result.report.matches == {f"{name}_{block.scheme}": 1}, result.report
    assert result.report.near_misses == []
    (site,) = result.report.sites
    assert site.implementations[0].startswith(f"{name}_and_{block.scheme}:")
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert torch.equal(expected.view(torch.uint8), actual.view(torch.uint8))


@pytest.mark.parametrize("scheme", SCHEMES)
@given(
    adds=st.booleans(),
    live=st.booleans(),
    before=st.booleans(),
    other=st.sampled_from(OTHERS),
    shape=st.sampled_from([(1, HIDDEN), (6, HIDDEN), (2, 3, HIDDEN)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_both_come_of_one_op(scheme, adds, live, before, other, shape, dtype):
    torch.manual_seed(0)
    check(Block(scheme, adds, live, other, before), *shape, dtype=dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_norm_that_nobody_else_reads_is_not_written(scheme):
    class Plain(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return SCHEMES[scheme](llama_norm(x, weight))

    x, weight = torch.randn(5, HIDDEN).bfloat16(), torch.randn(HIDDEN).bfloat16()
    result = fuse(Plain(), x, weight, only=list(fusion_passes.registry().values()))
    (site,) = result.report.sites
    assert site.implementations[0].startswith(f"rms_norm_{scheme}:")


def test_two_quantizations_of_one_norm():
    """The wider fusion takes one of them, and the norm that it returns is what the other quantizes."""

    class Twice(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            normed = llama_norm(x, weight)
            return *per_group(normed), *per_token(normed)

    x, weight = torch.randn(5, HIDDEN).bfloat16(), torch.randn(HIDDEN).bfloat16()
    result = fuse(Twice(), x, weight, only=list(fusion_passes.registry().values()))
    found = [site.implementations[0].split(":")[0] for site in result.report.sites]
    assert sorted(found) == ["rms_norm_and_group_quant", "token_quant"]
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert torch.equal(expected.view(torch.uint8), actual.view(torch.uint8))
