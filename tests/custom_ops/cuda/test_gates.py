"""Gates, alone and quantized: silu_mul has the bits of eager's with the expf of torch's own CUDA build."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from custom_ops.activation import reference as activation
from custom_ops.scales import GROUP_SIZES, SCALE_LAYOUTS
from tests.custom_ops.cuda.inputs import (
    DTYPES,
    assert_few_flips,
    assert_same_quantized,
    errors,
    inputs_of,
    randn,
    reference,
)
from tests.custom_ops.helpers import assert_same_bits
from tests.custom_ops.schemes import GATES, SCHEMES, kernel, rest_of

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(ops, dtype: torch.dtype) -> None:
    gate = randn(500, 4096, dtype=dtype, spread=2)
    packed = torch.cat([gate, randn(500, 4096, dtype=dtype)], -1)
    gate, up = packed.chunk(2, -1)
    got, want = ops.silu_mul(gate, up), activation.silu_mul(gate, up)
    # Both compute the same expression; another toolkit's expf could differ by an ulp of float32, which crosses a
    # rounding boundary of the shorter types once in 2^11 (2^14) times, and is then two ulp of the product at most.
    flips = (got.view(torch.int16).int() - want.view(torch.int16).int()).abs()
    assert flips.max() <= 2
    assert (flips > 0).float().mean() < 1e-4
    # Only silu's own rounding is compared with float64: the product's is the same in both.
    one = torch.ones_like(gate)
    exact = gate.double() * torch.sigmoid(gate.double())
    mean, largest = errors(ops.silu_mul(gate, one), exact)
    eager_mean, eager_largest = errors(activation.silu_mul(gate, one), exact)
    assert mean <= eager_mean * 1.00001
    assert largest <= eager_largest * 1.00001


def test_silu_mul_of_every_gate(ops) -> None:
    """All 65536 bfloat16 and float16 (0 differ from eager with nvcc 13.0 and torch 2.11+cu130)."""
    for dtype in DTYPES:
        gate = (
            torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16).view(dtype).view(256, 256)
        )
        got = ops.silu_mul(gate, torch.ones_like(gate))
        want = activation.silu_mul(gate, torch.ones_like(gate))
        nan = want.isnan()
        assert torch.equal(nan, got.isnan())
        a, b = (t.view(torch.int16).int()[~nan] for t in (got, want))
        assert (a - b).abs().max() <= 1
        assert (a != b).sum() <= 4


@pytest.mark.parametrize("cols", [1, 7, 63, 127, 128, 1000, 4099])
def test_silu_mul_of_odd_shapes(ops, cols: int) -> None:
    for rows in (0, 1, 3, 1100):
        gate = randn(rows, cols, dtype=torch.bfloat16)
        up = randn(rows, cols, dtype=torch.bfloat16)
        got, want = ops.silu_mul(gate, up), activation.silu_mul(gate, up)
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=2**-6, atol=0)


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_group_quant(ops, dtype: torch.dtype, group_size: int, layout: str) -> None:
    for rows, cols in ((1, 128), (3, 384), (129, 2048), (1031, 2048), (2500, 4096)):
        gate = randn(rows, cols, dtype=dtype, spread=2)
        up = randn(rows, cols, dtype=dtype)
        options = {"scale_layout": layout, "min_amax": 1e-10}
        got = ops.silu_mul_group_quant(gate, up, group_size, **options)
        want = reference("silu_mul_group_quant", gate, up, group_size, **options)
        assert_few_flips(got, want, group_size)
        own = ops.group_quant(ops.silu_mul(gate, up), group_size, **options)
        assert_same_quantized(got, own)


@pytest.mark.parametrize("producer", GATES)
def test_gates_are_eagers(ops, producer: str) -> None:
    """Contiguous, the halves of a packed tensor, the even and odd columns of one: the same, and as eager."""
    run = kernel(producer, "cuda")
    most = {"silu_mul": 2, "gelu_tanh_mul": 2, "clamped_swiglu": 4}[producer]
    for rows, cols, dtype in itertools.product((1, 700), (1, 7, 128, 2880, 4099), DTYPES):
        gate, up, *numbers = inputs_of(producer, rows, cols, dtype=dtype)
        gate = (
            gate.clamp(min=-3) if producer == "gelu_tanh_mul" else gate
        )  # below, 1 + tanh cancels
        got, want = run(gate, up, *numbers), reference(producer, gate, up, *numbers)
        apart = (got.view(torch.int16).int() - want.view(torch.int16).int()).abs()
        assert apart.max() <= most
        assert (apart > 0).sum() <= max(2, 1e-3 * apart.numel())
        packed = torch.cat([gate, up], -1).chunk(2, -1)
        mixed = torch.stack([gate, up], -1).flatten(-2)
        for pair in (packed, (mixed[..., ::2], mixed[..., 1::2])):
            assert_same_bits(run(*pair, *numbers), got)
            for scheme in SCHEMES if cols % 128 == 0 else ("token_quant",):
                fused = kernel(f"{producer}_{scheme}", "cuda")
                rest = (*numbers, *rest_of(scheme))
                assert_same_bits(
                    fused(*pair, *rest), fused(gate.contiguous(), up.contiguous(), *rest)
                )


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0_packed"])
def test_nothing_is_written_past_the_count(ops, scale_format: str) -> None:
    """The kernel allocates its outputs itself: it is given memory that was filled before and freed."""
    x = randn(3, 6, 2 * 256, dtype=torch.bfloat16)
    counts = torch.tensor([0, 2, 6], dtype=torch.int32, device="cuda")

    def run() -> tuple[Tensor, Tensor]:
        return ops.silu_mul_group_quant_masked(x, counts, 64, scale_format=scale_format)

    outputs = run()
    places = [t.data_ptr() for t in outputs]
    for t in outputs:
        t.untyped_storage().fill_(0x5A)
    del outputs, t
    outputs = run()
    assert [t.data_ptr() for t in outputs] == places, "needs an allocator that gives memory again"
    for t, (expert, count) in itertools.product(outputs, enumerate(counts.tolist())):
        rows = t[expert].clone(memory_format=torch.contiguous_format).view(torch.uint8)
        assert (rows[count:] == 0x5A).all()
        assert count == 0 or (rows[:count] != 0x5A).any()


def test_counts_beyond_the_rows(ops) -> None:
    """A count above max_tokens is all rows, one below zero none."""
    x = randn(3, 5, 2 * 128, dtype=torch.bfloat16)
    counts = torch.tensor([100, 5, -1], dtype=torch.int32, device="cuda")
    got = ops.silu_mul_group_quant_masked(x, counts, 128)
    want = ops.silu_mul_group_quant_masked(x, counts.clamp(0, 5), 128)
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a[:2].contiguous(), b[:2].contiguous())
