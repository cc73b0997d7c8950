"""How many examples hypothesis draws for every pair of a fusion and a scheme: 25 in CI, 200 at night."""

from __future__ import annotations

import hypothesis
import pytest

from fusion_passes import registry
from tests.custom_ops import test_fused
from tests.custom_ops.quantization import test_schemes
from tests.custom_ops.schemes import ASYMMETRIC, PAIRS, SCHEMES
from tests.fusion_passes import test_fusions, test_int8_pairs, test_products

PROFILES = {"ci": 25, "nightly": 200}
QUANTIZING = (*SCHEMES, *ASYMMETRIC, *(f"{producer}_{scheme}" for producer, scheme in PAIRS))


def drawn(test) -> int:
    """What a test draws under the profile in force: of its own settings, or of the profile."""
    own = getattr(test, "_hypothesis_internal_use_settings", None)
    return (own or hypothesis.settings()).max_examples


def parameters(test, name: str) -> list[object]:
    """The values of one parametrization of a test."""
    for mark in test.pytestmark:
        if mark.name == "parametrize" and mark.args[0] in (name, (name,)):
            return list(mark.args[1])
        if mark.name == "parametrize" and name in mark.args[0]:
            return ["_".join(values) for values in mark.args[1]]
    raise AssertionError(f"{test.__name__} has no parameter {name}")


@pytest.mark.parametrize("profile", PROFILES)
def test_the_profiles(profile):
    assert hypothesis.settings.get_profile(profile).max_examples == PROFILES[profile]


def test_every_pair_of_a_fusion_and_a_scheme_draws_as_many_as_the_profile_says():
    test = test_fusions.test_each_pattern_is_equivalent
    assert set(QUANTIZING) <= {*registry()}
    assert set(QUANTIZING) <= {*parameters(test, "name")}
    assert drawn(test) == hypothesis.settings().max_examples


def test_every_pair_draws_as_many_in_int8():
    test = test_int8_pairs.test_each_pair_is_equivalent
    symmetric = {name for name in QUANTIZING if not name.endswith(ASYMMETRIC)}
    assert {*parameters(test, "name")} == symmetric
    assert drawn(test) == hypothesis.settings().max_examples


def test_every_scheme_of_a_product_draws_as_many():
    """The fusions that read quantized operands, by the dtype and the scopes of their scales."""
    test = test_products.test_each_scheme_of_a_product
    products = {
        name for name, fusion in registry().items() if fusion.stage == 2 and fusion.patterns
    }
    products.remove("router_logits")  # of operands that nobody has quantized
    assert {name for name, _ in test_products.SCHEMES} == products
    assert drawn(test) == hypothesis.settings().max_examples


@pytest.mark.parametrize(
    "test",
    [
        test_fused.test_the_reference_is_the_composition,
        test_fused.test_a_kernel_quantizes_its_own_values_bit_for_bit,
    ],
    ids=lambda test: test.__name__,
)
def test_every_op_of_a_pair_draws_as_many(test):
    pairs = {f"{producer}_{scheme}" for producer, scheme in PAIRS}
    assert {*parameters(test, "producer")} == pairs
    assert drawn(test) == hypothesis.settings().max_examples


def test_every_scheme_alone_draws_as_many():
    for test in (
        test_schemes.test_reference_is_exact,
        test_schemes.test_kernels_equal_the_reference_bit_for_bit,
    ):
        assert {*parameters(test, "scheme")} == {*SCHEMES}
        assert drawn(test) == hypothesis.settings().max_examples
