"""Quantizations beyond float32 scales of rows: powers of two, blocks, zero points; and libraries that spell them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor as T

from custom_ops.quantization.reference import power_of_two
from fusion_passes import manager, registry, settings, torch_internals
from fusion_passes.arithmetic import MAX
from fusion_passes.testing import fuse
from fusion_passes.testing.equivalence import Result
from tests.fusion_passes.helpers import zero_points

pytestmark = pytest.mark.usefixtures("references")

FP8, INT8 = torch.float8_e4m3fn, torch.int8
QUANT = ("group_quant", "token_quant", "tensor_quant", "block_quant", "token_quant_asymmetric")
ACTIVATIONS = (torch.bfloat16, torch.float16)


def alone() -> list[Any]:
    return [registry()[name] for name in QUANT]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> T:
    """Normal values of very different rows, one of them zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x *= torch.exp2(torch.randint(-12, 8, (*shape[:-1], 1), generator=generator))
    x[0] = 0.0
    return x.to(dtype)


def keywords(result: Result) -> dict[str, Any]:
    """How the op that replaced a spelling rounds."""
    (node,) = [n for n in result.after.graph.nodes if str(n.target).startswith("custom_ops.")]
    return dict(node.kwargs)


def assert_same(result: Result) -> None:
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert expected.dtype is actual.dtype
        same = torch.equal(expected.float().nan_to_num(7e30), actual.float().nan_to_num(7e30))
        assert same, "not bit for bit what eager computes"


# ---- scales that are powers of two --------------------------------------------------------------------------------


def raised(scale: T, by: str) -> T:
    exponent = torch.ceil(torch.log2(scale))
    return torch.exp2(exponent) if by == "exp2" else torch.pow(2.0, exponent)


@st.composite
def powers(draw: st.DrawFn) -> tuple[str, Callable[[T], tuple[T, T]], dict[str, Any]]:
    kind = draw(st.sampled_from(("group", "token", "tensor")))
    bound = draw(st.sampled_from(("amax", "scale")))
    divisor = draw(st.sampled_from(("number", "tensor")))
    by = draw(st.sampled_from(("exp2", "pow")))
    inverse, clamp = draw(st.booleans()), draw(st.booleans())
    promoted = kind != "tensor" and divisor == "number" and draw(st.booleans())

    def quantize(x: T) -> tuple[T, T]:
        shape, wide = x.shape, x.float()
        x = x if promoted else wide
        if kind == "group":
            x, wide = (each.view(*shape[:-1], -1, 128) for each in (x, wide))
        amax = wide.abs().amax() if kind == "tensor" else wide.abs().amax(-1, keepdim=True)
        amax = amax.clamp(1e-4) if bound == "amax" else amax
        scale = amax / (448.0 if divisor == "number" else amax.new_full((), 448.0))
        scale = scale.clamp(min=1e-9) if bound == "scale" else scale
        scale = raised(scale, by)
        codes = x * (1.0 / scale) if inverse else x / scale
        codes = codes.clamp(-448.0, 448.0) if clamp else codes
        return codes.to(FP8).view(shape), scale

    wanted = {
        "scale_mode": "divide",
        "code_mode": "reciprocal" if inverse else "divide",
        "min_amax": 1e-4 if bound == "amax" else 0.0,
        "min_scale": 1e-9 if bound == "scale" else 0.0,
    }
    return f"{kind}_quant", quantize, wanted


@given(
    drawn=powers(),
    tokens=st.sampled_from((2, 5)),
    groups=st.sampled_from((3, 5)),
    dtype=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 99),
)
def test_a_power_of_two_above_the_scale(drawn, tokens, groups, dtype, seed) -> None:
    name, quantize, wanted = drawn
    x = values((tokens, 128 * groups), dtype, seed)
    x[-1, :3] = torch.tensor([448.0, float("nan") if seed % 3 == 0 else 1.0, 2.0])
    x[-1, 130] = float("inf") if seed % 2 == 0 else 1.0
    result = fuse(quantize, x, only=alone())
    assert result.report.matches == {name: 1}, result.report
    found = {"scale_mode": "divide", "code_mode": "divide", "min_scale": 0.0} | keywords(result)
    assert found.pop("scale_format") == "ue8m0"
    assert {key: found[key] for key in wanted} == wanted
    assert_same(result)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("by", ["exp2", "pow"])
