"""Every registered fusion against eager and float64, on its own patterns and on pieces of models."""

from __future__ import annotations

import dataclasses
import importlib.metadata

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusion_passes
from fusion_passes import Constraint, Fusion, Pattern, Scalar, SizeOf, Tensor, registry, settings
from fusion_passes import registered as registered_fusions
from fusion_passes.testing import assert_fusion_equivalent, fuse, model_fragments
from tests.fusion_passes.helpers import (
    FP8,
    NEEDS_ROWS,
    assert_same,
    everything,
    random,
    registered,
    takes_rows,
)

pytestmark = pytest.mark.usefixtures("references")

PATTERNED = [name for name, fusion in registry().items() if fusion.patterns]
MATRIX = {"weight_scale", "b", "b_scale"}  # an input of the patterns that end in a matrix product
dtypes = st.sampled_from((torch.bfloat16, torch.float16))


def few(examples):
    """Fewer examples than the profile where one takes long; as many as it says in nightly runs."""
    profile = hypothesis.settings().max_examples
    return hypothesis.settings(max_examples=examples if profile < 100 else profile)


@st.composite
def sizes(draw: st.DrawFn) -> dict[str, int]:
    """A value for each size name of the shipped fusions."""
    out_features = draw(st.sampled_from((1, 64, 128, 200, 384)))
    return {
        "num_tokens": draw(st.sampled_from((1, 2, 7, 33))),
        "hidden_size": draw(st.sampled_from((1, 3, 64, 130))),
        "intermediate_size": draw(st.sampled_from((1, 5, 64, 128))),
        "group_size": draw(st.sampled_from((64, 128))),
        "num_groups": draw(st.sampled_from((1, 2, 3))),
        "out_features": out_features,
        "num_blocks": -(-out_features // 128),
        "num_row_blocks": draw(st.sampled_from((2, 3))),
        "num_column_blocks": draw(st.sampled_from((1, 2))),
        "rank": draw(st.sampled_from((2, 8, 17))),
        "experts": draw(st.sampled_from((2, 8, 60))),
    }


@pytest.mark.parametrize("name", PATTERNED)
@given(
    data=st.data(),
    drawn=sizes(),
    dtype=dtypes,
    seed=st.integers(0, 99),
    eps=st.sampled_from((1e-6, 1e-5, 0.3)),
)
def test_each_pattern_is_equivalent(name, data, drawn, dtype, seed, eps):
    if name == "rowwise_scaled_mm" and not takes_rows():
        pytest.skip(NEEDS_ROWS)
    fusion = registry()[name]
    firing = [pattern for pattern in fusion.patterns if "refused" not in pattern.constants]
    pattern = data.draw(st.sampled_from(firing), label="pattern")
    if MATRIX & set(pattern.inputs):
        drawn["out_features"] = drawn["num_blocks"] * 128  # one row is no matrix to transpose
        drawn["hidden_size"] = 64 * drawn["num_groups"]
    if name == "router_logits":  # a product of one row or of one channel is none on a CPU
        drawn["num_tokens"], drawn["hidden_size"] = (
            drawn["num_tokens"] + 1,
            drawn["hidden_size"] + 1,
        )
    if name.endswith(("tensor_quant", "tensor_quant_asymmetric")):
        drawn["num_tokens"] += 1  # the whole of one token is what token_quant has for its subject
    if pattern.inputs.keys() >= {"a", "b", "x"}:
        drawn["num_tokens"] += 1  # a row times the column of an adapter of rank 1 is a sum on a CPU
    scalars = {"eps": eps, "min_amax": 1e-10, "alpha": 1.702, "limit": 1.0, "scaling": 0.7}
    if name.endswith("asymmetric"):  # of a token of zeros eager makes the zero point of 0 / 0
        scalars["limit"] = 7.0
        drawn["hidden_size"] += 2
    only = dataclasses.replace(fusion, patterns=(pattern,))
    (result,) = assert_fusion_equivalent(only, sizes=drawn, dtype=dtype, seed=seed, scalars=scalars)
    assert [site.pattern for site in result.report.sites] == [pattern.name]


# a matrix product has several inputs over tokens, each with a symbol of its own when they are marked here
@pytest.mark.parametrize(
    "name",
    [n for n in PATTERNED if registry()[n].stage == 3 and n != "block_quant"],  # it has no tokens
)
def test_each_pattern_is_equivalent_with_symbolic_tokens(name):
    fusion = registry()[name]
    for pattern in fusion.patterns:
        only = dataclasses.replace(fusion, patterns=(pattern,))
        inputs = fusion_passes.testing.random_inputs(
            pattern,
            {
                "num_tokens": 5,
                "hidden_size": 96,
                "intermediate_size": 96,
                "group_size": 128,
                "num_groups": 2,
            },
        )
        tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
        for tensor, spec in zip(
            tensors, (s for s in pattern.inputs.values() if isinstance(s, Tensor)), strict=True
        ):
            if spec.shape[0] == "num_tokens":
                torch._dynamo.mark_dynamic(tensor, 0)
        rest = {key: value for key, value in inputs.items() if not isinstance(value, torch.Tensor)}
        names = [key for key in inputs if key not in rest]

        def call(*values, names=names, rest=rest, fn=pattern.fn):
            return fn(**dict(zip(names, values, strict=True)), **rest)

        result = fuse(call, *tensors, only=[only])
        assert_same(result)
        assert result.report.matches == {name: 1}
        site = result.report.sites[0]
        saved, here = result.report.bytes_saved[name]
        assert "s" in site.sizes["num_tokens"]
        assert saved.subs(dict.fromkeys(saved.free_symbols, 5)) == here


@given(drawn=model_fragments())
def test_fragments_of_models(drawn):
    result = fuse(drawn.module, *drawn.inputs, only=everything())
    assert_same(result)
    assert result.report.matches == drawn.module.expected
    assert result.report.near_misses == []


@given(drawn=model_fragments())
def test_fragments_of_models_with_symbolic_tokens(drawn):
    for value in drawn.inputs:
        if value.dim() > 1 and value.shape[0] > 1:
            torch._dynamo.mark_dynamic(value, 0)
    result = fuse(drawn.module, *drawn.inputs, only=everything())
    assert_same(result)
    assert result.report.matches == drawn.module.expected


@given(drawn=model_fragments(), removed=st.sets(st.sampled_from(list(registry())), min_size=1))
def test_any_subset_of_the_fusions_is_right(drawn, removed):
    """What one fusion leaves is what the others find, and a recognition nobody used is taken back."""
    chosen = [fusion for name, fusion in registry().items() if name not in removed]
    result = fuse(drawn.module, *drawn.inputs, only=chosen)
    assert_same(result)
    assert not removed & result.report.matches.keys()
    assert not any(hasattr(node.target, "meaning_kind") for node in result.after.graph.nodes)


@few(10)
@given(drawn=model_fragments())
def test_fragments_under_dynamic_true(drawn):
    """Everything symbolic: fewer fusions may fire, as nothing guards on a width, but nothing may change."""
    result = fuse(drawn.module, *drawn.inputs, only=everything(), dynamic=True)
    assert_same(result)


def _scaled_tanh(x, scale):
    return torch.tanh(x.float() * scale).to(x.dtype)


def _rewrite_scaled_tanh(m):
    wide = m.cast(m.tensor("x"), torch.float32)
    scaled = m.emit(torch.ops.aten.mul.Tensor, wide, m.scalar("scale"))
    return (m.cast(m.emit(torch.ops.aten.tanh.default, scaled), m.dtype),)


MINE = Fusion(
    name="my_scaled_tanh",
    summary="a third party's fusion",
    stage=3,
    patterns=(Pattern(_scaled_tanh, {"x": Tensor("num_tokens", "width"), "scale": Scalar()}),),
    rewrite=_rewrite_scaled_tanh,
    bytes_before="8*num_tokens*width",
    bytes_after="4*num_tokens*width",
)


@given(tokens=st.integers(1, 9), width=st.integers(1, 40), dtype=dtypes, scale=st.floats(0.25, 4))
def test_a_fusion_of_somebody_else(tokens, width, dtype, scale):
    drawn = {"num_tokens": tokens, "width": width}
    result = assert_fusion_equivalent(MINE, sizes=drawn, dtype=dtype, scalars={"scale": scale})[0]
    assert result.report.bytes_saved["my_scaled_tanh"] == (4 * tokens * width, 4 * tokens * width)
    assert_fusion_equivalent(
        MINE, lambda x: _scaled_tanh(x.view(-1), 2.0).view(x.shape), random(tokens, width)
    )


def test_a_registered_fusion_has_a_toggle(monkeypatch):
    with (
        pytest.raises(settings.SettingsError, match="my_scaled_tanh"),
        settings.patch(my_scaled_tanh=True),
    ):
        pass
    with registered(MINE):
        assert registry()["my_scaled_tanh"] is MINE
        assert MINE.environment_variable == "FUSION_PASSES_MY_SCALED_TANH"
        monkeypatch.setenv("FUSION_PASSES_MY_SCALED_TANH", "1")
        assert settings.current().toggles == {"my_scaled_tanh": True}
        result = fuse(lambda x: _scaled_tanh(x, 2.0), random(3, 5))
        assert result.report.matches == {"my_scaled_tanh": 1}
        assert result.report.states["my_scaled_tanh"] == (True, "FUSION_PASSES_MY_SCALED_TANH=1")
        assert result.report.states["rms_norm"][0] is False
    with pytest.raises(settings.SettingsError, match="MY_SCALED_TANH"):
        settings.current()


def test_entry_points_register_fusions(monkeypatch):
    entry = importlib.metadata.EntryPoint(
        "mine", f"{__name__}:MINE", registered_fusions.ENTRY_POINT_GROUP
    )
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group: [entry] if group == registered_fusions.ENTRY_POINT_GROUP else [],
    )
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: MINE)
    monkeypatch.setattr(registered_fusions, "_loaded", None)
    assert registry()["my_scaled_tanh"] is MINE
    assert fuse(lambda x: _scaled_tanh(x, 2.0), random(3, 5), only=everything()).report.matches == {
        "my_scaled_tanh": 1
    }


