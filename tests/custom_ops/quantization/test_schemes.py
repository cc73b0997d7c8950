"""The schemes alone: against exact arithmetic, and Triton against the reference, whatever the keywords."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import custom_ops
from custom_ops.scales import CODE_DTYPES
from tests.custom_ops.helpers import DEVICE, assert_same_bits, bf16, implementation, outputs
from tests.custom_ops.quantization import oracle
from tests.custom_ops.schemes import KERNELS, SCHEMES, calls, kernel

every_kernel = pytest.mark.parametrize("which", KERNELS)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)
FP8, INT8 = torch.float8_e4m3fn, torch.int8


def rows_of_groups(x: torch.Tensor, scheme: str, rest: tuple) -> torch.Tensor:
    """x in float64 as [groups, channels that share a scale]."""
    width = rest[0] if scheme == "group_quant" else x.shape[-1]
    wide = x.double().cpu()
    return wide.reshape(1, -1) if scheme.startswith("tensor") else wide.reshape(-1, width)


def exponents(scale: torch.Tensor, groups: int) -> np.ndarray:
    """Packed exponents [..., G / 4] as the powers of two of the groups, one after the other."""
    bytes_ = (
        scale.clone(memory_format=torch.contiguous_format)
        .view(torch.uint8)
        .reshape(-1, 4 * scale.shape[-1])
    )
    assert not bytes_[:, groups:].any()
    e = bytes_[:, :groups].flatten().numpy().astype(np.float64)
    return np.where(e == 255, np.nan, np.exp2(e - 127))


@every_scheme
@given(data=st.data())
def test_reference_is_exact(scheme, data):
    """Each scale and each code is the float64 result, rounded exactly where the contract says."""
    call = data.draw(calls("", scheme))
    (x,) = call.inputs
    q, *scales = outputs(implementation(scheme, "reference")(*call.args, **call.options))
    groups = rows_of_groups(x, scheme, call.rest).numpy()
    options = dict(call.options)
    code_mode, dtype = options.pop("code_mode"), options["dtype"]
    with np.errstate(all="ignore"):
        if scales:
            options.pop("scale_layout", None)
            amax = np.abs(groups).max(-1)
            expected = oracle.scales(amax, x.dtype, **options)
            if options["scale_format"] == "ue8m0_packed":
                actual = exponents(scales[0].cpu(), x.shape[-1] // call.rest[0])
                packable = np.where(np.isinf(expected), np.nan, expected)
            else:
                actual, packable = scales[0].cpu().double().flatten().numpy(), expected
            np.testing.assert_array_equal(actual, packable)
        else:
            expected = np.full(len(groups), call.rest[0].item())
        v = oracle.quotients(groups, expected[:, None], x.dtype, code_mode)
        wanted = oracle.codes(v, dtype, options.get("scale_mode", "divide"))
    got = q.cpu().float().double().reshape(groups.shape).numpy()
    np.testing.assert_array_equal(got, wanted)
    if dtype == FP8:
        finite = ~np.isnan(wanted)
        np.testing.assert_array_equal(np.signbit(got)[finite], np.signbit(wanted)[finite])


@every_kernel
@every_scheme
@given(data=st.data())
def test_kernels_equal_the_reference_bit_for_bit(scheme, which, data):
    run = kernel(scheme, which)
    call = data.draw(calls("", scheme))
    assert_same_bits(
        run(*call.args, **call.options),
        implementation(scheme, "reference")(*call.args, **call.options),
    )


@every_kernel
@every_scheme
def test_tokens_longer_than_a_tile(scheme, which):
    run = kernel(scheme, which)
    x = bf16(3, 16384 + 128, device=DEVICE)
    rest = {"group_quant": (32,), "tensor_quant_static": (torch.tensor(0.02, device=DEVICE),)}
    for options in ({"dtype": INT8}, {"code_mode": "reciprocal_input"}):
        args = (x, *rest.get(scheme, ()))
        assert_same_bits(
            run(*args, **options),
            implementation(scheme, "reference")(*args, **options),
        )


def torchao_float8(x: torch.Tensor, dims: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """What torchao's float8 configurations compute, in eager PyTorch."""
    amax = x.abs().amax(dims, keepdim=True)
    scale = (amax / 448.0).to(torch.float32)
    codes = (x.to(torch.float32) / scale).clamp(-448.0, 448.0).to(FP8)
    return codes, scale


