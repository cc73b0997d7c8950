"""silu_mul_group_quant_masked: each expert as silu_mul_group_quant, and nothing past its count."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import custom_ops
from fusion_passes.testing.strategies import activation_dtypes, activations, relayouts
from tests.custom_ops.helpers import DEVICE, assert_same_bits, bf16, implementation
from tests.custom_ops.schemes import KERNELS, kernel, schemes

NAME = "silu_mul_group_quant_masked"


@st.composite
def batches(draw):
    """gate_up with NaN past the counts, the counts, the group size and the keywords."""
    experts, tokens = draw(st.integers(1, 4)), draw(st.sampled_from((1, 3, 4, 7)))
    counts = draw(st.lists(st.integers(0, tokens), min_size=experts, max_size=experts))
    shape = (experts, tokens, 2 * draw(st.sampled_from((128, 256))))
    x = draw(activations(shape, draw(activation_dtypes()), device=DEVICE))
    for expert, count in enumerate(counts):
        x[expert, count:] = math.nan
    rest, options = draw(schemes("group_quant"))
    x = draw(relayouts(x))
    return x, torch.tensor(counts, dtype=torch.int32, device=DEVICE), *rest, options


def rows_of(tensors, expert, count):
    """The valid rows of an expert, without the strides, which depend on how many rows there are."""
    return [t[expert][:count].clone(memory_format=torch.contiguous_format) for t in tensors]


def poison(monkeypatch):
    """Fresh memory is full of 0x5a bytes."""
    real = torch.empty, torch.empty_strided
    for name, make in zip(("empty", "empty_strided"), real, strict=True):

        def fill(*args, _make=make, **kwargs):
            out = _make(*args, **kwargs)
            out.untyped_storage().fill_(0x5A)
            return out

        monkeypatch.setattr(torch, name, fill)


@pytest.mark.parametrize("which", ["reference", *KERNELS])
@given(batch=batches())
def test_each_expert_is_quantized_as_alone(which, batch):
    run = kernel(NAME, which)
    x, counts, group_size, options = batch
    result = run(x, counts, group_size, **options)
    alone = implementation("silu_mul_group_quant", which)
    for expert, count in enumerate(counts.tolist()):
        gate, up = x[expert].contiguous().chunk(2, -1)
        whole = alone(gate, up, group_size, **options)
        assert result[1][expert].stride() == whole[1].stride() or x.shape[1] == 1
        assert_same_bits(
            rows_of(result, expert, count), rows_of([t[None] for t in whole], 0, count)
        )


@pytest.mark.parametrize("which", ["reference", *KERNELS])
@pytest.mark.parametrize("scale_format", ["float32", "ue8m0_packed"])
def test_nothing_is_written_past_the_count(which, scale_format, monkeypatch):
    if which == "cuda":
        pytest.skip("needs memory that C++ allocates to be poisoned: ../cuda/test_gates.py")
    run = kernel(NAME, which)
    x, counts = bf16(3, 6, 2 * 256, device=DEVICE), torch.tensor([0, 2, 6], dtype=torch.int32)
    poison(monkeypatch)
    q, scale = run(
        x, counts.to(DEVICE), 64, scale_layout="column_major_tma", scale_format=scale_format
    )
    for expert, count in enumerate(counts.tolist()):
        for t in (q, scale):
            rest = t[expert, count:].clone(memory_format=torch.contiguous_format)
            assert (rest.view(torch.uint8) == 0x5A).all()


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """gate_up and the codes: the last valid row of the last expert, past the reach of 32-bit offsets in both."""
    run = kernel(NAME, "cuda")
    width, tokens = 8192, 2**31 // (2 * 8192) + 3
    x = torch.empty(2, tokens, 2 * width, device="cuda", dtype=torch.bfloat16)
    x.view(torch.int16).random_(0x3C00, 0x4100)
    counts = torch.tensor([5, tokens - 1], dtype=torch.int32, device="cuda")
    result = run(x, counts, 128)
    alone = implementation("silu_mul_group_quant", "cuda")
    gate, up = x[1, tokens - 4 : tokens - 1].chunk(2, -1)
    want = alone(gate.contiguous(), up.contiguous(), 128)
    assert result[0].numel() > 2**31
    assert_same_bits(
        [
            t[1, tokens - 4 : tokens - 1].clone(memory_format=torch.contiguous_format)
            for t in result
        ],
        [t.contiguous() for t in want],
    )


def test_strides_are_those_of_deep_gemm():
    """[experts, tokens, groups], each expert transposed, its pitch rounded up to 16 bytes."""
    x, counts = bf16(3, 6, 2 * 384, device=DEVICE), torch.full((3,), 6, dtype=torch.int32)
    _, scale = custom_ops.silu_mul_group_quant_masked(x, counts.to(DEVICE), 128)
    assert (scale.shape, scale.stride()) == ((3, 6, 3), (24, 1, 8))
    options = {"scale_format": "ue8m0_packed"}
    _, scale = custom_ops.silu_mul_group_quant_masked(x, counts.to(DEVICE), 64, **options)
    assert (scale.dtype, scale.shape, scale.stride()) == (torch.int32, (3, 6, 2), (16, 1, 8))


def test_a_count_that_is_too_large_is_all_rows():
    x = bf16(2, 5, 2 * 128, device=DEVICE)
    counts = torch.tensor([100, 5], dtype=torch.int32, device=DEVICE)
    for which in ("reference", "triton"):
        run = implementation(NAME, which)
        options = {"scale_layout": "row_major"}
        assert_same_bits(
            run(x, counts, 128, **options), run(x, counts.clamp(max=5), 128, **options)
        )


def test_no_tokens():
    counts = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    q, scale = custom_ops.silu_mul_group_quant_masked(bf16(2, 0, 256, device=DEVICE), counts, 128)
    assert (q.shape, scale.shape) == ((2, 0, 128), (2, 0, 1))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (bf16(4, 256), torch.zeros(4, dtype=torch.int32), 128),
            "gate_up has 2 dimensions; accepted: 3",
        ),
        (
            (bf16(1, 4, 384), torch.zeros(1, dtype=torch.int32), 128),
            r"the last dimension of gate_up is 384; accepted: a multiple of 2 \* group_size = 256",
        ),
        (
            (bf16(1, 4, 256), torch.zeros(1), 128),
            "counts.dtype is torch.float32; accepted: torch.int32",
        ),
        (
            (bf16(1, 4, 256), torch.zeros(2, dtype=torch.int32), 128),
            r"counts.shape is \(2,\); accepted: \(1,\)",
        ),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ValueError, match=f"{NAME}: {message}"):
        custom_ops.silu_mul_group_quant_masked(*args)
