"""Layouts, their recognition, and QuantSpec."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from custom_ops import scales
from custom_ops.scales import SCALE_LAYOUTS, QuantSpec
from fusion_passes.testing.strategies import relayout, token_shapes


@given(tokens=token_shapes(), groups=st.integers(0, 9), layout=st.sampled_from(SCALE_LAYOUTS))
def test_a_scale_is_recognised_in_the_layout_that_it_was_made_in(tokens, groups, layout):
    scale = scales.empty_scale(tokens, groups, layout, "cpu")
    assert scale.dtype == torch.float32
    assert scale.shape == (*tokens, groups)
    assert list(scale.stride()) == scales.scale_strides(tokens, groups, layout)
    assert scales.has_layout(scale, layout)


@given(
    tokens=token_shapes(min_tokens=1),
    groups=st.integers(1, 9),
    layout=st.sampled_from(SCALE_LAYOUTS),
)
def test_distinct_elements_have_distinct_addresses(tokens, groups, layout):
    scale = scales.empty_scale(tokens, groups, layout, "cpu")
    scale.copy_(torch.arange(scale.numel()).reshape(scale.shape))
    assert torch.equal(scale.flatten(), torch.arange(scale.numel()).float())


@given(
    tokens=token_shapes(),
    groups=st.integers(1, 5),
    layout=st.sampled_from(SCALE_LAYOUTS),
    other=st.sampled_from(SCALE_LAYOUTS),
)
def test_to_layout_keeps_values_and_gives_exact_strides(tokens, groups, layout, other):
    scale = scales.empty_scale(tokens, groups, layout, "cpu").copy_(torch.rand(*tokens, groups))
    moved = scales.to_layout(scale, other)
    assert torch.equal(moved, scale)
    assert list(moved.stride()) == scales.scale_strides(tokens, groups, other)


def test_a_column_major_scale_of_five_tokens():
    assert scales.scale_strides((5,), 3, "column_major") == [1, 5]
    assert scales.scale_strides((5,), 3, "column_major_tma") == [1, 8]
    assert scales.scale_strides((2, 5), 3, "column_major_tma") == [5, 1, 12]
    assert scales.scale_strides((1, 5), 3, "column_major_tma") == [24, 1, 8]
    assert scales.scale_strides((), 3, "column_major_tma") == [4]
    assert scales.scale_strides((0,), 3, "column_major_tma") == [1, 4]


@pytest.mark.parametrize(
    ("scale", "layouts"),
    [
        (torch.rand(1, 1), SCALE_LAYOUTS),
        (torch.rand(3, 8).t(), ("column_major", "column_major_tma")),
        (torch.rand(3, 7).t(), ("column_major",)),
        (torch.rand(4, 6)[:, ::2], ()),
    ],
    ids=["one", "a multiple of 4", "columns", "strided"],
)
def test_layouts_that_coincide_and_strides_that_are_none(scale, layouts):
    assert tuple(each for each in SCALE_LAYOUTS if scales.has_layout(scale, each)) == layouts


@given(tokens=token_shapes(), layout=st.sampled_from(("contiguous", "offset", "pitched", "packed")))
def test_as_rows_reads_row_pitches_in_place(tokens, layout):
    x = relayout(torch.arange(math.prod(tokens) * 6).float().reshape(*tokens, 6), layout)
    rows = scales.as_rows(x)
    assert rows.shape == (math.prod(tokens), 6)
    assert torch.equal(rows, x.reshape(-1, 6) if x.numel() else rows)
    assert rows.stride(1) == 1
    if x.numel():
        assert rows.data_ptr() == x.data_ptr()


def test_quant_spec():
    spec = QuantSpec(group_shape=(128, 128))
    assert spec.scale_shape((300, 257)) == (3, 3)
    assert spec.max == 448.0
    codes, scale = QuantSpec(group_shape=(1, 64), scale_layout="column_major").empty(
        (5, 192), "cpu"
    )
    assert (codes.dtype, codes.stride()) == (torch.float8_e4m3fn, (192, 1))
    assert (scale.shape, scale.stride()) == ((5, 3), (1, 5))


def test_quant_specs_of_other_shapes():
    int8 = torch.int8
    assert QuantSpec(int8, (1, None)).scale_shape((3, 5, 7)) == (3, 5, 1)
    assert QuantSpec(int8, (None, None)).scale_shape((3, 5, 7)) == (1,)
    assert QuantSpec(int8).max == 127.0
    packed = QuantSpec(int8, (1, 32), "ue8m0_packed", "column_major_tma")
    codes, scale = packed.empty((5, 192), "cpu")
    assert (codes.dtype, codes.shape) == (int8, (5, 192))
    assert (scale.dtype, scale.shape, scale.stride()) == (torch.int32, (5, 2), (1, 8))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"group_shape": (1, None), "scale_format": "ue8m0_packed"},
            "scale_format is ue8m0_packed; accepted: float32, ue8m0",
        ),
        (
            {"group_shape": (None, None), "scale_layout": "column_major"},
            "scale_layout is column_major; accepted: row_major",
        ),
        ({"scale_format": "ue8m0_packed"}, "scale_layout is row_major; accepted: column_major_tma"),
    ],
)
def test_quant_spec_refuses_combinations(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**fields)


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("dtype", torch.float8_e5m2, "torch.float8_e4m3fn, torch.int8"),
        (
            "group_shape",
            (1, 16),
            "(1, 32), (1, 64), (1, 128), (1, None), (None, None), (128, 128)",
        ),
        ("scale_format", "e8m0", "float32, ue8m0, ue8m0_packed"),
        ("scale_layout", "tma", "row_major, column_major, column_major_tma"),
    ],
)
def test_quant_spec_refuses_what_no_op_handles(field, value, accepted):
    with pytest.raises(ValueError, match=f"QuantSpec: {field} is") as error:
        QuantSpec(**{field: value})
    assert str(error.value).endswith(f"accepted: {accepted}")


@pytest.mark.parametrize("groups", [1, 3, 32])
def test_strides_of_a_batch_of_one_are_ordered_without_a_guard(groups):
    """Inductor sorts them to require their order, and asks the shape environment about each pair."""
    env = ShapeEnv()
    dynamic = [DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
    x = FakeTensorMode(shape_env=env).from_tensor(
        torch.empty(1, 72, 256), symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic)
    )
    strides = scales.scale_strides((1, x.shape[1]), groups, "column_major_tma")
    before = len(env.guards)
    for a, b in itertools.permutations(strides, 2):
        assert isinstance(bool(a < b), bool)
    assert len(env.guards) == before