@pytest.mark.parametrize("dtype", ACTIVATIONS)
def test_the_logarithm_finds_the_power_of_two_of_every_amax(device, by, dtype) -> None:
    """What makes the two one meaning: no largest magnitude of 16 bits over 448 is only nearly a power of two."""
    largest = torch.tensor(float("inf"), dtype=dtype).view(torch.int16).item()
    amax = torch.arange(largest + 2, dtype=torch.int32, device=device).to(torch.int16).view(dtype)
    for bound in (1e-10, 1e-4, 2.0**-117):  # 2^-126 is the least scale
        amax = amax.float().clamp(bound)
        for scale in (amax / 448.0, amax / amax.new_full((), 448.0)):
            wanted, found = power_of_two(scale), raised(scale, by)
            assert torch.equal(wanted.nan_to_num(7.0), found.nan_to_num(7.0))


def per_token(bound: Callable[[T], T], power: Callable[[T], T]) -> Callable[[T], T]:
    def quantize(x: T) -> T:
        scale = power(bound(x.float().abs().amax(-1, keepdim=True)) / 448.0)
        return (x.float() / scale).to(FP8)

    return quantize


def from_bits(scale: T) -> T:
    bits = scale.abs().float().view(torch.int)
    exponent = ((bits >> 23) & 0xFF) + (bits & 0x7FFFFF).bool().int()
    return (exponent.clamp(1, 254) << 23).view(torch.float)


def deep_gemm(x: T) -> tuple[T, T]:
    """DeepGEMM's per_token_cast_to_fp8, of a width that it need not pad."""
    groups = x.view(x.shape[0], -1, 128)
    scale = from_bits(groups.abs().float().amax(dim=2).view(x.shape[0], -1).clamp(1e-4) / 448.0)
    return (groups * (1.0 / scale.unsqueeze(2))).to(FP8).view(x.shape), scale


NEAR_POWER = 448.0 * 2.0**-20 * (1 + 2.0**-22)
NEAR_MISSES = {
    "no bound": (
        per_token(lambda amax: amax, lambda s: raised(s, "exp2")),
        "zeros have the scale 0",
    ),
    "a bound that nearly is one": (
        per_token(lambda amax: amax.clamp(NEAR_POWER), lambda s: raised(s, "exp2")),
        "so close to a power of two",
    ),
    "a subnormal bound": (
        per_token(lambda amax: amax.clamp(1e-37), lambda s: raised(s, "pow")),
        "accepted: a bound from 2^-126 up",
    ),
    "rounded down": (
        per_token(lambda amax: amax.clamp(1e-4), lambda s: torch.exp2(torch.floor(torch.log2(s)))),
        "",  # there is one: which pattern came furthest is a tie
    ),
}


@pytest.mark.parametrize("what", sorted(NEAR_MISSES))
def test_another_power_of_two_is_a_near_miss(what: str) -> None:
    quantize, reason = NEAR_MISSES[what]
    result = fuse(quantize, values((3, 256), torch.bfloat16, 0), only=alone())
    assert result.report.matches == {}
    assert any(reason in miss.reason for miss in result.report.near_misses), result.report
    assert_same(result)


def test_the_bits_of_deep_gemm_are_a_near_miss() -> None:
    """Its powers of two of Inf and NaN are finite. No `fuse`: bits have no meaning in float64, which judges there."""
    (traced,) = torch_internals.capture(deep_gemm, values((3, 256), torch.bfloat16, 0))
    report = manager.run(traced.graph, settings.current(), only=alone())
    assert report.matches == {}
    (miss,) = report.near_misses
    assert "the power of two of Inf and of NaN is 2^127" in miss.reason


