"""gelu_tanh_mul and clamped_swiglu: against float64, eager, and Triton."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import custom_ops
from tests.custom_ops.helpers import (
    DEVICE,
    assert_few_flips,
    assert_same_bits,
    bf16,
    implementation,
    steps,
)
from tests.custom_ops.schemes import producers

reference = {
    name: implementation(name, "reference") for name in ("gelu_tanh_mul", "clamped_swiglu")
}
triton = {name: implementation(name, "triton") for name in ("gelu_tanh_mul", "clamped_swiglu")}


def gpt_oss(gate, up, alpha, limit):
    """As the experts of gpt-oss compute it in transformers."""
    gate = gate.clamp(min=None, max=limit)
    up = up.clamp(min=-limit, max=limit)
    glu = gate * torch.sigmoid(gate * alpha)
    return (up + 1) * glu


@given(producers("clamped_swiglu"))
def test_clamped_swiglu_is_the_models(call):
    args, _ = call
    eager = gpt_oss(*args).clone(memory_format=torch.contiguous_format)
    assert_same_bits(reference["clamped_swiglu"](*args), eager)


@given(producers("gelu_tanh_mul"))
def test_gelu_tanh_mul_is_eager(call):
    (gate, up), _ = call
    eager = torch.nn.functional.gelu(gate, approximate="tanh") * up
    eager = eager.clone(memory_format=torch.contiguous_format)
    assert_same_bits(reference["gelu_tanh_mul"](gate, up), eager)


@given(producers("clamped_swiglu", specials=False))
def test_clamped_swiglu_against_float64(call):
    (gate, up, alpha, limit), _ = call
    bound = float(torch.tensor(limit).to(gate.dtype))
    g, u = gate.double().clamp(max=bound), up.double().clamp(-bound, bound)
    exact = (u + 1) * g * torch.sigmoid(alpha * g)
    eps = torch.finfo(gate.dtype).eps
    # Roundings of the sigmoid, of g * sigmoid, and of the product; that of alpha * g moves the sigmoid by as
    # much as it moves its argument; that of u + 1 is of the size of u.
    relative = eps * (1.5 + (alpha * g).abs()) * 1.02
    out = reference["clamped_swiglu"](gate, up, alpha, limit).double()
    absolute = eps * (g * torch.sigmoid(alpha * g)).abs() * (1 + u.abs())
    assert ((out - exact).abs() <= exact.abs() * relative + absolute + 1e-6).all()


@given(producers("gelu_tanh_mul", specials=False))
def test_gelu_tanh_mul_against_float64(call):
    (gate, up), _ = call
    g = gate.double()
    exact = torch.nn.functional.gelu(g, approximate="tanh") * up.double()
    info = torch.finfo(gate.dtype)
    # Two roundings to the dtype, and two float32 steps of a tanh near -1.
    bound = exact.abs() * (info.eps * 1.01) + (g * up.double()).abs() * 2.0**-22
    out = reference["gelu_tanh_mul"](gate, up).double()
    assert ((out - exact).abs() <= bound + info.smallest_normal).all()


@given(producers("clamped_swiglu"))
def test_triton_clamped_swiglu_against_the_reference(call):
    args, _ = call
    assert_few_flips(triton["clamped_swiglu"](*args), reference["clamped_swiglu"](*args), most=4)


@given(producers("gelu_tanh_mul"))
def test_triton_gelu_tanh_mul_against_the_reference(call):
    """Few steps apart, but where 1 + tanh cancels: there by two float32 steps of the tanh."""
    (gate, up), _ = call
    actual, expected = triton["gelu_tanh_mul"](gate, up), reference["gelu_tanh_mul"](gate, up)
    apart = (actual.double() - expected.double()).abs()
    cancelled = apart <= (gate.double() * up.double()).abs() * 2.0**-22
    distance = steps(actual, expected)
    assert (cancelled | (distance <= 2)).all()
    assert int((~cancelled & (distance > 0)).sum()) <= max(2, 1e-3 * gate.numel())


@pytest.mark.parametrize("which", ["reference", "triton"])
def test_edges_of_clamped_swiglu(which):
    """Bounds are those of the dtype, NaN passes through both clamps, and infinities are clamped."""
    values = [math.nan, math.inf, -math.inf, 7.0, 7.03125, -100.0, 0.0]
    gate = torch.tensor([values], dtype=torch.bfloat16, device=DEVICE)
    one, nan = torch.zeros_like(gate), torch.full_like(gate, math.nan)
    run = implementation("clamped_swiglu", which)
    out = run(gate, one, 1.702, 7.0)[0].tolist()
    assert math.isnan(out[0])
    assert math.isnan(out[2])  # -Inf times a sigmoid of 0, as in eager
    assert out[1] == out[3] == out[4] == 7.0
    assert out[5] == out[6] == 0
    assert run(gate, nan, 1.702, 7.0).isnan().all()
    assert run(one + 7, gate * 1e30, 1.702, 7.0)[0].tolist()[1:4] == [56.0, -42.0, 56.0]


def test_bad_scalars():
    x = bf16(2, 8, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"clamped_swiglu: alpha is inf; accepted: a finite number"
    ):
        custom_ops.clamped_swiglu(x, x, math.inf, 7.0)
    with pytest.raises(
        ValueError, match=r"_token_quant: limit is -1.0; accepted: a finite number >= 0"
    ):
        custom_ops.clamped_swiglu_token_quant(x, x, 1.702, -1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gelu_tanh_mul", "clamped_swiglu"])
@given(seed=st.integers(0, 99))
def test_large_batches(name, seed):
    torch.manual_seed(seed)
    scalars = (1.702, 7.0) if name == "clamped_swiglu" else ()
    args = (
        bf16(1024, 2048, device="cuda").clamp(min=-3),
        bf16(1024, 2048, device="cuda"),
        *scalars,
    )
    assert_few_flips(triton[name](*args), reference[name](*args), most=4, fraction=1e-3)
