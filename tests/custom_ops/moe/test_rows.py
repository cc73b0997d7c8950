"""activate_rows: the bits of the ops that it stands for in rows that are somebody's, nothing in the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_ops.moe.activation import NAMES, Activation
from custom_ops.quantization.reference import group_quant
from tests.custom_ops.helpers import DEVICE, assert_few_flips, assert_same_bits


@settings(max_examples=20)
@given(
    st.sampled_from(NAMES),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 5, 33]),
    st.sampled_from([8, 128, 200, 384, 1024]),
    st.sampled_from([torch.bfloat16, torch.float16]),
    st.integers(0, 2**20),
)
def test_rows_equal_the_reference(name, interleaved, biased, quantize, rows, width, dtype, seed):
    from custom_ops.moe.triton_rows import activate_rows

    generator = torch.Generator().manual_seed(seed)
    activation = Activation(name, interleaved and name != "relu2", limit=0.8)
    quantize = quantize and width % 128 == 0
    full = width * (2 if activation.gated else 1)
    x = torch.randn(rows, full, generator=generator).to(DEVICE, dtype)
    experts = torch.randint(-1, 3, (rows,), generator=generator, dtype=torch.int32).to(DEVICE)
    bias = torch.randn(3, full, generator=generator).to(DEVICE, dtype) if biased else None
    out, scale = activate_rows(x, experts, activation, bias=bias, quantize=quantize)
    used = experts >= 0
    if not used.any():
        return
    y = x if bias is None else x + bias[experts.long()]
    expected = activation.reference(y[used])
    if not quantize:
        assert out.shape == (rows, width)
        assert_few_flips(out[used], expected, most=3, fraction=2e-3)
        return
    assert scale is not None
    codes, scales = group_quant(expected, 128)
    assert scale.stride() == (1, -(-rows // 4) * 4)
    # one step of the activation moves codes and the scale of its group
    ours = (out[used].float().unflatten(1, (-1, 128)) * scale[used].unsqueeze(-1)).flatten(1)
    theirs = (codes.float().unflatten(1, (-1, 128)) * scales.unsqueeze(-1)).flatten(1)
    assert float((out[used].view(torch.uint8) != codes.view(torch.uint8)).float().mean()) <= 2e-2
    assert torch.allclose(ours, theirs, rtol=0.13, atol=1e-3)


def test_codes_are_those_of_group_quant_where_the_activation_is_exact():
    from custom_ops.moe.triton_rows import activate_rows

    x = torch.randn(7, 256).to(DEVICE, torch.bfloat16)
    experts = torch.tensor([0, -1, 2, 1, 0, -1, 0], dtype=torch.int32, device=DEVICE)
    for modes in ({}, {"scale_mode": "reciprocal", "code_mode": "reciprocal", "min_amax": 0.5}):
        out, scale = activate_rows(x, experts, Activation("relu2"), quantize=True, **modes)
        assert scale is not None
        codes, scales = group_quant(torch.relu(x).square(), 128, **modes)
        used = experts >= 0
        raw = out.view(torch.uint8)[used].view(torch.float8_e4m3fn)
        assert_same_bits(raw, codes.view(torch.uint8)[used].view(torch.float8_e4m3fn))
        assert_same_bits(scale[used].contiguous(), scales[used].contiguous())


def test_rows_that_are_nobodys_are_not_touched():
    from custom_ops.moe import triton_rows

    x = torch.randn(4, 256).to(DEVICE, torch.bfloat16)
    experts = torch.full((4,), -1, dtype=torch.int32, device=DEVICE)
    before = torch.Tensor.new_empty

    def filled(self, *shape, **kwargs):
        return before(self, *shape, **kwargs).fill_(5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", filled)
        out, _ = triton_rows.activate_rows(x, experts, Activation())
    assert bool((out == 5).all())


def test_a_cut_group_is_refused():
    from custom_ops.moe.triton_rows import activate_rows

    x = torch.randn(2, 200).to(DEVICE, torch.bfloat16)
    experts = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="I is 100; accepted with quantize: multiples of 128"):
        activate_rows(x, experts, Activation(), quantize=True)
