"""Hand-written quantizations, in the spellings of public code: each is matched to what it computes, or to nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor as T

from fusion_passes import compiled_pattern, registry
from fusion_passes.arithmetic import MAX
from fusion_passes.canonical import quantizations
from fusion_passes.testing import fuse
from fusion_passes.testing.equivalence import Result

pytestmark = pytest.mark.usefixtures("references")

FP8, INT8 = torch.float8_e4m3fn, torch.int8
QUANT = ("group_quant", "token_quant", "tensor_quant", "tensor_quant_static")


def alone() -> list[Any]:
    return [registry()[name] for name in QUANT]


def roundings(result: Result) -> tuple[str, str]:
    """How the op that replaced a spelling rounds: two of these give the same codes for most values."""
    (node,) = [n for n in result.after.graph.nodes if str(n.target).startswith("custom_ops.")]
    return tuple(node.kwargs.get(key, "divide") for key in ("scale_mode", "code_mode"))


@st.composite
def spellings(draw: st.DrawFn) -> tuple[str, Callable[[T], tuple[T, T]], tuple[str, str]]:
    """A dynamic quantization, written one way or another; and the fusion that is to find it."""
    kind = draw(st.sampled_from(("group", "token", "tensor")))
    dtype = draw(st.sampled_from((FP8, INT8)))
    bound = draw(st.sampled_from(("amax", "scale", "none", "or one")))
    inverse, clamp, unflatten, keepdim = (draw(st.booleans()) for _ in range(4))
    by = draw(st.sampled_from(("number", "tensor", *(("reciprocal",) * (bound != "or one")))))
    cast = draw(st.sampled_from(("first", "after abs", "after amax")))
    # 16-bit values that a float32 scale widens; that of a tensor has no dimensions, and does not
    promoted = kind != "tensor" and by == "number" and draw(st.booleans())
    largest = MAX[dtype]

    def quantize(x: T) -> tuple[T, T]:
        shape = x.shape
        if kind == "group":
            x = x.unflatten(-1, (-1, 64)) if unflatten else x.view(*shape[:-1], -1, 64)
        magnitudes = x.float().abs() if cast == "first" else x.abs()
        magnitudes = magnitudes.float() if cast == "after abs" else magnitudes
        if kind == "tensor":
            amax = magnitudes.max() if keepdim else magnitudes.amax()
        else:
            amax = magnitudes.amax(-1, keepdim=True) if keepdim else magnitudes.amax(-1)[..., None]
        amax = amax.float()
        if bound == "amax":
            amax = amax.clamp(min=1e-12)
        if bound == "or one":
            amax = torch.where(amax > 0, amax, torch.ones_like(amax))
        if by == "reciprocal":
            scale = amax * (1.0 / largest)
        else:
            scale = amax / (amax.new_full((), largest) if by == "tensor" else largest)
        if bound == "scale":
            scale = torch.clamp_min(scale, 1e-9)
        x = x if promoted else x.float()
        codes = x * scale.reciprocal() if inverse else x / scale
        codes = codes.round() if dtype is INT8 else codes
        codes = codes.clamp(-largest, largest) if clamp else codes
        return codes.to(dtype).view(shape), scale

    scale_mode, code_mode = (("divide", "reciprocal")[on] for on in (by == "reciprocal", inverse))
    return f"{kind}_quant", quantize, (scale_mode + "_or_one" * (bound == "or one"), code_mode)


@given(
    drawn=spellings(),
    tokens=st.sampled_from((2, 5, 33)),
    groups=st.sampled_from((3, 5)),  # a token of 64 or 128 is a group
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    seed=st.integers(0, 99),
)
def test_every_spelling_is_what_it_computes(drawn, tokens, groups, dtype, seed) -> None:
    name, quantize, wanted = drawn
    x = torch.randn(tokens, 64 * groups, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x[0] = 0.0  # whose scale is what the spellings differ in
    x[-1, -1] = float("nan") if seed % 3 == 0 else 1.0
    result = fuse(quantize, x, only=alone())
    assert result.report.matches == {name: 1}, result.report
    assert roundings(result) == wanted
    assert result.report.near_misses == []
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert expected.dtype is actual.dtype
        same = torch.equal(expected.float().nan_to_num(7e30), actual.float().nan_to_num(7e30))
        assert same, "not bit for bit what eager computes"


@given(
    inverse=st.booleans(),
    promoted=st.booleans(),
    dtype=st.sampled_from((FP8, INT8)),
    seed=st.integers(0, 99),
)
def test_a_given_scale(inverse, promoted, dtype, seed) -> None:
    largest = MAX[dtype]

    def quantize(x: T, scale: T) -> T:
        x = x if promoted else x.float()
        codes = x * (1.0 / scale) if inverse else x / scale
        codes = codes.round() if dtype is INT8 else codes
        return codes.clamp(-largest, largest).to(dtype)

    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(seed)).bfloat16()
    result = fuse(quantize, x, torch.tensor([0.017]), only=alone())
    assert result.report.matches == {"tensor_quant_static": 1}
    assert roundings(result) == ("divide", "reciprocal" if inverse else "divide")
    assert torch.equal(result.expected[0].float(), result.actual[0].float())


NEAR_MISSES = {
    "an eps that is added": lambda amax, x: _codes(x, (amax + 1e-6) / 448.0),
    "another end of the range": lambda amax, x: _codes(x, amax / 440.0),
    "codes clamped to less": lambda amax, x: ((x.float() / (amax / 448.0)).clamp(-240, 240)).to(
        FP8
    ),
    "a square root": lambda amax, x: _codes(x, amax.sqrt() / 448.0),
    "quotients of 16 bits": lambda amax, x: (x / (amax.amax() / 448.0)).to(FP8),
}


def _codes(x: T, scale: T) -> T:
    return (x.float() / scale).clamp(-448.0, 448.0).to(FP8)


@pytest.mark.parametrize("what", sorted(NEAR_MISSES))
def test_another_meaning_is_a_near_miss(what: str) -> None:
    def quantize(x: T) -> T:
        return NEAR_MISSES[what](x.float().abs().amax(-1, keepdim=True), x)

    result = fuse(quantize, torch.randn(5, 128).bfloat16(), only=alone())
    assert result.report.matches == {}
    assert len(result.report.near_misses) == 1, result.report
    assert torch.equal(result.expected[0].float(), result.actual[0].float())


def test_a_static_scale_whose_codes_are_not_saturated_is_a_near_miss() -> None:
    result = fuse(
        lambda x, scale: (x.float() / scale).to(FP8),
        torch.randn(5, 128).bfloat16(),
        torch.tensor([0.1]),
        only=alone(),
    )
    assert result.report.matches == {}
    assert len(result.report.near_misses) == 1, result.report


def test_on_a_gpu_a_number_divides_as_its_reciprocal_multiplies() -> None:
    """The arithmetic depends on the device, as eager's does; nothing is run here."""

    class Here:
        def __init__(self, device: str) -> None:
            self.device, self.scalars = torch.device(device), {}

    for by, device, mode in (
        ("number", "cpu", "divide"),
        ("tensor", "cpu", "divide"),
        ("number", "cuda", "reciprocal"),
        ("tensor", "cuda", "divide"),
        ("reciprocal", "cpu", "reciprocal"),
    ):
        for bound, ending in (("", ""), ("or one", "_or_one")):
            spelling = quantizations.Spelling(FP8, bound, by=by)
            found = spelling.arithmetic(Here(device))  # type: ignore[arg-type]
            assert found.scale_mode == mode + ending


def test_a_calibrated_model_traces_no_dynamic_spelling(monkeypatch) -> None:
    """There are hundreds of them, at some milliseconds each."""
    traced: dict[Any, Any] = {}
    monkeypatch.setattr(compiled_pattern, "_compiled", traced)
    result = fuse(
        lambda x, scale: (x / scale).clamp(-448.0, 448.0).to(FP8),
        torch.randn(5, 128).bfloat16(),
        torch.tensor([0.1]),
        only=alone(),
    )
    assert result.report.matches == {"tensor_quant_static": 1}
    assert not {id(p) for p in quantizations.DYNAMIC.patterns} & {key for key, _ in traced}
