"""block_quant: group_quant of the flattened blocks, whatever the keywords, and what block_scaled_mm takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import custom_ops
from custom_ops.scales import SCALE_FORMATS
from fusion_passes.testing.strategies import activations, relayouts
from tests.custom_ops.helpers import DEVICE, assert_same_bits, bf16, implementation
from tests.custom_ops.schemes import KERNELS, kernel, schemes

shapes = st.tuples(st.sampled_from((1, 3, 127, 128, 130)), st.sampled_from((1, 33, 128, 300)))


@st.composite
def weights(draw):
    x = draw(relayouts(draw(activations(shapes, device=DEVICE))))
    _, options = draw(schemes("token_quant"))
    return x, options


@given(weights())
def test_a_block_is_one_token_of_token_quant(weight):
    x, options = weight
    q, scale = implementation("block_quant", "reference")(x, **options)
    rows, columns = x.shape
    assert scale.shape == (-(-rows // 128), -(-columns // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            block, codes = x[at], q[at].contiguous()
            flat = implementation("token_quant", "reference")(block.reshape(1, -1), **options)
            assert_same_bits((codes.view(1, -1), scale[i, j].view(1, 1)), flat)


@pytest.mark.parametrize("which", KERNELS)
@given(weight=weights())
def test_kernels_equal_the_reference_bit_for_bit(which, weight):
    run = kernel("block_quant", which)
    x, options = weight
    assert_same_bits(run(x, **options), implementation("block_quant", "reference")(x, **options))


def test_what_it_gives_is_what_block_scaled_mm_takes():
    a, b = bf16(5, 384), bf16(260, 384)
    out = custom_ops.block_scaled_mm(*custom_ops.group_quant(a, 128), *custom_ops.block_quant(b))
    exact = a.double() @ b.double().T
    assert (out.double() - exact).norm() <= 0.06 * exact.norm()


def test_no_rows():
    q, scale = custom_ops.block_quant(bf16(0, 256, device=DEVICE))
    assert (q.shape, scale.shape) == ((0, 256), (0, 2))


@pytest.mark.parametrize("shape", [(256,), (2, 128, 128)])
def test_another_number_of_dimensions(shape):
    with pytest.raises(ValueError, match=f"x has {len(shape)} dimensions; accepted: 2"):
        custom_ops.block_quant(torch.zeros(shape, dtype=torch.bfloat16))


def test_packed_scales_are_for_groups():
    with pytest.raises(
        ValueError, match="scale_format is 'ue8m0_packed'; accepted: float32, ue8m0"
    ):
        custom_ops.block_quant(bf16(2, 2), scale_format=SCALE_FORMATS[2])
