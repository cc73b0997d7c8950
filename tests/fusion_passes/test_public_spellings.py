"""Quantizations as public model code and serving engines write them: found, or reported and left as they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusion_passes import verify
from fusion_passes.testing import fuse
from tests.fusion_passes.helpers import FP8, calls, everything, random

pytestmark = pytest.mark.usefixtures("references")


def largest_by_max_of_a_dimension(x: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek's inference code: max with indices that nobody reads, no bound, no clamp."""
    groups = x.view(*x.shape[:-1], -1, 128).float()
    scale = torch.max(torch.abs(groups), dim=-1, keepdim=True)[0] / 448.0
    return (groups / scale).to(FP8).view(x.shape), scale.squeeze(-1)


def bound_in_16_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """As SGLang's reference: the bound stands before the cast, and is rounded to 16 bits."""
    groups = x.reshape(x.numel() // 128, 128)
    amax = groups.abs().max(dim=-1, keepdim=True)[0].clamp(min=1e-10).to(torch.float32)
    scale = amax / 448.0
    codes = (groups / scale).clamp(min=-448.0, max=448.0).to(FP8)
    return codes.reshape(x.shape), scale.reshape(*x.shape[:-1], -1)


def bounded_scale_and_its_reciprocal(x: Tensor) -> tuple[Tensor, Tensor]:
    """As vLLM's per-token quantization in plain PyTorch."""
    amax, _ = x.abs().max(dim=-1)
    scale = (amax.unsqueeze(-1).to(torch.float32) / 448.0).clamp(min=1.0 / (448.0 * 512.0))
    return (x.to(torch.float32) * scale.reciprocal()).clamp(-448.0, 448.0).to(FP8), scale


def reciprocal_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """As HQQ's int8 activations: `values` of max, codes by the reciprocal."""
    scale = x.abs().max(dim=1, keepdim=True).values.float() / 127.0
    return torch.round(x.float() * (1 / scale)).clamp(-127, 127).to(torch.int8), scale


def least_by_min_of_a_dimension(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both ends by max and min with indices."""
    x = x.float()
    low = x.min(dim=-1, keepdim=True)[0].clamp(max=0)
    high = x.max(dim=-1, keepdim=True)[0].clamp(min=0)
    scale = ((high - low) / 255.0).clamp(min=1e-5)
    zero = (-128 - torch.round(low / scale)).clamp(-128, 127)
    return (torch.round(x / scale) + zero).clamp(-128, 127).to(torch.int8), scale, zero


def ends_at_once(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both ends by aminmax, as observers find them; the values are cast once more to be quantized."""
    low, high = torch.aminmax(x.float(), dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / 255.0).clamp(min=1e-5)
    zero = (-128 - torch.round(low / scale)).clamp(-128, 127)
    codes = (torch.round(x.float() / scale) + zero).clamp(-128, 127)
    return codes.to(torch.int8), scale, zero


def largest_by_a_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """The infinity norm is the largest magnitude."""
    wide = x.float()
    scale = wide.norm(p=math.inf, dim=-1, keepdim=True).clamp(min=1e-12) / 448.0
    return (wide / scale).clamp(-448.0, 448.0).to(FP8), scale


def powers_by_pow(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scales as powers of two, by an operator of Python in place of exp2."""
    groups = x.float().unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448.0
    scale = 2 ** scale.log2().ceil()
    return (groups / scale).clamp(-448.0, 448.0).to(FP8).flatten(-2), scale.squeeze(-1)


def in_place(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every step over the one before it, in memory of its own."""
    wide = x.to(torch.float32, copy=True)
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-10).div_(448.0)
    return wide.div_(scale).clamp_(-448.0, 448.0).to(FP8), scale


def scales_repeated_over_channels(x: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of a group written once for each of its channels."""
    scale = x.float().unflatten(-1, (-1, 128)).abs().amax(-1).clamp(min=1e-10) / 448.0
    repeated = scale.repeat_interleave(128, dim=-1)
    return (x.float() / repeated).clamp(-448.0, 448.0).to(FP8), scale


def groups_as_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Groups as the rows of a matrix; the scales are handed on transposed and contiguous."""
    tokens, width = x.shape
    groups = x.reshape(tokens * width // 128, 128).float()
    scale = groups.abs().amax(1).clamp(min=1e-10) / 448.0
    codes = (groups / scale[:, None]).to(FP8).reshape(tokens, width)
    return codes, scale.reshape(tokens, -1).t().contiguous()


def flattened(x: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for all, [1, 1]."""
    wide = x.float()
    scale = wide.flatten().abs().max().clamp(min=1e-12) / 448.0
    return (wide / scale).to(FP8), scale.view(1, 1)


def rounded_and_back(x: Tensor) -> tuple[Tensor]:
    """Quantized and dequantized at once, as simulations of a checkpoint do."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (((wide / scale).clamp(-448.0, 448.0).to(FP8).float() * scale).to(x.dtype),)


def by_a_number_and_widened(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest magnitude alone is cast, and multiplied; 16-bit values are widened by their scale."""
    groups = x.unflatten(-1, (-1, 128))
    amax = groups.abs().amax(-1, keepdim=True).float().clamp_min(1e-4)
    scale = amax * (1 / 448.0)
    return (groups / scale).clamp(-448.0, 448.0).to(FP8).flatten(-2), scale.squeeze(-1)


def power_of_a_magnitude(x: Tensor) -> tuple[Tensor, Tensor]:
    """As DeepGEMM raised scales: 2 ** ceil(log2(|scale|)), and values times the reciprocal."""
    groups = x.view(x.shape[0], -1, 128)
    scale = groups.abs().float().amax(dim=2).clamp(1e-4) / 448.0
    scale = torch.pow(2.0, torch.ceil(torch.log2(scale.abs())))
    return (groups * (1.0 / scale.unsqueeze(2))).to(FP8).view(x.shape), scale


def scale_of_one_element(x: Tensor) -> tuple[Tensor, Tensor]:
    """One scale for the tensor, of a dimension, which widens the values without a cast."""
    scale = x.abs().max().unsqueeze(-1).float().clamp(min=1e-6) / 448.0
    return (x / scale).clamp(-448.0, 448.0).to(FP8), scale


def all_codes_of_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """As version 2 of torchao's int8 configuration, which torchao 0.18 has alone."""
    zeros = torch.zeros(x.shape[0], 1, dtype=x.dtype)
    low, high = torch.minimum(x.amin(-1, True), zeros), torch.maximum(x.amax(-1, True), zeros)
    scale = (torch.maximum(-low, high) / 127.5).float().clamp(min=2.0**-23).to(x.dtype).float()
    zero_point = torch.zeros_like(zeros).to(torch.int8)
    codes = (torch.round(x * (1.0 / scale)) + zero_point).clamp(-128, 127)
    return codes.to(torch.int8), scale


FOUND = {
    by_a_number_and_widened: "group_quant",
    power_of_a_magnitude: "group_quant",
    scale_of_one_element: "tensor_quant",
    all_codes_of_int8: "token_quant",
    largest_by_a_norm: "token_quant",
    powers_by_pow: "group_quant",
    in_place: "token_quant",
    scales_repeated_over_channels: "group_quant",
    groups_as_rows: "group_quant",
    flattened: "tensor_quant",
    rounded_and_back: "token_quant",
    ends_at_once: "token_quant_asymmetric",
    largest_by_max_of_a_dimension: "group_quant",
    bound_in_16_bits: "group_quant",
    bounded_scale_and_its_reciprocal: "token_quant",
    reciprocal_int8: "token_quant",
    least_by_min_of_a_dimension: "token_quant_asymmetric",
}


@pytest.mark.parametrize("spelling", FOUND, ids=lambda fn: fn.__name__)
@given(
    tokens=st.integers(2, 9),
    groups=st.sampled_from((2, 3)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    seed=st.integers(0, 99),
    spread=st.sampled_from((1.0, 1e-3, 100.0)),
)
def test_found(spelling, tokens, groups, dtype, seed, spread):
    x = random(tokens, 128 * groups, dtype=dtype, seed=seed) * spread
    result = fuse(spelling, x, only=everything())
    assert result.report.matches == {FOUND[spelling]: 1}
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert expected.dtype == actual.dtype
        if expected.dtype is FP8:
            expected, actual = expected.view(torch.uint8), actual.view(torch.uint8)
        assert torch.equal(expected, actual)


@pytest.mark.parametrize("tokens", [1, 4])
def test_zeros_below_a_bound_of_16_bits(tokens):
    """1e-10 is another number in bfloat16, and none but 0 in float16."""
    for dtype, bound in ((torch.bfloat16, 1e-10), (torch.float16, 0.0)):
        result = fuse(bound_in_16_bits, torch.zeros(tokens, 256, dtype=dtype), only=everything())
        assert result.report.matches == {"group_quant": 1}
        scale = torch.tensor(bound, dtype=dtype).float() / 448.0
        assert (result.actual[1] == scale).all()
        assert verify.difference(result.expected[1], result.actual[1]) is None


def test_indices_that_are_read_keep_their_operator():
    def with_indices(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.float()
        amax, where = wide.abs().max(dim=-1, keepdim=True)
        scale = amax.clamp(min=1e-10) / 448.0
        return (wide / scale).clamp(-448.0, 448.0).to(FP8), scale, where

    result = fuse(with_indices, random(3, 256), only=everything())
    assert "token_quant" not in result.report.matches
    assert calls(result.after.graph) == calls(result.before.graph)


def max_over_amax(x: Tensor) -> tuple[Tensor, Tensor]:
    """As DeepGEMM's tests and FBGEMM have it: values times 448 / amax, which rounds otherwise than x / (amax / 448)."""
    inverse = 448.0 / x.abs().float().amax(-1, keepdim=True).clamp(1e-4)
    return (x.float() * inverse).clamp(-448.0, 448.0).to(FP8), inverse.reciprocal()


def rounded_in_16_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """As SmoothQuant's: scale, quotient and code all in 16 bits."""
    scale = x.abs().max(dim=-1, keepdim=True)[0].clamp(min=1e-5) / 127
    return (x / scale).round().clamp(-128, 127).to(torch.int8), scale


def unclamped_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """As bitsandbytes: values times 127 / amax, and amax kept in place of a scale."""
    wide = x.float()
    amax = wide.abs().amax(dim=1)
    return torch.round(wide * (127.0 / amax.unsqueeze(-1))).to(torch.int8), amax


def inverse_that_is_zero(x: Tensor) -> tuple[Tensor, Tensor]:
    """As llama.cpp's blocks of 32: the reciprocal of a scale of 0 is 0."""
    groups = x.float().view(*x.shape[:-1], -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127.0
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1.0 / scale)
    return torch.round(groups * inverse).to(torch.int8).view(x.shape), scale.squeeze(-1)


def an_eps_that_is_added(x: Tensor) -> tuple[Tensor, Tensor]:
    """Another scale than one with a bound."""
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) + 1e-8) / 448.0
    return (wide / scale).clamp(-448.0, 448.0).to(FP8), scale


def a_bound_that_is_a_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = torch.maximum(wide.abs().amax(-1, keepdim=True), torch.tensor(1e-10)) / 448.0
    return (wide / scale).clamp(-448.0, 448.0).to(FP8), scale


def larger_of_both_ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest magnitude, but for the sign of a zero."""
    wide = x.float()
    scale = torch.maximum(wide.amax(-1, keepdim=True), -wide.amin(-1, keepdim=True)) / 448.0
    return (wide / scale).clamp(-448.0, 448.0).to(FP8), scale


def one_where_it_is_zero(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True) / 448.0
    scale = torch.where(scale == 0, 0.5, scale)
    return (wide / scale).clamp(-448.0, 448.0).to(FP8), scale


def divided_in_16_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = (x.abs().amax(-1, keepdim=True) / 448.0).clamp(min=1e-6)
    return (x / scale).to(FP8), scale.float()


def in_float64(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.double()
    scale = wide.abs().amax(-1, keepdim=True) / 448.0
    return (wide / scale).to(FP8), scale.float()


@pytest.mark.parametrize(
    "spelling",
    [
        max_over_amax,
        rounded_in_16_bits,
        unclamped_int8,
        inverse_that_is_zero,
        an_eps_that_is_added,
        a_bound_that_is_a_tensor,
        larger_of_both_ends,
        one_where_it_is_zero,
        divided_in_16_bits,
        in_float64,
    ],
    ids=lambda fn: fn.__name__,
)
def test_reported_and_left(spelling):
    result = fuse(spelling, random(6, 256), only=everything())
    assert result.report.matches == {}
    assert [miss.fusion for miss in result.report.near_misses] == ["quantization"]
    assert "expected" in result.report.near_misses[0].reason
    assert calls(result.after.graph) == calls(result.before.graph)


def by_tokens(x: Tensor) -> Tensor:
    return x.float() / (x.float().abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127.0)


def of_all_codes_by_127(x: Tensor) -> Tensor:
    """Codes from -128 on need a scale of amax / 127.5."""
    zeros = torch.zeros(x.shape[0], 1, dtype=x.dtype)
    low, high = torch.minimum(x.amin(-1, True), zeros), torch.maximum(x.amax(-1, True), zeros)
    scale = (torch.maximum(-low, high) / 127.5).float().clamp(min=1e-6).to(x.dtype).float()
    zero_point = torch.zeros_like(zeros).to(torch.int8)
    return (torch.round(x * (1.0 / scale)) + zero_point).clamp(-127, 127).to(torch.int8)


ROW, CHANNEL, ONE = torch.full((6, 1), 0.1), torch.full((256,), 0.1), torch.full((1,), 0.1)
GIVEN = torch.full((1,), 0.1, dtype=torch.bfloat16)
REASONS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], tuple[str, ...]]] = {
    "int8 that is cut off": (lambda x: by_tokens(x).to(torch.int8), (), ("round", "div")),
    "int8 by trunc": (lambda x: torch.trunc(by_tokens(x)).to(torch.int8), (), ("trunc",)),
    "int8 by floor": (lambda x: torch.floor(by_tokens(x) + 0.5).to(torch.int8), (), ("floor",)),
    "int8 from -128 to 126 by a given scale": (
        lambda x, scale: (x.float() / scale).round().clamp(-128, 126).to(torch.int8),
        (ONE,),
        ("clamped to -128 .. 126, not to -128 .. 127",),
    ),
    "all codes, clamped to fewer": (
        of_all_codes_by_127,
        (),
        ("clamped to -127 .. 127, not to -128 .. 127",),
    ),
    "a given scale per token": (
        lambda x, scale: (x.float() / scale).clamp(-448, 448).to(FP8),
        (ROW,),
        ("scale is read as 6 x 256 repeated",),
    ),
    "a given scale per channel": (
        lambda x, scale: (x.float() / scale).clamp(-448, 448).to(FP8),
        (CHANNEL,),
        ("scale is read as 6 repeated x 256",),
    ),
    "quotients in 16 bits": (
        lambda x, scale: (x / scale).clamp(-448, 448).to(FP8),
        (GIVEN,),
        ("expected div in torch.float32", "in torch.bfloat16"),
    ),
    "powers of two without a bound": (
        lambda x: (x / powers(x)).to(FP8),
        (),
        ("zeros have the scale 0",),
    ),
    "int8 times 127 / amax": (
        lambda x: torch.round(x.float().mul(127 / largest(x))).to(torch.int8),
        (),
        ("expected reciprocal", "mul"),
    ),
}


def largest(x: Tensor) -> Tensor:
    return x.float().abs().amax(-1, keepdim=True).clamp_min(1e-10)


def powers(x: Tensor) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(x.float().abs().amax(-1, keepdim=True) / 448.0)))


@pytest.mark.parametrize("name", sorted(REASONS))
def test_the_reason_is_what_differs(name):
    spelling, rest, words = REASONS[name]
    result = fuse(spelling, random(6, 256), *rest, only=everything())
    assert result.report.matches == {}
    (miss,) = result.report.near_misses
    assert all(word in miss.reason for word in words), miss.reason
    assert not any("custom_ops" in call for call in calls(result.after.graph))


def test_a_norm_and_a_quantization_in_one_place_are_both_told():
    def both(x: Tensor, weight: Tensor) -> Tensor:
        wide = x.double()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        h = weight * normed.to(x.dtype)
        return max_over_amax(h)[0]

    result = fuse(both, random(6, 256), random(256), only=everything())
    assert result.report.matches == {}
    assert {miss.fusion for miss in result.report.near_misses} == {"rms_norm", "quantization"}


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_magnitude_of_what_may_have_a_sign_stays(sign):
    """|v| is v only where v has no sign: a scale times a negative number has one."""

    def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.float()
        scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448.0
        scale = (scale * sign).abs()
        return (wide / scale).clamp(-448.0, 448.0).to(FP8), scale

    result = fuse(quantize, random(6, 256), only=everything())
    assert result.report.matches == ({} if sign < 0 else {"token_quant": 1})
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert torch.equal(expected.float(), actual.float())
