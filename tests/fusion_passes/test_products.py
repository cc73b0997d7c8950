"""Every product of quantized operands, by the scheme of its operands: as many examples each as the profile says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion_passes import registry
from fusion_passes.testing import assert_fusion_equivalent
from tests.fusion_passes.helpers import NEEDS_ROWS, takes_rows

pytestmark = pytest.mark.usefixtures("references")

PRODUCTS = (
    "block_scaled_linear",
    "rowwise_scaled_mm",
    "scaled_int_mm",
    "scaled_linear",
    "scaled_mm_add",
    "torchao_blockwise_linear",
)
DETAILS = ("bias", "16-bit scales")
"""What does not make another scheme of a pattern."""


def scheme_of(pattern: str) -> str:
    """The dtype and the scopes of a pattern's scales."""
    return ", ".join(word for word in pattern.split(", ") if word not in DETAILS)


SCHEMES = sorted(
    {
        (name, scheme_of(pattern.name))
        for name in PRODUCTS
        for pattern in registry()[name].patterns
        if "refused" not in pattern.constants
    }
)


@pytest.mark.parametrize(("name", "scheme"), SCHEMES)
@given(
    data=st.data(),
    tokens=st.sampled_from((1, 2, 7, 33)),
    features=st.sampled_from((128, 256)),
    hidden=st.sampled_from((128, 256, 384)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    seed=st.integers(0, 99),
)
def test_each_scheme_of_a_product(name, scheme, data, tokens, features, hidden, dtype, seed):
    if name == "rowwise_scaled_mm" and not takes_rows():
        pytest.skip(NEEDS_ROWS)
    fusion = registry()[name]
    alike = [each for each in fusion.patterns if scheme_of(each.name) == scheme]
    pattern = data.draw(st.sampled_from(alike), label="pattern")
    drawn = {
        "num_tokens": tokens,
        "out_features": features,
        "num_blocks": features // 128,
        "num_row_blocks": features // 128,
        "hidden_size": hidden,
        "num_groups": hidden // 128,
        "num_column_blocks": hidden // 128,
        "group_size": 128,
    }
    only = dataclasses.replace(fusion, patterns=(pattern,))
    (result,) = assert_fusion_equivalent(only, sizes=drawn, dtype=dtype, seed=seed)
    assert [site.pattern for site in result.report.sites] == [pattern.name]


def test_every_scheme_is_here():
    """One for each pair of scopes and dtype; a new pattern of another scheme is drawn as often as these."""
    assert {name for name, _ in SCHEMES} == set(PRODUCTS)
    scopes = {scheme for name, scheme in SCHEMES if name == "scaled_linear"}
    assert scopes == {
        f"{dtype}, per {tokens} x per {channels}"
        for dtype in ("float8_e4m3fn", "int8")
        for tokens in ("tensor", "token")
        for channels in ("tensor", "channel")
    }
