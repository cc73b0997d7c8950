"""token_quant_asymmetric: against exact arithmetic, its edges, and Triton against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from custom_ops.scales import CODE_MODES, SCALE_MODES
from tests.custom_ops.helpers import DEVICE, assert_same_bits, bf16, implementation
from tests.custom_ops.quantization import oracle
from tests.custom_ops.schemes import KERNELS, kernel, producers

reference = implementation("token_quant_asymmetric", "reference")
options = st.fixed_dictionaries(
    {
        "min_scale": st.sampled_from((0.0, 1e-5)),
        "scale_mode": st.sampled_from(SCALE_MODES),
        "code_mode": st.sampled_from(CODE_MODES),
    }
)


def integers(v):
    return np.nan_to_num(np.rint(v), nan=0.0)


@given(producers(""), options)
def test_reference_is_exact(call, modes):
    (x,), _ = call
    q, scale, zero_point = reference(x, **modes)
    rows = x.double().cpu().reshape(-1, x.shape[-1]).numpy()
    in_input = modes["scale_mode"].endswith("_input")
    with np.errstate(all="ignore"):
        low = np.minimum(rows.min(-1, keepdims=True), 0.0)
        extent = oracle.to_float32(np.maximum(rows.max(-1, keepdims=True), 0.0) - low)
        extent = oracle.to_dtype(extent, x.dtype) if in_input else extent
        if modes["scale_mode"].endswith("_or_one"):
            extent = np.where(extent > 0, extent, 1.0)
        factor = oracle.to_float32(np.float64(1 / 255))
        divides = modes["scale_mode"].startswith("divide")
        expected = oracle.to_float32(extent / 255 if divides else extent * factor)
        expected = oracle.to_dtype(expected, x.dtype) if in_input else expected
        expected = np.maximum(expected, np.float64(np.float32(modes["min_scale"])))
        expected = oracle.to_dtype(expected, x.dtype) if in_input else expected
        below = oracle.to_float32(low / expected)
        below = oracle.to_dtype(below, x.dtype) if in_input else below
        zero = np.clip(-128 - integers(below), -128, 127)
        v = oracle.quotients(rows, expected, x.dtype, modes["code_mode"])
        codes = np.clip(integers(v) + zero, -128, 127)
    np.testing.assert_array_equal(scale.cpu().double().reshape(-1, 1).numpy(), expected)
    np.testing.assert_array_equal(zero_point.cpu().double().reshape(-1, 1).numpy(), zero)
    np.testing.assert_array_equal(q.cpu().double().reshape(rows.shape).numpy(), codes)


@pytest.mark.parametrize("which", KERNELS)
@given(call=producers(""), modes=options)
def test_kernels_equal_the_reference_bit_for_bit(which, call, modes):
    run = kernel("token_quant_asymmetric", which)
    assert_same_bits(run(*call[0], **modes), reference(*call[0], **modes))


@pytest.mark.parametrize("which", KERNELS)
def test_tokens_longer_than_a_tile(which):
    x = bf16(2, 2 * 16384 + 100, device=DEVICE) - 3
    assert_same_bits(kernel("token_quant_asymmetric", which)(x), reference(x))


@pytest.mark.parametrize("which", ["reference", *KERNELS])
@pytest.mark.parametrize(
    ("values", "codes", "scale", "zero_point"),
    [
        ([0.0, 0.0], [-128, -128], 0.0, -128),
        ([255.0, 0.0], [127, -128], 1.0, -128),
        ([-255.0, 0.0], [-128, 127], 1.0, 127),
        ([-128.0, 127.0], [-128, 127], 1.0, 0),
        ([510.0, 255.0], [127, 0], 2.0, -128),  # 127.5 goes to the even 128
        ([math.nan, 1.0], [-128, -128], math.nan, -128),
        ([math.inf, 1.0], [-128, -128], math.inf, -128),
    ],
)
def test_edges(which, values, codes, scale, zero_point):
    x = torch.tensor([values], dtype=torch.float16, device=DEVICE)
    q, s, z = kernel("token_quant_asymmetric", which)(x)
    assert q.tolist() == [codes]
    assert s.item() == scale or (math.isnan(scale) and math.isnan(s.item()))
    assert z.item() == zero_point


def test_dequantized_values_are_close():
    x = bf16(64, 500) + 2
    q, scale, zero_point = reference(x)
    back = (q.float() - zero_point.float()) * scale
    assert ((back - x.float()).abs() <= scale * 1.01).all()
