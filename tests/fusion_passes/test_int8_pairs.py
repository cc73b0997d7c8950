"""Every pair of a producer and a scheme, and every scheme alone, where the codes are int8: the patterns have float8."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusion_passes import registry
from fusion_passes.passes import _quantizing
from fusion_passes.testing import assert_fusion_equivalent
from fusion_passes.testing.equivalence import random_inputs
from tests.custom_ops.schemes import PRODUCERS, SCHEMES

pytestmark = pytest.mark.usefixtures("references")

LARGEST = 127.0
PAIRS = (*SCHEMES, *(f"{producer}_{scheme}" for producer in PRODUCERS for scheme in SCHEMES))
SCALARS = {"eps": 1e-5, "min_amax": 1e-10, "alpha": 1.702, "limit": 1.0}


def codes_of(values: Tensor, scale: Tensor) -> Tensor:
    return (values.float() / scale).round().clamp(-LARGEST, LARGEST).to(torch.int8)


def scale_of(amax: Tensor, min_amax: float) -> Tensor:
    amax = amax.clamp(min=min_amax)
    return amax / amax.new_full((), LARGEST)


def group_quant(x: Tensor, group_size: int, min_amax: float) -> tuple[Tensor, Tensor]:
    groups = x.float().unflatten(-1, (-1, group_size))
    scale = scale_of(groups.abs().amax(-1, keepdim=True), min_amax)
    return codes_of(groups, scale).flatten(-2), scale.squeeze(-1)


def token_quant(x: Tensor, min_amax: float) -> tuple[Tensor, Tensor]:
    scale = scale_of(x.float().abs().amax(-1, keepdim=True), min_amax)
    return codes_of(x, scale), scale


def tensor_quant(x: Tensor, min_amax: float) -> tuple[Tensor, Tensor]:
    scale = scale_of(x.float().abs().amax(), min_amax)
    return codes_of(x, scale), scale


def tensor_quant_static(x: Tensor, scale: Tensor) -> tuple[Tensor]:
    return (codes_of(x, scale),)


QUANTIZE: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "group_quant": group_quant,
    "token_quant": token_quant,
    "tensor_quant": tensor_quant,
    "tensor_quant_static": tensor_quant_static,
}


def patterns(name: str) -> list[Any]:
    """The patterns of a fusion with int8 in the place of float8."""
    (scheme,) = [s for s in SCHEMES if name == s or name.removesuffix(f"_{s}") in PRODUCERS]
    producer = name.removesuffix(scheme).removesuffix("_")
    made = getattr(_quantizing, producer.upper()) if producer else _quantizing._VALUES
    given_scheme = getattr(_quantizing, scheme.upper())
    return _quantizing._patterns(
        made, dataclasses.replace(given_scheme, quantize=QUANTIZE[scheme]), name
    )


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, int]:
    return {
        "num_tokens": draw(st.sampled_from((2, 3, 7, 33))),
        "hidden_size": draw(st.sampled_from((3, 64, 130))),
        "group_size": draw(st.sampled_from((32, 64, 128))),
        "num_groups": draw(st.sampled_from((2, 3))),
    }


@pytest.mark.parametrize("name", PAIRS)
@given(
    data=st.data(),
    drawn=sizes(),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    seed=st.integers(0, 99),
)
def test_each_pair_is_equivalent(name, data, drawn, dtype, seed):
    pattern = data.draw(st.sampled_from(patterns(name)), label="pattern")
    inputs = random_inputs(pattern, drawn, dtype=dtype, seed=seed, scalars=SCALARS)
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    rest = {key: value for key, value in inputs.items() if key not in tensors}

    def call(*values: Tensor) -> Any:
        return pattern.fn(**dict(zip(tensors, values, strict=True)), **rest)

    (result,) = assert_fusion_equivalent(registry()[name], call, *tensors.values())
    nodes = [n for n in result.after.graph.nodes if str(n.target).startswith("custom_ops.")]
    assert [node.kwargs["dtype"] for node in nodes] == [torch.int8]


def test_every_pair_is_here():
    quantizing = {
        name
        for name in registry()
        if name.endswith(SCHEMES) and name not in ("shared_group_quant", "block_quant")
    }
    assert quantizing == set(PAIRS)
