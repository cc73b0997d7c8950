"""group_quant: every value of a dtype, and sizes past what 32 bits reach. The rest is in test_schemes.py."""

from __future__ import annotations

import pytest
import torch

from custom_ops.scales import SCALE_LAYOUTS
from tests.custom_ops.helpers import DEVICE, assert_same_bits, bf16, implementation

reference = implementation("group_quant", "reference")
triton = implementation("group_quant", "triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_encodes_every_value_of_a_dtype(dtype):
    """All 65536 bit patterns, in groups whose scale is exactly 1: every tie and every boundary of e4m3."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    largest = torch.tensor(448.0, dtype=dtype)
    values = torch.where(values.abs() <= 448, values, largest)
    # 63 of them to a group of 64 that begins with the largest code.
    x = torch.nn.functional.pad(values, (0, -len(values) % 63), value=448.0).view(-1, 63)
    x = torch.cat([largest.expand(len(x), 1), x], dim=1).to(DEVICE)
    assert torch.equal(reference(x, 64)[1], torch.ones(x.shape[0], 1, device=DEVICE))
    assert_same_bits(triton(x, 64), reference(x, 64))
    for mode in ("divide", "reciprocal_input"):
        options = {"dtype": torch.int8, "min_scale": 3.0, "code_mode": mode}
        assert_same_bits(triton(x, 64, **options), reference(x, 64, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [64, 128])
def test_a_large_batch_of_all_magnitudes_is_bit_for_bit(dtype, group_size):
    """4 million quotients by the corrected reciprocal, and tiny groups by true division."""
    x = torch.randn(4096, 1024, device="cuda")
    x = (x * torch.logspace(-42, 5, 4096, device="cuda").unsqueeze(1)).to(dtype)
    for min_amax in (1e-10, 0.0):
        options = {"min_amax": min_amax}
        assert_same_bits(triton(x, group_size, **options), reference(x, group_size, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_more_than_2_31_elements(layout):
    """The last row lies past the reach of 32-bit offsets."""
    x = torch.zeros(2**18 + 1, 8192, dtype=torch.bfloat16, device="cuda")
    x[-1] = bf16(8192, device="cuda")
    q, scale = triton(x, 128, scale_layout=layout)
    last = reference(x[-1:], 128)
    assert_same_bits((q[-1].contiguous(), scale[-1].contiguous()), (last[0][0], last[1][0]))
    assert not q[:-1].view(torch.int64).any()