def torchao_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What version 1 of torchao's Int8DynamicActivationInt8WeightConfig makes of its activation, in eager PyTorch."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    zero = torch.zeros_like(low)
    m = torch.maximum(-torch.minimum(low, zero), torch.maximum(high, zero))
    scale = (m / 127.0).clamp(min=1e-5)
    codes = torch.round(x * (1.0 / scale)).to(torch.float32).clamp(-127, 127).to(INT8)
    return codes, scale.to(torch.float32)


def torchao_int8_of_all_codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of version 2, which torchao 0.18 has alone."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    zero = torch.zeros_like(low)
    m = torch.maximum(-torch.minimum(low, zero), torch.maximum(high, zero))
    scale = (m / 127.5).float().clamp(min=2.0**-23).to(x.dtype).float()
    return torch.round(x * (1.0 / scale)).clamp(-128, 127).to(INT8), scale


# Eager on a CPU divides by a number; on a GPU it multiplies by the reciprocal.
IN_INPUT = "divide_input" if DEVICE == "cpu" else "reciprocal_input"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 300.0])
def test_these_are_torchaos_bits(dtype, magnitude):
    x = (torch.randn(64, 1000) * magnitude).to(dtype).to(DEVICE)
    modes = {"min_amax": 0.0, "scale_mode": IN_INPUT}
    assert_same_bits(custom_ops.token_quant(x, **modes), torchao_float8(x, (-1,)))
    codes, scale = torchao_float8(x, (0, 1))
    assert_same_bits(custom_ops.tensor_quant(x, **modes), (codes, scale.view(1)))
    modes |= {"dtype": INT8, "min_scale": 1e-5, "code_mode": "reciprocal_input"}
    assert_same_bits(custom_ops.token_quant(x, **modes), torchao_int8(x))
    modes |= {"min_scale": 2.0**-23, "code_mode": "reciprocal"}
    modes["scale_mode"] = IN_INPUT.replace("_input", "_full_input")
    assert_same_bits(custom_ops.token_quant(x, **modes), torchao_int8_of_all_codes(x))


@every_kernel
@pytest.mark.parametrize("code_mode", custom_ops.scales.CODE_MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["token_quant", "tensor_quant", "group_quant"])
def test_the_ends_of_all_codes(scheme, dtype, code_mode, which):
    """By 127.5, rounded to 16 bits, the largest value rounds to 128 or to 127, and the least one to -128 or to -127."""
    run = kernel(scheme, which)
    amax = torch.linspace(1.0, 2.0, 129).to(dtype)
    x = torch.randn(129, 128).clamp(-1, 1).to(dtype)
    x[:, 0], x[:, 1] = amax, -amax
    x = x.to(DEVICE)
    options = {"dtype": INT8, "scale_mode": "reciprocal_full_input", "code_mode": code_mode}
    rest = (128,) if scheme == "group_quant" else ()
    for part in (x,) if scheme != "tensor_quant" else x.split(1):
        codes, scale = run(part, *rest, **options)
        want = implementation(scheme, "reference")(part, *rest, **options)
        assert_same_bits((codes, scale), want)
    codes, scale = implementation("token_quant", "reference")(x, **options)
    assert set(codes[:, 0].tolist()) == {127}
    assert -128 in codes[:, 1].tolist()


def test_codes_of_float8_and_zero_points_have_no_such_mode():
    x = bf16(2, 128)
    for mode in custom_ops.scales.ALL_CODES:
        for op, args in {"group_quant": (128,), "token_quant": (), "tensor_quant": ()}.items():
            with pytest.raises(ValueError, match=f"scale_mode is '{mode}'; accepted: divide, "):
                getattr(custom_ops, op)(x, *args, scale_mode=mode)
        with pytest.raises(ValueError, match=f"scale_mode is '{mode}'; accepted: divide, "):
            custom_ops.token_quant_asymmetric(x, scale_mode=mode)


def test_the_modes_differ():
    """None stands for another: on ordinary data each pair differs in scales or in codes, but for one pair."""
    x = bf16(512, 128)
    for name, modes in (
        ("scale_mode", ("divide", "reciprocal", "divide_input")),
        ("code_mode", custom_ops.scales.CODE_MODES),
    ):
        seen = {
            tuple(t.contiguous().view(torch.uint8).numpy().tobytes() for t in result)
            for result in (
                implementation("token_quant", "reference")(x, **{name: mode}) for mode in modes
            )
        }
        assert len(seen) == len(modes)