# ---- blocks -------------------------------------------------------------------------------------------------------


@given(
    rows=st.sampled_from((1, 2, 3)),
    columns=st.sampled_from((1, 2, 5)),
    dtype=st.sampled_from((FP8, INT8)),
    bound=st.sampled_from(("amax", "scale", "none")),
    inverse=st.booleans(),
    viewed=st.booleans(),
    x_dtype=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 99),
)
def test_blocks(rows, columns, dtype, bound, inverse, viewed, x_dtype, seed) -> None:
    most = MAX[dtype]

    def quantize(x: T) -> tuple[T, T]:
        if viewed:
            blocks = x.view(x.shape[0] // 128, 128, x.shape[1] // 128, 128).float()
        else:
            blocks = x.float().unflatten(0, (-1, 128)).unflatten(-1, (-1, 128))
        amax = blocks.abs().amax((1, 3), keepdim=True)
        amax = amax.clamp(min=1e-10) if bound == "amax" else amax
        scale = amax / most
        scale = scale.clamp(min=1e-10) if bound == "scale" else scale
        codes = blocks * (1.0 / scale) if inverse else blocks / scale
        codes = (codes.round() if dtype is INT8 else codes).clamp(-most, most).to(dtype)
        return codes.view(x.shape), scale.view(rows, columns)

    x = values((128 * rows, 128 * columns), x_dtype, seed)
    x[:128, :128] = 0.0
    result = fuse(quantize, x, only=alone())
    if rows == columns == 1:  # a block that is all there is has one scale, as a tensor has
        assert sum(result.report.matches.values()) == 1, result.report
    else:
        assert result.report.matches == {"block_quant": 1}, result.report
    assert result.report.near_misses == []
    assert_same(result)


def test_blocks_of_another_size_are_a_near_miss() -> None:
    def quantize(x: T) -> T:
        blocks = x.float().view(-1, 64, x.shape[1] // 64, 64)
        scale = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-10) / 448.0
        return (blocks / scale).to(FP8).view(x.shape)

    result = fuse(quantize, values((128, 256), torch.bfloat16, 0), only=alone())
    assert result.report.matches == {}
    assert len(result.report.near_misses) == 1, result.report


# ---- zero points --------------------------------------------------------------------------------------------------


REACHES = (
    lambda x: (x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)),
    lambda x: (x.amin(-1).unsqueeze(-1), x.amax(-1)[..., None]),
)


@given(
    drawn=zero_points(REACHES),
    lead=st.sampled_from(((2,), (5,), (2, 3))),
    width=st.sampled_from((33, 64, 256)),
    dtype=st.sampled_from(ACTIVATIONS),
    shift=st.sampled_from((0.0, 3.0, -3.0)),
    seed=st.integers(0, 99),
)
def test_zero_points(drawn, lead, width, dtype, shift, seed) -> None:
    quantize, wanted = drawn
    x = values((*lead, width), dtype, seed) + shift
    x[0] = 1.0 if wanted["min_scale"] == 0.0 else 0.0  # the codes of 0 / 0 are up to the machine
    result = fuse(quantize, x, only=alone())
    assert result.report.matches == {"token_quant_asymmetric": 1}, result.report
    assert result.report.near_misses == []
    found = {"min_scale": 0.0, "code_mode": "divide"} | keywords(result)
    assert found == wanted
    assert_same(result)


