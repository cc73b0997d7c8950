"""The public strategies give what they say: values, memory layouts, shapes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion_passes.testing.strategies import (
    ACTIVATION_DTYPES,
    MEMORY_LAYOUTS,
    activation_shapes,
    activations,
    fp8_codes,
    relayout,
    special_values,
    token_shapes,
)
from tests.custom_ops.helpers import bf16, steps


@pytest.mark.parametrize("layout", MEMORY_LAYOUTS)
def test_relayout_moves_values_and_nothing_else(layout):
    x = bf16(3, 4, 6)
    moved = relayout(x, layout)
    assert not (steps(moved, x) != 0).any()
    where = (moved.stride(), moved.storage_offset())
    expected = {
        "contiguous": ((24, 6, 1), 0),
        "offset": ((24, 6, 1), 1),
        "pitched": ((36, 9, 1), 0),
        "packed": ((48, 12, 1), 6),
        "strided": ((48, 12, 2), 0),
        "transposed": ((1, 3, 12), 0),
    }
    assert where == expected[layout]


def test_an_unknown_layout_is_an_error():
    with pytest.raises(ValueError, match="layout is 'sideways'; accepted: contiguous, offset"):
        relayout(bf16(2, 2), "sideways")


@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES)
def test_special_values_are_representable(dtype):
    values = special_values(dtype)
    back = torch.tensor(values, dtype=torch.float64).to(dtype).double().tolist()
    assert [v for v in values if not math.isnan(v)] == [v for v in back if not math.isnan(v)]
    assert any(math.isnan(v) for v in back)


@given(tokens=token_shapes(max_tokens=31, min_tokens=1))
def test_token_shapes_stay_within_their_bounds(tokens):
    assert 1 <= math.prod(tokens) <= 31
    assert len(tokens) <= 2


@given(st.data(), activation_shapes(multiple_of=64, max_elements=1000))
def test_activation_shapes_stay_within_their_bounds(data, shape):
    assert shape[-1] % 64 == 0
    x = data.draw(activations(shape))
    assert x.shape == shape
    assert x.dtype in ACTIVATION_DTYPES
    assert x.is_contiguous()


@given(fp8_codes((9, 31)))
def test_fp8_codes_are_finite(codes):
    assert codes.float().isfinite().all()
