"""Norms, alone and quantized.

What holds a sum may differ from eager by what a float32 rounding does: the flipped codes are counted, and each is one
step away.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from custom_ops.normalization import reference as normalization
from custom_ops.scales import GROUP_SIZES, SCALE_LAYOUTS
from tests.custom_ops.cuda.inputs import (
    DTYPES,
    EPS,
    assert_few_flips,
    assert_same_quantized,
    errors,
    norm_weight,
    randn,
    reference,
)

pytestmark = pytest.mark.gpu
WEIGHT_MODES = ("rounded", "float32", "float32_plus_one")
# A row in a part of a warp, in a warp, in a block; odd; past what registers hold.
NORM_COLS = [1, 8, 63, 64, 120, 128, 192, 256, 264, 512, 1000, 1024, 1032]
NORM_COLS += [4096, 7168, 8200, 16384, 20000, 40001]
WEIGHTS = [("rounded", False), *itertools.product(WEIGHT_MODES[1:], (False, True))]


@pytest.mark.parametrize(("mode", "float32"), WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(ops, dtype: torch.dtype, mode: str, float32: bool) -> None:
    flipped = total = 0
    for cols in NORM_COLS:
        weight = norm_weight(cols, dtype, mode, float32)
        for rows in (1, 5, 700):
            x = randn(rows, cols, dtype=dtype, spread=3)
            residual = randn(rows, cols, dtype=dtype, spread=3)
            got = ops.rms_norm(x, weight, EPS, weight_mode=mode)
            want = normalization.rms_norm(x, weight, EPS, weight_mode=mode)
            got_sum = ops.add_rms_norm(x, residual, weight, EPS, weight_mode=mode)
            want_sum = normalization.add_rms_norm(x, residual, weight, EPS, weight_mode=mode)
            assert torch.equal(got_sum[1], want_sum[1])
            for a, b in ((got, want), (got_sum[0], want_sum[0])):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
                apart = (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()
                assert apart.max() <= 2  # an ulp before the weight is at most two after it
                flipped += int((apart > 0).sum())
                total += apart.numel()
    assert flipped <= (1e-3 if dtype == torch.float16 else 2e-4) * total


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_no_further_from_float64_than_eager(ops, dtype: torch.dtype) -> None:
    weight = torch.ones(7168, device="cuda", dtype=dtype)
    x = randn(3000, 7168, dtype=dtype)
    wide = x.double()
    exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    mean, largest = errors(ops.rms_norm(x, weight, EPS), exact)
    eager_mean, eager_largest = errors(
        normalization.rms_norm(x, weight, EPS, weight_mode="rounded"), exact
    )
    assert mean <= eager_mean * 1.00001
    assert largest <= eager_largest * 1.0001


@pytest.mark.parametrize(("mode", "float32"), WEIGHTS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_group_quant(
    ops, dtype: torch.dtype, group_size: int, mode: str, float32: bool
) -> None:
    for (rows, cols), layout in itertools.product(
        ((1, 128), (3, 384), (700, 256), (129, 4096), (1031, 7168), (9, 16384), (5, 20480)),
        SCALE_LAYOUTS,
    ):
        x = randn(rows, cols, dtype=dtype, spread=2)
        residual = randn(rows, cols, dtype=dtype, spread=2)
        weight = norm_weight(cols, dtype, mode, float32)
        quant = {"scale_layout": layout, "min_amax": 1e-10}
        options = {"weight_mode": mode, **quant}
        got = ops.rms_norm_group_quant(x, weight, EPS, group_size, **options)
        want = reference("rms_norm_group_quant", x, weight, EPS, group_size, **options)
        assert_few_flips(got, want, group_size)
        normed = ops.rms_norm(x, weight, EPS, weight_mode=mode)
        assert_same_quantized(got, ops.group_quant(normed, group_size, **quant))

        got = ops.add_rms_norm_group_quant(x, residual, weight, EPS, group_size, **options)
        want = reference(
            "add_rms_norm_group_quant", x, residual, weight, EPS, group_size, **options
        )
        assert_few_flips(got, want, group_size)
        assert torch.equal(got[2], want[2])
        normed, _ = ops.add_rms_norm(x, residual, weight, EPS, weight_mode=mode)
        assert_same_quantized(got, ops.group_quant(normed, group_size, **quant))


def test_nan_and_inf_stay_in_their_row(ops) -> None:
    x = randn(8, 512, dtype=torch.bfloat16)
    x[1, 7], x[2, 300], x[3] = float("nan"), float("inf"), 0.0
    weight = torch.ones(512, device="cuda", dtype=torch.bfloat16)
    options = {"scale_layout": "row_major", "min_amax": 1e-10}
    got = ops.rms_norm_group_quant(x, weight, EPS, 128)
    want = reference("rms_norm_group_quant", x, weight, EPS, 128, weight_mode="rounded", **options)
    assert torch.equal(got[1].isnan(), want[1].isnan())
    assert_few_flips(got, want, 128)


@pytest.mark.parametrize("cols", [64, 192, 1024, 4096, 7168, 9216])
def test_a_row_has_the_same_bits_in_any_batch(ops, cols: int) -> None:
    x, residual = (randn(1500, cols, dtype=torch.bfloat16) for _ in range(2))
    weight = norm_weight(cols, torch.bfloat16, "rounded", False)
    for run, given in (
        (ops.rms_norm_group_quant, (x,)),
        (ops.add_rms_norm_group_quant, (x, residual)),
    ):
        whole = run(*given, weight, EPS, 64)
        for rows in (1, 2, 100, 511, 513):
            part = run(*(t[:rows] for t in given), weight, EPS, 64)
            for a, b in zip(whole, part, strict=True):
                assert torch.equal(
                    a[:rows].contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
                )
