"""int8 with one zero point for a tensor: dynamic and given, in every spelling that real code showed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusion_passes import registry
from fusion_passes.testing import Result, fuse
from tests.fusion_passes.helpers import (
    Reach,
    assert_same,
    everything,
    llama_norm,
    random,
    zero_points,
)

pytestmark = pytest.mark.usefixtures("references")

INT8 = torch.int8
DTYPES = st.sampled_from((torch.bfloat16, torch.float16))
WAYS: dict[str, Reach] = {
    "all dimensions": lambda x: (
        x.amin(tuple(range(x.dim())), keepdim=True),
        x.amax(tuple(range(x.dim())), keepdim=True),
    ),
    "amin and amax": lambda x: (x.amin(), x.amax()),
    "min and max": lambda x: (x.min(), x.max()),
    "aminmax": torch.aminmax,
    "flat": lambda x: (x.flatten().min().reshape(1), x.flatten().max().reshape(1)),
}


def alone() -> list[Any]:
    names = ("tensor_quant", "tensor_quant_static", "token_quant")
    return [registry()[name + end] for name in names for end in ("", "_asymmetric")]


def keywords(result: Result) -> dict[str, Any]:
    (node,) = [n for n in result.after.graph.nodes if "custom_ops" in str(n.target)]
    return dict(node.kwargs)


@given(
    drawn=zero_points(list(WAYS.values())),
    lead=st.sampled_from(((2,), (5,), (2, 3))),
    width=st.sampled_from((33, 64, 256)),
    dtype=DTYPES,
    shift=st.sampled_from((0.0, 3.0, -3.0)),
    seed=st.integers(0, 99),
)
def test_dynamic(drawn, lead, width, dtype, shift, seed) -> None:
    quantize, wanted = drawn
    x = random(*lead, width, dtype=dtype, seed=seed) + shift
    result = fuse(quantize, x, only=alone())
    assert result.report.matches == {"tensor_quant_asymmetric": 1}, result.report
    assert result.report.near_misses == []
    assert {"min_scale": 0.0, "code_mode": "divide"} | keywords(result) == wanted
    assert_same(result)


def test_one_token_is_that_of_a_token() -> None:
    x = random(1, 64)
    result = fuse(torchao_dynamic, x, only=alone())
    assert result.report.matches == {"token_quant_asymmetric": 1}
    assert_same(result)


def torchao_dynamic(x: Tensor, wide: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """torchao 0.18, Int8DynamicActivationInt8WeightConfig of PerTensor and MappingType.ASYMMETRIC."""
    low, high = WAYS["all dimensions"](x)
    low, high = torch.min(low, torch.zeros_like(low)), torch.max(high, torch.zeros_like(high))
    scale = torch.clamp((high - low) / 255.0, min=2.0**-23)
    zero = torch.clamp(-128 - torch.round(low / scale), -128, 127).to(INT8)
    scale = scale.float() if wide else scale
    codes = torch.clamp(torch.round(x * (1.0 / scale)) + zero, -128, 127)
    return codes.to(INT8), scale, zero


@given(
    lead=st.sampled_from(((7,), (2, 3))),
    width=st.sampled_from((33, 256)),
    dtype=DTYPES,
    shift=st.sampled_from((0.0, 3.0, -3.0)),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)
def test_torchao_dynamic(lead, width, dtype, shift, wide, seed) -> None:
    x = random(*lead, width, dtype=dtype, seed=seed) + shift
    result = fuse(lambda x: torchao_dynamic(x, wide), x, only=alone())
    assert result.report.matches == {"tensor_quant_asymmetric": 1}, result.report
    assert result.report.near_misses == []
    assert keywords(result) == {
        "scale_mode": "divide_input",
        "code_mode": "reciprocal" if wide else "reciprocal_input",
        "min_scale": 2.0**-23,
    }
    assert_same(result)


def static(
    x: Tensor,
    scale: Tensor,
    zero_point: Any = None,
    *,
    inverse: bool = True,
    ends: tuple[int, int] = (-128, 127),
) -> Tensor:
    """torchao 0.18, Int8StaticActivationInt8WeightConfig; None: as it has zero points of symmetric ones."""
    values = torch.round(x * (1.0 / scale) if inverse else x / scale)
    values = values if zero_point is None else values + zero_point
    return values.clamp(*ends).to(INT8)


@given(
    inverse=st.booleans(),
    cast=st.booleans(),
    promoted=st.booleans(),
    zero_dtype=st.sampled_from((INT8, torch.int32)),
    zero_point=st.sampled_from((0, -7, 127, -128)),
    shape=st.sampled_from(((), (1,), (1, 1))),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
def test_given(inverse, cast, promoted, zero_dtype, zero_point, shape, dtype, seed) -> None:
    x = random(7, 96, dtype=dtype, seed=seed)
    scale = torch.full(shape, 0.017)
    zero = torch.full(shape, zero_point, dtype=zero_dtype)
    promoted = promoted and bool(shape)  # a number of no dimensions widens nothing

    def quantize(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        x = x if promoted else x.float()
        return static(x, scale, zero.float() if cast else zero, inverse=inverse)

    result = fuse(quantize, x, scale, zero, only=alone())
    assert result.report.matches == {"tensor_quant_static_asymmetric": 1}, result.report
    assert result.report.near_misses == []
    assert {"code_mode": "divide"} | keywords(result) == {
        "code_mode": "reciprocal" if inverse else "divide"
    }
    assert torch.equal(*result.expected, *result.actual)


@pytest.mark.parametrize("zeros", [False, True])
@given(inverse=st.booleans(), seed=st.integers(0, 99))
def test_all_codes_without_a_zero_point(zeros, inverse, seed) -> None:
    """As clamp(-128, 127) has them; torchao adds zeros that the graph makes, which no kernel then has to."""

    def quantize(x: Tensor, scale: Tensor) -> Tensor:
        zero = torch.zeros_like(scale, dtype=INT8) if zeros else None
        return static(x, scale, zero, inverse=inverse)

    x = random(7, 96, seed=seed) * 3
    result = fuse(quantize, x, torch.tensor([0.017]), only=alone())
    assert result.report.matches == {"tensor_quant_static_asymmetric": 1}, result.report
    (node,) = [n for n in result.after.graph.nodes if "custom_ops" in str(n.target)]
    assert node.args[2] is None
    assert not any(n.target is torch.ops.aten.full.default for n in result.after.graph.nodes)
    assert torch.equal(*result.expected, *result.actual)
    assert (result.actual[0] == -128).any()


def widened(x: Tensor, *rest: Any) -> Tensor:
    return static(x.float(), *rest)


SCALE, ZERO = torch.tensor([0.017]), torch.tensor([-7], dtype=INT8)
NEAR_MISSES = {
    "the zero point is added before it is rounded": (
        lambda x, s, z: torch.round(x.float() / s + z).clamp(-128, 127).to(INT8),
        (SCALE, ZERO),
        "found add",
    ),
    "codes from -127 on": (
        lambda x, s, z: static(x, s, z, ends=(-127, 127)),
        (SCALE, ZERO),
        "clamped to -127 .. 127, not to -128 .. 127",
    ),
    "a zero point in float32": (
        widened,
        (SCALE, ZERO.float()),
        "is torch.float32, expected torch.int",
    ),
    "a zero point in int64": (widened, (SCALE, ZERO.long()), "is torch.int64, expected torch.int"),
    "a zero point that is a number": (
        lambda x, s: static(x, s, torch.full((1,), 3, dtype=INT8)),
        (SCALE,),
        "its zero point is the number 3",
    ),
    "a scale of 16 bits": (static, (SCALE.bfloat16(), ZERO), "expected"),
    "a scale for each channel": (
        lambda x, s, z: static(x.float(), s, z, inverse=False),
        (torch.full((96,), 0.017), ZERO),
        "scale is read as 5 repeated x 96",
    ),
    "a zero point for each token": (
        widened,
        (SCALE, torch.full((5, 1), 3, dtype=INT8)),
        "zero_point is read as 5 x 96 repeated",
    ),
}


@pytest.mark.parametrize("name", sorted(NEAR_MISSES))
def test_another_meaning_is_a_near_miss(name: str) -> None:
    spelling, rest, words = NEAR_MISSES[name]
    result = fuse(spelling, random(5, 96), *rest, only=everything())
    assert result.report.matches == {}, result.report
    assert any(words in miss.reason for miss in result.report.near_misses), result.report
    assert torch.equal(*result.expected, *result.actual)


WEIGHT = random(96, seed=3)
PRODUCERS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "rms_norm": lambda x, y: (llama_norm(x, WEIGHT),),
    "add_rms_norm": lambda x, y: (llama_norm(x + y, WEIGHT), x + y),
    "silu_mul": lambda x, y: (F.silu(x) * y,),
    "gelu_tanh_mul": lambda x, y: (F.gelu(x, approximate="tanh") * y,),
}


@pytest.mark.parametrize("kind", ["dynamic", "int8", "int32", "none"])
@pytest.mark.parametrize("producer", sorted(PRODUCERS))
def test_producers(producer: str, kind: str) -> None:
    given_scale = {
        "int8": (SCALE, ZERO),
        "int32": (SCALE, ZERO.int()),
        "none": (SCALE, torch.zeros(1, dtype=INT8)),
    }.get(kind, ())

    def made(x: Tensor, y: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        value, *others = PRODUCERS[producer](x, y)
        if kind == "dynamic":
            return *torchao_dynamic(value), *others
        scale, zero = rest
        return static(value, scale, torch.zeros_like(zero) if kind == "none" else zero), *others

    result = fuse(made, random(6, 96), random(6, 96, seed=1), *given_scale, only=everything())
    scheme = "tensor_quant_asymmetric" if kind == "dynamic" else "tensor_quant_static_asymmetric"
    assert result.report.matches == {f"{producer}_{scheme}": 1}, result.report
    assert result.report.near_misses == []
    assert_same(result)
