"""The RMSNorms: against float64, the models' own spellings, and Triton. What quantizes them: test_fused.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusion_passes.testing.strategies import (
    activation_dtypes,
    activation_shapes,
    activations,
    relayouts,
    seeded_normal,
)
from tests.custom_ops.helpers import (
    DEVICE,
    assert_few_flips,
    assert_same_bits,
    bf16,
    implementation,
)

MODES = ("rounded", "float32", "float32_plus_one")
epsilons = st.sampled_from((1e-6, 1e-5, 0.0, 1e-12, 0.1))


def most_steps(mode: str) -> int:
    """In "rounded" a step of the rounded norm is multiplied and rounded again: that can make two."""
    return 2 if mode == "rounded" else 1


@st.composite
def norms(draw, multiple_of=1, specials=True, **options):
    """x, residual, weight, eps and the mode: every mode, with each weight dtype that it accepts."""
    shape = draw(activation_shapes(multiple_of=multiple_of, min_tokens=1, **options))
    dtype = draw(activation_dtypes())
    x, residual = (draw(activations(shape, dtype, specials, DEVICE)) for _ in range(2))
    mode = draw(st.sampled_from(MODES))
    weight_dtype = dtype if mode == "rounded" else draw(st.sampled_from((dtype, torch.float32)))
    weight = seeded_normal(draw, shape[-1:]).to(DEVICE, weight_dtype)
    moved = tuple(draw(relayouts(t)) for t in (x, residual))
    return (*moved, weight, draw(epsilons), {"weight_mode": mode})


@given(norms(specials=False))
def test_reference_against_float64(norm):
    x, _, weight, eps, mode = norm
    wide = x.double()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    factor = weight.double() + (mode["weight_mode"] == "float32_plus_one")
    exact = y * factor
    info = torch.finfo(x.dtype)
    out = implementation("rms_norm", "reference")(x, weight, eps, **mode).double()
    # One rounding to the dtype, in "rounded" two, and what float32 adds.
    roundings = 2 if mode["weight_mode"] == "rounded" else 1
    bound = exact.abs() * (roundings * info.eps / 2 * 1.01) + y.abs() * 1e-6 + info.smallest_normal
    assert ((out - exact).abs() <= bound).all()


@given(norms())
def test_reference_is_what_the_models_spell(norm):
    """Llama, torch.nn.RMSNorm's formula and Gemma, written as their modules do."""
    x, _, weight, eps, mode = norm
    hidden = x.to(torch.float32)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    if mode["weight_mode"] == "rounded":
        eager = weight * hidden.to(x.dtype)
    elif mode["weight_mode"] == "float32":
        eager = (hidden * weight.float()).to(x.dtype)
    else:
        eager = (hidden * (1.0 + weight.float())).type_as(x)
    assert_same_bits(
        implementation("rms_norm", "reference")(x, weight, eps, **mode),
        eager.clone(memory_format=torch.contiguous_format),
    )


@given(norms())
def test_triton_norms_against_the_reference(norm):
    x, residual, weight, eps, mode = norm
    for name, args in (("rms_norm", (x,)), ("add_rms_norm", (x, residual))):
        expected = implementation(name, "reference")(*args, weight, eps, **mode)
        actual = implementation(name, "triton")(*args, weight, eps, **mode)
        assert_few_flips(actual, expected, most_steps(mode["weight_mode"]))
        if name == "add_rms_norm":
            assert_same_bits(actual[1], expected[1])


def test_the_norm_reads_the_rounded_sum():
    x = torch.tensor([[256.0, 0.0]], dtype=torch.bfloat16, device=DEVICE)
    residual = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16, device=DEVICE)  # 257 rounds to 256
    weight = torch.ones(2, dtype=torch.bfloat16, device=DEVICE)
    for which in ("reference", "triton"):
        out, total = implementation("add_rms_norm", which)(x, residual, weight, 0.0)
        assert total.tolist() == [[256.0, 1.0]]
        alone = implementation("rms_norm", which)(total, weight, 0.0)
        assert_same_bits(out, alone)


def test_modes_differ():
    """One is never a stand-in for another: on ordinary data their bits differ."""
    x, weight = bf16(8, 512), bf16(512)
    results = [
        implementation("rms_norm", "reference")(x, weight, 1e-6, weight_mode=mode) for mode in MODES
    ]
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


@pytest.mark.parametrize("hidden", [16384, 16385, 16384 + 128])
def test_rows_longer_than_a_tile(hidden):
    x, residual = bf16(2, hidden, device=DEVICE), bf16(2, hidden, device=DEVICE)
    weight = bf16(hidden, device=DEVICE)
    args = (x, residual, weight, 1e-6)
    assert_few_flips(
        implementation("add_rms_norm", "triton")(*args),
        implementation("add_rms_norm", "reference")(*args),
        most_steps("rounded"),
    )
    if hidden % 128 == 0:
        fused = implementation("add_rms_norm_group_quant", "triton")(*args, 128)
        normed, _ = implementation("add_rms_norm", "triton")(*args)
        assert_same_bits(fused[:2], implementation("group_quant", "reference")(normed, 128))


@pytest.mark.parametrize("name", ["rms_norm_group_quant", "add_rms_norm_group_quant"])
def test_a_row_gives_the_same_bits_in_any_batch(name):
    x, residual, weight = (
        bf16(9, 384, device=DEVICE),
        bf16(9, 384, device=DEVICE),
        bf16(384, device=DEVICE),
    )
    args = (x, residual) if name.startswith("add") else (x,)
    whole = implementation(name, "triton")(*args, weight, 1e-6, 128)
    for i in range(9):
        alone = implementation(name, "triton")(*(t[i] for t in args), weight, 1e-6, 128)
        assert_same_bits(alone, [t[i] for t in whole])


def test_a_strided_weight():
    weight = torch.randn(2 * 256).to(torch.bfloat16).to(DEVICE)[::2]
    x = bf16(3, 256, device=DEVICE)
    for which in ("reference", "triton"):
        norm = implementation("rms_norm", which)
        assert_same_bits(norm(x, weight, 1e-6), norm(x, weight.contiguous(), 1e-6))


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [1000, 4096, 7168, 8192, 20480])
@pytest.mark.parametrize("mode", MODES)
def test_large_batch_flips_at_most_one_in_ten_thousand(hidden, mode):
    x, residual = bf16(1024, hidden, device="cuda"), bf16(1024, hidden, device="cuda")
    weight = bf16(hidden, device="cuda")
    args = (x, residual, weight, 1e-6)
    actual = implementation("add_rms_norm", "triton")(*args, weight_mode=mode)
    expected = implementation("add_rms_norm", "reference")(*args, weight_mode=mode)
    assert_few_flips(actual, expected, most_steps(mode))
    assert_same_bits(actual[1], expected[1])


@pytest.mark.gpu
def test_more_than_2_31_elements():
    x = torch.zeros(2**18 + 1, 8192, dtype=torch.bfloat16, device="cuda")
    x[-1] = bf16(8192, device="cuda")
    weight = bf16(8192, device="cuda")
    name = "add_rms_norm_group_quant"
    last = implementation(name, "triton")(x[-1:].clone(), x[-1:].clone(), weight, 1e-6, 128)
    whole = implementation(name, "triton")(x, x, weight, 1e-6, 128)
    assert_same_bits([t[-1:].contiguous() for t in whole], last)
