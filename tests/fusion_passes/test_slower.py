"""A fusion leaves to stock what was measured to be faster there; the tables here are made up."""

from __future__ import annotations

import json
from importlib import resources

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion_passes import registry, settings, tables
from fusion_passes.quantize import quantize_weight
from fusion_passes.testing import fuse
from tests.fusion_passes.helpers import FP8, assert_same, misses, quantize, random, silu_mul

pytestmark = pytest.mark.usefixtures("references", "fresh_reports")

TOKENS, WIDTH = (4, 6), (200, 300)
REGION = {"dtype": "float8_e4m3fn", "tokens": TOKENS, "width": WIDTH, "why": "0.92 times stock"}


@pytest.fixture(scope="module", autouse=True)
def table():
    """All fusions are on, and some are behind where REGION says."""
    behind = ("token_quant", "silu_mul_token_quant", "silu_mul_group_quant", "group_quant")
    rows = {name: {"on": True, "why": "ahead", "rows": []} for name in registry()}
    for name in behind:
        rows[name]["behind"] = [REGION]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "load", lambda: {90: {"arch": "sm_90", "fusions": rows}})
        patch.setattr(tables, "arch_of", lambda _device: "sm_90")
        yield


def per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (x.float() / scale).clamp(-448.0, 448.0).to(FP8), scale


def per_token_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127.0
    return (x.float() / scale).round().clamp(-127.0, 127.0).to(torch.int8), scale


def is_behind(tokens: int, width: int) -> bool:
    return TOKENS[0] <= tokens <= TOKENS[1] and WIDTH[0] <= width <= WIDTH[1]


@given(tokens=st.integers(1, 9), width=st.sampled_from((130, 199, 200, 256, 300, 301)))
def test_it_fires_where_it_is_not_behind(tokens, width):
    result = fuse(per_token, random(tokens, width))
    assert_same(result)
    assert result.report.matches == ({} if is_behind(tokens, width) else {"token_quant": 1})
    reasons = ["is slower than stock there: 0.92 times stock"] if is_behind(tokens, width) else []
    assert misses(result, "token_quant") == reasons


@given(lead=st.sampled_from(((1, 5), (5, 1), (2, 3))))
def test_tokens_are_counted_over_all_leading_dimensions(lead):
    assert fuse(per_token, random(*lead, 256)).report.matches == {}


@given(low=st.integers(2, 9), more=st.integers(1, 9))
def test_a_graph_for_many_token_counts_has_to_be_ahead_for_each(low, more):
    x = random(low + 1, 256)
    torch._dynamo.mark_dynamic(x, 0, min=low, max=low + more)
    result = fuse(per_token, x)
    touches = low <= TOKENS[1] and low + more >= TOKENS[0]
    assert result.report.matches == ({} if touches else {"token_quant": 1})


def test_a_graph_without_a_largest_count_reaches_every_region():
    x = random(3, 256)
    torch._dynamo.mark_dynamic(x, 0)
    assert fuse(per_token, x).report.matches == {}


def test_no_fusion_takes_a_part_of_what_another_left():
    """The gate and its quantization are one kernel in stock's hands; group_quant alone would make it two."""
    gated = (random(5, 256), random(5, 256, seed=1))
    result = fuse(lambda *halves: quantize(silu_mul(*halves)), *gated)
    assert result.report.matches.keys() <= {"silu_mul"}
    for name in ("silu_mul_group_quant", "group_quant"):
        assert misses(result, name) == ["is slower than stock there: 0.92 times stock"]


def test_a_fusion_that_was_asked_for_fires_everywhere():
    x = random(5, 256)
    for how in ({"fusions": "token_quant"}, {"token_quant": True}, {"fusions": "all"}):
        with settings.patch(**how):
            assert fuse(per_token, x).report.matches == {"token_quant": 1}
    with settings.patch(fusions="-token_quant"):
        assert fuse(per_token, x).report.matches == {}
    with settings.patch(rms_norm=False):  # of another fusion somebody said something
        assert fuse(per_token, x).report.matches == {}


def test_codes_of_another_dtype_have_a_map_of_their_own():
    assert fuse(per_token_int8, random(5, 256)).report.matches == {"token_quant": 1}


def test_scales_for_a_product_are_written_in_its_layout_all_the_same():
    """Stock would leave the layout to another kernel, and the map knows nothing of that one."""
    weight, weight_scale = quantize_weight(random(128, 256, seed=1))

    def linear(x):
        codes, scale = quantize(x)
        operand = (codes.float().unflatten(-1, (-1, 128)) * scale.unsqueeze(-1)).flatten(-2)
        scales = weight_scale.repeat_interleave(128, 1).repeat_interleave(128, 0)
        return operand.to(x.dtype) @ (weight.float() * scales).to(x.dtype).t()

    matches = {"block_scaled_linear": 1, "group_quant": 1}
    assert fuse(linear, random(5, 256)).report.matches == matches


def test_nothing_is_known_of_a_cpu(monkeypatch):
    monkeypatch.setattr(tables, "arch_of", lambda _device: "cpu")
    assert fuse(per_token, random(5, 256)).report.matches == {"token_quant": 1}


def test_the_shipped_tables_have_regions_of_known_dtypes():
    for entry in resources.files(tables.__name__).iterdir():
        if entry.name.endswith(".json"):
            for name, row in json.loads(entry.read_text())["fusions"].items():
                for region in row.get("behind", ()):
                    assert row["on"], f"{name} is off everywhere and needs no regions"
                    assert region["dtype"] in ("int8", "float8_e4m3fn")
                    assert region["tokens"][0] <= region["tokens"][1]
                    assert region["width"][0] <= region["width"][1]
