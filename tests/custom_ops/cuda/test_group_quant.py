"""Quantization by groups equals its reference bit for bit: every pair of values, shapes, powers of two."""

from __future__ import annotations

import itertools

import pytest
import torch

from custom_ops.quantization import reference as quantization
from custom_ops.scales import CODE_DTYPES, GROUP_SIZES, SCALE_LAYOUTS
from tests.custom_ops.cuda.inputs import (
    DTYPES,
    assert_same_quantized,
    randn,
    reference,
    with_special,
)
from tests.custom_ops.helpers import assert_same_bits
from tests.custom_ops.schemes import kernel

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_quant_is_bitwise(ops, dtype: torch.dtype, group_size: int, layout: str) -> None:
    for rows, groups in itertools.product((1, 2, 3, 5, 129, 1031), (1, 3, 8, 56)):
        x = with_special(randn(rows, groups * group_size, dtype=dtype, spread=8))
        for min_amax in (1e-10, 0.0, 1e-42, 1e-30, 3.7, 1e30):
            options = {"scale_layout": layout, "min_amax": min_amax}
            want = quantization.group_quant(x, group_size, **options)
            assert_same_quantized(ops.group_quant(x, group_size, **options), want)


def test_group_quant_of_many_elements_is_bitwise(ops) -> None:
    """From 2^22 elements on, a thread works on four rows."""
    for rows, layout in itertools.product((4096, 4097, 4099), SCALE_LAYOUTS):
        x = with_special(randn(rows, 1088, dtype=torch.bfloat16, spread=8))
        options = {"scale_layout": layout, "min_amax": 1e-10}
        want = quantization.group_quant(x, 64, **options)
        assert_same_quantized(ops.group_quant(x, 64, **options), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_group_quant_of_every_pair(ops, dtype: torch.dtype) -> None:
    """Every finite amax with every value that its group can hold: 10^9 divisions."""
    bits = torch.arange(1, 2**15, device="cuda", dtype=torch.int32).to(torch.int16).view(dtype)
    values = bits[bits.isfinite()].sort().values
    groups = -(-values.numel() // 127)
    padded = torch.cat([values, values.new_zeros(groups * 127 - values.numel())]).view(groups, 127)
    sign = torch.where(torch.rand(padded.shape, device="cuda") < 0.5, -1.0, 1.0).to(dtype)
    for part in values.split(1024):
        amax = part.view(-1, 1, 1)
        x = torch.where(padded <= amax, padded, 0) * sign  # zeros of both signs
        x = torch.cat([amax.expand(-1, groups, 1), x], -1).flatten(1)
        options = {"scale_layout": "row_major", "min_amax": 0.0}
        want = quantization.group_quant(x, 128, **options)
        assert_same_quantized(ops.group_quant(x, 128, **options), want)


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_group_quant_of_other_shapes(ops, layout: str) -> None:
    options = {"scale_layout": layout, "min_amax": 1e-10}
    base = randn(6, 5, 4, 256, dtype=torch.bfloat16, spread=4)
    shapes = [base, base.transpose(0, 2), base[:, ::2], base[::2, :, 1], base[0, 0, 0]]
    shapes += [base[:1, :1], base[0, 0, :1].expand(7, 256), base[:0], base.flatten(0, 2)]
    shapes += [base.transpose(-1, -2)[..., :1].expand(6, 5, 256, 128)]
    for x in shapes:
        want = quantization.group_quant(x, 128, **options)
        assert_same_quantized(ops.group_quant(x, 128, **options), want)


@pytest.mark.parametrize("scale_format", ["ue8m0", "ue8m0_packed"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_powers_of_two_are_bitwise(ops, group_size: int, scale_format: str) -> None:
    """Every magnitude a bfloat16 has, as the amax of a group; a number of groups that four does not divide."""
    run = kernel("group_quant", "cuda")
    values = torch.arange(2**15, device="cuda", dtype=torch.int32).to(torch.int16)
    x = torch.zeros(2**15 // 8 + 3, 9, group_size, device="cuda", dtype=torch.bfloat16)
    x.view(-1, group_size)[: 2**15, 5] = values.view(torch.bfloat16)
    layouts = SCALE_LAYOUTS if scale_format == "ue8m0" else ("column_major_tma",)
    for layout, codes, min_amax in itertools.product(layouts, CODE_DTYPES, (0.0, 1e-10)):
        options = {"scale_layout": layout, "scale_format": scale_format}
        options |= {"dtype": codes, "min_amax": min_amax}
        args = (x.flatten(1), group_size)
        assert_same_bits(run(*args, **options), reference("group_quant", *args, **options))
