"""The table of custom_ops.scales, row by row: one table for every scheme, dtype of codes and implementation."""

from __future__ import annotations

import math

import pytest
import torch

from custom_ops.scales import CODE_DTYPES, code_max
from tests.custom_ops.helpers import DEVICE, outputs
from tests.custom_ops.schemes import KERNELS, kernel

FP8 = torch.float8_e4m3fn
IMPLEMENTATIONS = ["reference", *KERNELS]


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("scheme", ["group_quant", "token_quant", "tensor_quant"])
@pytest.mark.parametrize("dtype", CODE_DTYPES, ids=lambda d: str(d).split(".")[1])
class TestEdges:
    """One group of 128, of a few values and zeros."""

    @staticmethod
    def quantize(which, scheme, dtype, values, **options):
        x = torch.zeros(1, 128, dtype=torch.bfloat16, device=DEVICE)
        x[0, : len(values)] = torch.tensor(values).to(torch.bfloat16)
        rest = (128,) if scheme == "group_quant" else ()
        q, scale = outputs(kernel(scheme, which)(x, *rest, dtype=dtype, **options))
        return q[0, : len(values)].float().tolist(), scale.item()

    def test_zero(self, which, scheme, dtype):
        expected = float(torch.tensor(1e-10) / code_max(dtype))
        assert self.quantize(which, scheme, dtype, [0.0, -0.0]) == ([0.0, 0.0], expected)

    def test_zero_without_a_lower_bound(self, which, scheme, dtype):
        codes, scale = self.quantize(which, scheme, dtype, [0.0], min_amax=0.0)
        assert scale == 0
        assert math.isnan(codes[0]) if dtype == FP8 else codes == [0.0]

    def test_zero_as_a_power_of_two(self, which, scheme, dtype):
        options = {"min_amax": 0.0, "scale_format": "ue8m0"}
        assert self.quantize(which, scheme, dtype, [0.0], **options) == ([0.0], 2.0**-127)

    def test_zero_counts_as_one(self, which, scheme, dtype):
        """And NaN does, in which the quotients of its neighbours are by 1 / MAX."""
        most = code_max(dtype)
        options = {"min_amax": 0.0, "scale_mode": "divide_or_one"}
        expected = float(torch.tensor(1.0) / most)
        assert self.quantize(which, scheme, dtype, [0.0], **options) == ([0.0], expected)
        codes, scale = self.quantize(which, scheme, dtype, [math.nan, 0.25, -3.0], **options)
        assert scale == expected
        assert math.isnan(codes[0]) if dtype == FP8 else codes[0] == 0
        assert codes[1:] == [112.0 if dtype == FP8 else 32.0, -most]

    def test_negative_zero(self, which, scheme, dtype):
        codes, _ = self.quantize(which, scheme, dtype, [-0.0, 0.0, 448.0])
        signs = [math.copysign(1, c) for c in codes[:2]]
        assert signs == ([-1, 1] if dtype == FP8 else [1, 1])

    def test_subnormal(self, which, scheme, dtype):
        tiny, most = 2.0**-130, code_max(dtype)
        codes, scale = self.quantize(which, scheme, dtype, [tiny, -tiny / 2], min_amax=0.0)
        assert scale == float(torch.tensor(tiny) / most)
        assert abs(codes[0] - most) <= most / 14
        assert abs(codes[1] + most / 2) <= most / 28

    def test_saturation(self, which, scheme, dtype):
        """Below a scale that is rounded down to 16 bits the quotient goes past the largest code."""
        most = code_max(dtype)
        for value in (1.01, 2.77, 1000.0):
            options = {"scale_mode": "divide_input", "min_amax": 0.0}
            codes, scale = self.quantize(which, scheme, dtype, [value, -value], **options)
            x = float(torch.tensor(value).to(torch.bfloat16))
            assert scale == float(torch.tensor(x / most).to(torch.bfloat16))
            assert codes == [most, -most]

    def test_infinity(self, which, scheme, dtype):
        codes, scale = self.quantize(which, scheme, dtype, [math.inf, 5.0, -math.inf, 0.0])
        assert scale == math.inf
        nan = dtype == FP8
        assert [math.isnan(c) for c in codes] == [nan, False, nan, False]
        assert codes[1] == codes[3] == 0

    def test_nan(self, which, scheme, dtype):
        codes, scale = self.quantize(which, scheme, dtype, [1.0, math.nan, math.inf, 0.0])
        assert math.isnan(scale)
        assert all(math.isnan(c) for c in codes) if dtype == FP8 else codes == [0.0] * 4

    @pytest.mark.parametrize("power", [-50, -1, 0, 7, 100])
    def test_exact_powers_of_two(self, which, scheme, dtype, power):
        most = code_max(dtype)
        values = [most * 2.0**power, 2.0**power, -(2.0 ** (power + 3))]
        for scale_format in ("float32", "ue8m0"):
            options = {"min_amax": 0.0, "scale_format": scale_format}
            result = self.quantize(which, scheme, dtype, values, **options)
            assert result == ([most, 1.0, -8.0], 2.0**power)

    @pytest.mark.parametrize("power", [-120, -1, 0, 100])
    def test_a_step_above_a_power_of_two(self, which, scheme, dtype, power):
        """amax is MAX * 2^power and a bfloat16 step: its power of two is the next one."""
        most = code_max(dtype)
        above = most * (1 + 2.0**-6) * 2.0**power
        options = {"min_amax": 0.0, "scale_format": "ue8m0"}
        _, scale = self.quantize(which, scheme, dtype, [above], **options)
        assert scale == 2.0 ** (power + 1)
        below = most * (1 - 2.0**-6) * 2.0**power
        _, scale = self.quantize(which, scheme, dtype, [below], **options)
        assert scale == 2.0**power

    def test_the_bounds(self, which, scheme, dtype):
        most = code_max(dtype)
        values = [2.0, -most]
        expected = ([1.0, float(round(-most / 2))], 2.0)  # to the even one of two integers
        assert self.quantize(which, scheme, dtype, values, min_amax=2 * most) == expected
        assert self.quantize(which, scheme, dtype, values, min_scale=2.0) == expected


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("scale", "codes"),
    [
        (2.0, [224.0, -0.5, math.inf]),
        (0.0, [448.0, -448.0, math.nan]),
        (math.inf, [0.0, 0.0, math.nan]),
        (math.nan, [math.nan] * 3),
        (1e-44, [448.0, -448.0, math.inf]),
        (-1.0, [-448.0, 1.0, -math.inf]),
    ],
)
def test_a_scale_that_is_given(which, scale, codes):
    """Whatever it is: a quotient that overflows saturates, and so does an infinite one."""
    last = 0.0 if scale == 0 else math.inf
    x = torch.tensor([[448.0, -1.0, last]], dtype=torch.bfloat16, device=DEVICE)
    given = torch.tensor([scale], device=DEVICE)
    for dtype in CODE_DTYPES:
        q = kernel("tensor_quant_static", which)(x, given, dtype=dtype)
        most = code_max(dtype)
        quotients = [c if math.isnan(c) else max(-most, min(most, c)) for c in codes]
        if dtype != FP8:  # halves go to the even integer
            quotients = [0.0 if math.isnan(c) else float(round(c)) for c in quotients]
        torch.testing.assert_close(q.float().cpu(), torch.tensor([quotients]), equal_nan=True)
