"""silu_mul: against float64, eager, and Triton. What quantizes it is in test_fused.py."""

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
)
from tests.custom_ops.helpers import (
    DEVICE,
    assert_few_flips,
    assert_same_bits,
    bf16,
    implementation,
)

reference = implementation("silu_mul", "reference")
triton = implementation("silu_mul", "triton")
triton_quant = implementation("silu_mul_group_quant", "triton")


@st.composite
def pairs(draw, multiple_of=1, **options):
    """gate and up of one shape and dtype, each somewhere else in memory."""
    shape = draw(activation_shapes(multiple_of=multiple_of, min_tokens=1))
    dtype = draw(activation_dtypes())
    pair = [draw(activations(shape, dtype, device=DEVICE, **options)) for _ in range(2)]
    return tuple(draw(relayouts(x)) for x in pair)


@given(pairs(specials=False))
def test_reference_against_float64(pair):
    gate, up = pair
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    info = torch.finfo(gate.dtype)
    # Two roundings to the dtype, half a step each, and what float32 adds.
    bound = exact.abs() * (info.eps * 1.01) + info.smallest_normal
    assert ((reference(gate, up).double() - exact).abs() <= bound).all()


@given(pairs())
def test_reference_is_eager(pair):
    gate, up = pair
    assert_same_bits(
        reference(gate, up),
        (torch.nn.functional.silu(gate) * up).clone(memory_format=torch.contiguous_format),
    )


@given(pairs())
def test_triton_against_the_reference(pair):
    assert_few_flips(triton(*pair), reference(*pair), most=2)


def test_halves_of_a_packed_tensor():
    packed = bf16(7, 2 * 256, device=DEVICE)
    gate, up = packed.chunk(2, -1)
    assert_same_bits(triton(gate, up), triton(gate.contiguous(), up.contiguous()))


def test_a_row_gives_the_same_bits_in_any_batch():
    gate, up = bf16(9, 384, device=DEVICE), bf16(9, 384, device=DEVICE)
    whole = triton(gate, up)
    for i in range(9):
        assert_same_bits(triton(gate[i], up[i]), whole[i])


@pytest.mark.gpu
def test_large_batch_flips_at_most_one_in_ten_thousand():
    gate, up = bf16(4096, 2048, device="cuda") * 3, bf16(4096, 2048, device="cuda")
    assert_few_flips(triton(gate, up), reference(gate, up), most=2)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    packed = torch.zeros(2**18 + 1, 2 * 8192, dtype=torch.bfloat16, device="cuda")
    packed[-1] = bf16(2 * 8192, device="cuda")
    gate, up = packed.chunk(2, -1)
    last = triton(gate[-1:].contiguous(), up[-1:].contiguous())
    assert_same_bits(triton(gate, up)[-1:].clone(), last)
    q, scale = triton_quant(gate, up, 128)
    assert_same_bits(
        (q[-1:].contiguous(), scale[-1:].contiguous()),
        implementation("group_quant", "reference")(last, 128),
    )