def in_input_dtype(x: T, wide: bool) -> tuple[T, T, T]:
    """torchao 0.17, choose_qparams_affine and quantize_affine of 16-bit values; `wide` as in its first version."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    low, high = torch.min(low, torch.zeros_like(low)), torch.max(high, torch.zeros_like(high))
    scale = torch.clamp((high - low) / 255.0, min=2.0**-23)
    zero = torch.clamp(-128 - torch.round(low / scale), -128, 127).to(INT8)
    scale = scale.float() if wide else scale
    codes = torch.clamp(torch.round(x * (1.0 / scale)) + zero, -128, 127)
    return codes.to(INT8), scale, zero


@given(
    width=st.sampled_from((33, 256)),
    dtype=st.sampled_from(ACTIVATIONS),
    shift=st.sampled_from((0.0, 3.0, -3.0)),
    wide=st.booleans(),
    seed=st.integers(0, 999),
)
def test_zero_points_that_are_rounded_to_16_bits(width, dtype, shift, wide, seed) -> None:
    x = values((7, width), dtype, seed) + shift
    x[0] = 0.0 if dtype is torch.bfloat16 else 1.0  # in float16 the reciprocal of the bound is Inf
    result = fuse(lambda x: in_input_dtype(x, wide), x, only=alone())
    assert result.report.matches == {"token_quant_asymmetric": 1}, result.report
    assert keywords(result) == {
        "scale_mode": "divide_input",
        "code_mode": "reciprocal" if wide else "reciprocal_input",
        "min_scale": 2.0**-23,
    }
    assert_same(result)


def affine(zero_point: Callable[[T, T], T], least: int = -128) -> Callable[[T], T]:
    def quantize(x: T) -> T:
        x = x.float()
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255.0).clamp(min=1e-5)
        codes = torch.round(x / scale) + zero_point(low, scale).clamp(least, least + 255)
        return codes.clamp(least, least + 255).to(INT8 if least < 0 else torch.uint8)

    return quantize


AFFINE_NEAR_MISSES = {
    "rounded with its offset": affine(lambda low, scale: torch.round(-128 - low / scale)),
    "not rounded": affine(lambda low, scale: -128 - low / scale),
    "to uint8": affine(lambda low, scale: -torch.round(low / scale), least=0),
}


@pytest.mark.parametrize("what", ["rounded with its offset", "not rounded"])
def test_another_zero_point_is_a_near_miss(what: str) -> None:
    result = fuse(AFFINE_NEAR_MISSES[what], values((3, 64), torch.bfloat16, 0), only=alone())
    assert result.report.matches == {}
    assert "asymmetric_quantization" in {miss.fusion for miss in result.report.near_misses}
    assert_same(result)


def test_what_never_becomes_int8_is_no_quantization() -> None:
    """As compressed-tensors runs an int8 model in transformers: what is rounded is dequantized at once."""

    def fake_quantize(x: T) -> T:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        low, high = torch.min(low, torch.zeros_like(low)), torch.max(high, torch.zeros_like(high))
        scale = (high - low) / 255.0
        zero = torch.clamp(-128 - low / scale, -128, 127)
        scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
        zero = torch.round(zero).to(INT8)
        codes = torch.round(torch.clamp(x / scale + zero.to(x.dtype), -128, 127))
        return (codes - zero.to(x.dtype)) * scale

    result = fuse(fake_quantize, values((3, 64), torch.bfloat16, 0), only=alone())
    assert result.report.matches == {}
    assert_same(result)


# ---- libraries ----------------------------------------------------------------------------------------------------


def test_the_fp8_linear_of_transformers_and_compressed_tensors() -> None:
    module = pytest.importorskip(
        "transformers.integrations.compressed_tensors", reason="needs transformers"
    )
    if not hasattr(module, "quantize_fp8_per_row"):
        pytest.skip("needs a transformers with CompressedTensorsFP8Linear (5.20 or newer)")
    x = values((5, 192), torch.bfloat16, 0)
    x[1, 3] = float("nan")
    result = fuse(module.quantize_fp8_per_row, x, only=alone())
    assert result.report.matches == {"token_quant": 1}
    assert result.report.near_misses == []
    assert keywords(result) == {"min_amax": 0.0, "scale_mode": "divide_or_one"}
    assert_same(result)
