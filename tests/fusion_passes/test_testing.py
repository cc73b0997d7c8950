"""What `fusion_passes.testing` says of a fusion that is wrong, and what it can capture."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fusion_passes import Pattern, Tensor, registry, verify
from fusion_passes.testing import assert_fusion_equivalent, fuse
from tests.fusion_passes.helpers import random

pytestmark = pytest.mark.usefixtures("references")
SIZES = {"num_tokens": 4, "hidden_size": 128}


def test_a_first_graph_with_a_decomposition_of_inductors_lowerings() -> None:
    """As in a process of its own, where nothing was compiled yet."""
    script = (
        "import torch, torch.nn.functional as F\n"
        "from fusion_passes.testing import fuse\n"
        "result = fuse(lambda x: F.silu(F.max_pool2d(x, 2)), torch.randn(1, 1, 4, 4))\n"
        "print(torch.equal(*result.actual, *result.expected))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert found.stdout.strip() == "True", found.stderr


def test_a_replacement_that_computes_something_else() -> None:
    fusion = registry()["silu_mul"]
    wrong = replace(
        fusion, rewrite=lambda m: (m.call("silu_mul", m.tensor("up"), m.tensor("gate")),)
    )
    with pytest.raises(AssertionError, match=r"silu_mul, output 0: .* of the values differ"):
        assert_fusion_equivalent(wrong, sizes=SIZES)
    assert_fusion_equivalent(fusion, sizes=SIZES)


def test_a_replacement_that_is_further_from_float64() -> None:
    """Each value within the steps that are accepted, and all of them on one side."""

    def shifted(m):
        exact = m.call("silu_mul", m.tensor("gate"), m.tensor("up"))
        return (m.emit(torch.ops.aten.mul.Tensor, exact, 1.0 + 2.0**-7),)

    wrong = replace(registry()["silu_mul"], rewrite=shifted)
    with pytest.raises(AssertionError, match=r"values differ|from float64"):
        assert_fusion_equivalent(wrong, sizes=SIZES)


def test_a_fusion_that_fires_elsewhere() -> None:
    with pytest.raises(AssertionError, match="silu_mul fired 0 times, expected 1"):
        assert_fusion_equivalent(registry()["silu_mul"], lambda x: F.gelu(x) * x, random(4, 128))


def test_a_replacement_that_copies() -> None:
    def copied(m):
        gate = m.emit(torch.ops.aten.clone.default, m.tensor("gate"))
        return (m.call("silu_mul", gate, m.tensor("up")),)

    wrong = replace(registry()["silu_mul"], rewrite=copied)
    with pytest.raises(AssertionError, match="silu_mul added 1 copies"):
        assert_fusion_equivalent(wrong, sizes=SIZES)


def test_a_transform_has_no_patterns_to_make_an_example_of() -> None:
    with pytest.raises(ValueError, match=r"shared_group_quant has no patterns .*: give fn"):
        assert_fusion_equivalent(registry()["shared_group_quant"])


def test_a_call_of_several_graphs() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    with pytest.raises(AssertionError, match="the call traces to 2 graphs"):
        fuse(broken, random(4))


@pytest.mark.parametrize("sizes", [None, {}, {"num_tokens": 4, "group_size": 128}])
def test_a_size_that_is_not_given_is_named(sizes: dict[str, int] | None) -> None:
    with pytest.raises(
        ValueError, match=r"sizes has no .*num_groups.* needs group_size, num_groups"
    ):
        assert_fusion_equivalent(registry()["group_quant"], sizes=sizes)


def test_inputs_of_a_pattern_may_have_any_name() -> None:
    """PyTorch's own matcher takes an argument called `out` for the operator's."""
    names = {
        "out": Tensor("num_tokens", "hidden_size"),
        "input": Tensor("num_tokens", "hidden_size"),
    }
    pattern = Pattern(lambda out, input: F.silu(out) * input, names, name="silu_mul")
    fusion = replace(
        registry()["silu_mul"],
        patterns=(pattern,),
        rewrite=lambda m: (m.call("silu_mul", m.tensor("out"), m.tensor("input")),),
    )
    assert_fusion_equivalent(fusion, sizes=SIZES)
    assert_fusion_equivalent(
        fusion, lambda out, input: F.silu(out) * input, random(4, 128), random(4, 128, seed=1)
    )


VALUES = torch.tensor([1.0, 2.0, -3.0, 0.0]).repeat(8)
DIFFERENT = {
    "another dtype": (VALUES.bfloat16(), "torch.bfloat16, expected"),
    "another shape": (VALUES[:16], r"\(16,\) .* expected \(32,\)"),
    "NaN": (torch.where(VALUES == 2, torch.nan, VALUES), "NaN in 8 places on one side only"),
    "an infinity": (
        torch.where(VALUES == 2, torch.inf, VALUES),
        "% of the values differ|infinities differ",
    ),
    "signs of infinities": (VALUES / 0.0 * -1, "infinities differ"),
    "more than a step": (VALUES * 1.1, "of the values differ"),
    "a step in too many places": (VALUES * (1 + 2.0**-8), "75.00% of the values differ, 0 by more"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_two_results_differ_in_is_said(kind: str) -> None:
    actual, words = DIFFERENT[kind]
    expected = VALUES / 0.0 if kind == "signs of infinities" else VALUES
    problem = verify.difference(expected, actual)
    assert problem is not None
    assert re.search(words, problem), problem
    assert verify.difference(actual, actual) is None