@pytest.mark.parametrize("dtype", CODE_DTYPES)
def test_in_bfloat16_the_two_modes_are_one(dtype):
    """No amax divided by 448 or 127 lies so near a tie that a float32 step decides: all of them are tried."""
    amax = torch.arange(2**15).to(torch.int16).view(torch.bfloat16)
    reference = custom_ops.quantization.reference.scale_of
    divided, multiplied = (
        reference(amax, 0.0, dtype, "float32", 0.0, mode)
        for mode in ("divide_input", "reciprocal_input")
    )
    assert_same_bits(multiplied, divided)


def test_powers_of_two_and_their_neighbours():
    """The power of two at a power of two, one float32 step below it and one above it, and at the ends."""
    exponent = torch.arange(-126, 128).float()
    power = torch.exp2(exponent)
    below, above = torch.nextafter(power, power - power), torch.nextafter(power, power * math.inf)
    reference = custom_ops.quantization.reference.power_of_two
    assert torch.equal(reference(power), power)
    assert torch.equal(reference(below), power)
    assert torch.equal(reference(above), power * 2)
    least = torch.tensor([0.0, 1e-45, 2.0**-128, 2.0**-127, 2.0**-126 * 0.75])
    assert reference(least).tolist() == [2.0**-127] * 4 + [2.0**-126]
    ends = reference(torch.tensor([math.inf, math.nan]))
    assert ends[0] == math.inf
    assert ends[1].isnan()


@pytest.mark.parametrize("which", ["reference", *KERNELS])
def test_four_exponents_to_an_int32(which):
    """Groups 0 to 3 from the lowest byte up, then the next element; no group is 0."""
    x = torch.zeros(2, 5 * 32, dtype=torch.bfloat16, device=DEVICE)
    for group in range(5):
        x[0, 32 * group] = 448.0 * 2.0 ** (group - 3)
        x[1, 32 * group] = 448.0 * 2.0 ** (10 * group)
    options = {"scale_format": "ue8m0_packed", "scale_layout": "column_major_tma"}
    q, scale = kernel("group_quant", which)(x, 32, min_amax=0.0, **options)
    assert (scale.dtype, scale.shape, scale.stride()) == (torch.int32, (2, 2), (1, 4))
    assert scale[0].tolist() == [124 | 125 << 8 | 126 << 16 | 127 << 24, 128]
    assert scale[1].tolist() == [127 | 137 << 8 | 147 << 16 | (157 << 24) - (1 << 32), 167]
    assert q[:, ::32].float().tolist() == [[448.0] * 5] * 2


@every_scheme
def test_no_elements(scheme):
    rest = {"group_quant": (128,), "tensor_quant_static": (torch.ones(1, device=DEVICE),)}
    x = bf16(0, 128, device=DEVICE)
    for result in (
        getattr(custom_ops, scheme)(x, *rest.get(scheme, ())),
        implementation(scheme, "reference")(x, *rest.get(scheme, ())),
    ):
        q, *scale = outputs(result)
        assert q.shape == (0, 128)
        if scheme == "tensor_quant":
            assert scale[0].tolist() == [float(torch.tensor(1e-10) / 448)]
        elif scale:
            assert scale[0].shape == (0, 1)


@every_kernel
@given(rows=st.integers(2, 9), seed=st.integers(0, 999), dtype=st.sampled_from((FP8, INT8)))
def test_a_row_gives_the_same_bits_in_any_batch(which, rows, seed, dtype):
    torch.manual_seed(seed)
    x = bf16(rows, 256, device=DEVICE)
    for name, rest in (("group_quant", (64,)), ("token_quant", ())):
        quantize = kernel(name, which)
        q, scale = quantize(x, *rest, dtype=dtype)
        for i in range(rows):
            alone = quantize(x[i : i + 1], *rest, dtype=dtype)
            assert_same_bits(alone, (q[i : i + 1], scale[i : i + 1]))


@pytest.mark.parametrize("dtype", [FP8, INT8])
@every_scheme
def test_dequantized_values_are_close(scheme, dtype):
    x = bf16(64, 512)
    rest = {"group_quant": (128,), "tensor_quant_static": (x.abs().amax().float() / 127,)}
    q, *scale = outputs(getattr(custom_ops, scheme)(x, *rest.get(scheme, ()), dtype=dtype))
    each = scale[0] if scale else rest[scheme][0]
    if scheme == "group_quant":
        each = each.repeat_interleave(128, -1)
    step = x.abs().max() * (16 / 448 if dtype == FP8 else 0.5 / 127)
    assert (q.float() * each - x.float()).abs().max() <= 1.01 * step
