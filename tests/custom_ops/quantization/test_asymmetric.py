"""int8 with zero points: against exact arithmetic, its edges, and kernels against the reference."""

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
from tests.custom_ops.schemes import ASYMMETRIC, KERNELS, calls, kernel, producers, rest_of

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


@pytest.mark.parametrize("op", ASYMMETRIC[:2])
@given(call=producers(""), modes=options)
def test_reference_is_exact(op, call, modes):
    (x,), _ = call
    q, scale, zero_point = implementation(op, "reference")(x, **modes)
    width = x.shape[-1] if op.startswith("token") else x.numel()
    rows = x.double().cpu().reshape(-1, width).numpy()
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


@given(call=calls("", "tensor_quant_static_asymmetric"))
def test_a_given_zero_point_is_exact(call):
    (x,), (scale, zero_point) = call.inputs, call.rest
    q = implementation("tensor_quant_static_asymmetric", "reference")(*call.args, **call.options)
    with np.errstate(all="ignore"):
        by = scale.double().cpu().reshape(1, 1).numpy()
        values = x.double().cpu().reshape(1, -1).numpy()
        v = oracle.quotients(values, by, x.dtype, call.options["code_mode"])
        zero = 0.0 if zero_point is None else float(zero_point.float())  # as float32 has it
        codes = np.clip(oracle.to_float32(integers(v) + zero), -128, 127)
    np.testing.assert_array_equal(q.cpu().double().reshape(1, -1).numpy(), codes)


@pytest.mark.parametrize("op", ASYMMETRIC)
@pytest.mark.parametrize("which", KERNELS)
@given(data=st.data())
def test_kernels_equal_the_reference_bit_for_bit(op, which, data):
    run = kernel(op, which)
    call = data.draw(calls("", op))
    want = implementation(op, "reference")(*call.args, **call.options)
    assert_same_bits(run(*call.args, **call.options), want)


@pytest.mark.parametrize("op", ASYMMETRIC)
@pytest.mark.parametrize("which", KERNELS)
def test_tokens_longer_than_a_tile(op, which):
    x = bf16(2, 2 * 16384 + 100, device=DEVICE) - 3
    args = (x, *rest_of(op))
    assert_same_bits(kernel(op, which)(*args), implementation(op, "reference")(*args))


@pytest.mark.parametrize("which", KERNELS)
def test_one_row_is_one_token(which):
    x = bf16(1, 5000, device=DEVICE) + 1
    wanted = [t.reshape(-1) for t in reference(x)]
    got = [t.reshape(-1) for t in kernel("tensor_quant_asymmetric", which)(x)]
    assert_same_bits(got, wanted)


@pytest.mark.parametrize("which", ["reference", *KERNELS])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
def test_a_tensor_without_elements_is_a_zero(which, shape):
    x = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
    for bound in (0.0, 1e-5):
        q, scale, zero_point = kernel("tensor_quant_asymmetric", which)(x, min_scale=bound)
        assert q.shape == shape
        assert scale.item() == float(torch.tensor(bound))
        assert zero_point.item() == -128


@pytest.mark.parametrize("which", ["reference", *KERNELS])
@pytest.mark.parametrize("zero_point", [0, -7, 127, 1000])
def test_rounding_comes_before_the_zero_point(which, zero_point):
    """Halves go to the even quotient, whatever the zero point; a graph that adds first has others."""
    halves = torch.arange(-6, 7, device=DEVICE).to(torch.bfloat16) / 2
    x = halves.reshape(1, -1) - max(zero_point - 100, 0)
    zero = torch.tensor([zero_point], dtype=torch.int32, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    q = kernel("tensor_quant_static_asymmetric", which)(x, one, zero)
    assert torch.equal(q.int(), (x.float().round() + zero_point).clamp(-128, 127).int())


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
    for op, tokens in (("token_quant_asymmetric", x), ("tensor_quant_asymmetric", x.expand(3, -1))):
        q, s, z = kernel(op, which)(tokens)
        assert q.tolist() == [codes] * len(tokens)
        assert s.item() == scale or (math.isnan(scale) and math.isnan(s.item()))
        assert z.item() == zero_point


def test_dequantized_values_are_close():
    x = bf16(64, 500) + 2
    q, scale, zero_point = reference(x)
    back = (q.float() - zero_point.float()) * scale
    assert ((back - x.float()).abs() <= scale * 1.01).all()