@pytest.mark.parametrize("loaded", ["not a fusion", dataclasses.replace(MINE, name="rms_norm")])
def test_bad_entry_points_are_errors(monkeypatch, loaded):
    entry = importlib.metadata.EntryPoint(
        "mine", "nowhere:MINE", registered_fusions.ENTRY_POINT_GROUP
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", lambda self: loaded)
    monkeypatch.setattr(registered_fusions, "_loaded", None)
    with pytest.raises(
        (TypeError, ValueError),
        match=r"'mine' of fusion_passes\.fusions|two fusions are named 'rms_norm'",
    ):
        registry()


def test_names_are_taken_once():
    with pytest.raises(ValueError, match="'rms_norm' is already registered"):
        fusion_passes.register(dataclasses.replace(MINE, name="rms_norm"))
    with registered(MINE):
        fusion_passes.register(MINE)  # again: nothing changes
        with pytest.raises(ValueError, match="'my_scaled_tanh' is already registered"):
            fusion_passes.register(dataclasses.replace(MINE))


@pytest.mark.parametrize(
    "name", ["verify", "report", "strict", "default", "all", "none", "fusions"]
)
def test_a_fusion_cannot_have_the_name_of_a_setting(name):
    with registered(), pytest.raises(ValueError, match=f"cannot be named '{name}'"):
        fusion_passes.register(dataclasses.replace(MINE, name=name))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "My Fusion"}, "lower case"),
        ({"rewrite": None}, "patterns with a rewrite, or a transform"),
        ({"transform": lambda graph: []}, "patterns with a rewrite, or a transform"),
        ({"patterns": ()}, "patterns with a rewrite, or a transform"),
    ],
)
def test_a_fusion_says_all_that_it_must(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(MINE, **changes)


def test_constraints_see_captured_sizes_and_say_why():
    narrow = Constraint(
        lambda match: match.sizes["width"] <= 4,
        lambda match: f"{match.sizes['width']} columns are too many",
    )
    fusion = dataclasses.replace(MINE, constraints=(narrow,))
    assert fuse(lambda x: _scaled_tanh(x, 2.0), random(3, 4), only=[fusion]).report.matches == {
        "my_scaled_tanh": 1
    }
    report = fuse(lambda x: _scaled_tanh(x, 2.0), random(3, 5), only=[fusion]).report
    assert report.matches == {}
    assert [miss.reason for miss in report.near_misses] == ["5 columns are too many"]


def test_a_pattern_may_have_a_size_of_its_own():
    """``SizeOf`` stands for a number that the graph has in that place."""

    def spelling(x, group_size):
        return x.unflatten(-1, (-1, group_size)).float().amax(-1).to(FP8)

    def rewrite(m):
        view = m.view(
            m.tensor("x"),
            (*m.tensor("x").meta["val"].shape[:-1], m.size("groups"), m.size("group_size")),
        )
        amax = m.emit(torch.ops.aten.amax.default, m.cast(view, torch.float32), [-1])
        return (m.cast(amax, FP8),)

    pattern = Pattern(
        spelling,
        {"x": Tensor("num_tokens", "groups * group_size"), "group_size": SizeOf("group_size")},
    )
    fusion = Fusion("my_amax", "a third party's fusion", 3, patterns=(pattern,), rewrite=rewrite)
    result = fuse(lambda x: spelling(x, 32), random(3, 96), only=[fusion])
    assert_same(result)
    assert [site.sizes for site in result.report.sites] == [
        {"num_tokens": "3", "groups": "3", "group_size": "32"}
    ]
