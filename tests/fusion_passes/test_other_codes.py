"""Quantization to codes that nothing fuses is told in every spelling; pixels are not taken for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusion_passes.testing import fuse
from tests.fusion_passes.helpers import FP8, calls, everything, llama_norm, random

pytestmark = pytest.mark.usefixtures("references")

UINT8 = torch.uint8
WORDS = "makes codes of uint8; accepted: int8"


def dynamic(x: Tensor, dims: int | tuple[int, ...] = -1, by_sub: bool = False) -> Tensor:
    """As torchao's affine quantization in float32; the zero point is rounded to whole codes as well."""
    x = x.float()
    low, high = x.amin(dims, keepdim=True).clamp(max=0), x.amax(dims, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255.0).clamp(min=1e-8)
    zero = (0 - torch.round(low / scale) if by_sub else -torch.round(low / scale)).clamp(0, 255)
    codes = (torch.round(x / scale) + zero).clamp(0, 255).to(UINT8)
    return (codes.float() - zero.to(UINT8)) * scale


SCALE, ZERO = torch.tensor([0.02]), torch.tensor([128], dtype=torch.int32)
GIVEN: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "divided": lambda x, s, z: (torch.round(x.float() / s) + z).clamp(0, 255).to(UINT8),
    "times the reciprocal": lambda x, s, z: torch.clamp(torch.round(x * (1.0 / s)) + z, 0, 255).to(UINT8),
    "zero point first": lambda x, s, z: (z + torch.round(x.float() / s)).clamp(0, 255).to(UINT8),
    "not cut off": lambda x, s, z: (torch.round(x.float() / s) + z).to(UINT8),
    "rounded last": lambda x, s, z: (x.float() / s + z).round().clamp(0, 255).to(UINT8),
    "a number": lambda x, s, z: ((x.float() / s).round() + 128).clamp(min=0).clamp(max=255).byte(),
}  # fmt: skip


@given(
    spelling=st.sampled_from(sorted(GIVEN)),
    zero=st.sampled_from((torch.int32, torch.uint8, torch.float32)),
    shape=st.sampled_from(((7, 96), (2, 3, 64), (1, 33))),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    seed=st.integers(0, 99),
)
def test_a_given_scale(spelling, zero, shape, dtype, seed):
    x = random(*shape, dtype=dtype, seed=seed).abs()  # a cast to uint8 is undefined below 0
    result = fuse(GIVEN[spelling], x, SCALE, ZERO.to(zero), only=everything())
    assert result.report.matches == {}
    (miss,) = result.report.near_misses
    assert WORDS in miss.reason
    assert torch.equal(*result.expected, *result.actual)


@pytest.mark.parametrize("dynamic_shapes", [None, True])
@pytest.mark.parametrize("by_sub", [False, True])
@pytest.mark.parametrize("dims", [-1, (0, 1)])
def test_a_scale_that_is_found(dims, by_sub, dynamic_shapes):
    """The nodes that an int8 one shares with it are no reason of their own, and nor is its zero point."""
    result = fuse(
        lambda x: dynamic(x, dims, by_sub),
        random(5, 96),
        only=everything(),
        dynamic=dynamic_shapes,
    )
    assert result.report.matches == {}
    (miss,) = result.report.near_misses
    assert WORDS in miss.reason
    assert calls(result.after.graph) == calls(result.before.graph)


PRODUCERS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: llama_norm(x, torch.full((x.shape[-1],), 1.5, dtype=x.dtype)),
    "silu_mul": lambda x: F.silu(x) * x.flip(0),
}


@pytest.mark.parametrize("name", sorted(PRODUCERS))
def test_what_it_reads_is_fused_alone(name):
    result = fuse(lambda x: dynamic(PRODUCERS[name](x)), random(5, 96), only=everything())
    assert result.report.matches == {name: 1}
    assert WORDS in result.report.near_misses[-1].reason


def test_another_quantization_beside_it_is_told_too():
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.float().abs().amax(-1, keepdim=True) + 1e-4
        return dynamic(x), (x.float() / scale).to(FP8)

    result = fuse(both, random(5, 96), only=everything())
    unlike, codes = (miss.reason for miss in result.report.near_misses)
    assert "expected div, found add" in unlike
    assert WORDS in codes


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", ["float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_another_float8(name, fixed):
    dtype = getattr(torch, name)
    most = torch.finfo(dtype).max

    def quantize(x: Tensor, given: Tensor) -> Tensor:
        scale = given if fixed else x.float().abs().amax(-1, keepdim=True).clamp(min=1e-8) / most
        return (x.float() / scale).clamp(-most, most).to(dtype)

    result = fuse(quantize, random(5, 96), SCALE, only=everything())
    assert result.report.matches == {}
    (miss,) = result.report.near_misses
    assert f"makes codes of {name}; accepted: float8_e4m3fn and int8" in miss.reason


@pytest.mark.parametrize("offset", [True, False])
def test_int8_by_way_of_whole_numbers(offset):
    """As for a QNN: a zero point is added to what was rounded and cast."""

    def quantize(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        codes = torch.round(x.float() / scale).to(torch.int32)
        return (codes + zero if offset else codes).clamp(-128, 127).to(torch.int8)

    result = fuse(quantize, random(5, 96), SCALE, ZERO, only=everything())
    assert result.report.matches == {}
    (miss,) = result.report.near_misses
    assert "expected round, found clamp_max" in miss.reason


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "pixels": lambda x: (x.float() * 255).round().clamp(0, 255).to(UINT8),
    "pixels over their largest": lambda x: (x / x.amax() * 255).round().clamp(0, 255).to(UINT8),
    "a mask": lambda x: (x > 0).to(UINT8),
    "a product of as many": lambda x: (x * x.flip(0)).round().clamp(0, 255).to(UINT8),
    "a choice": lambda x: x.argmax(-1).to(torch.int8),
    "half a byte": lambda x: ((x / x.abs().amax(-1, True)).round() + 8).clamp(0, 15).to(UINT8),
}


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_what_is_no_quantization_is_not_told(name):
    result = fuse(OTHERS[name], random(5, 96), only=everything())
    assert result.report.near_misses == []
