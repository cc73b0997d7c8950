"""group_quant: the semantics against exact arithmetic, every edge, and Triton against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import custom_ops
from custom_ops.scales import SCALE_LAYOUTS
from fusion_passes.testing.strategies import activation_shapes, activations, relayouts
from tests.custom_ops.helpers import DEVICE, assert_same_bits, bf16, implementation

reference = implementation("group_quant", "reference")
triton = implementation("group_quant", "triton")
# Every finite code of float8_e4m3fn from 0 up, in float64.
CODES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()

group_sizes = st.sampled_from((64, 128))
layouts = st.sampled_from(SCALE_LAYOUTS)
min_amaxes = st.sampled_from((1e-10, 0.0, 1e-4, 1e-38, 1e-42, 3.0))
shapes = activation_shapes(multiple_of=128)


def nearest_codes(x: torch.Tensor) -> torch.Tensor:
    """float64 to the nearest e4m3 code (0..126), ties to the even code, saturating: by looking it up."""
    magnitude = x.abs().clamp(max=448.0)
    above = torch.searchsorted(CODES, magnitude).clamp(max=126)
    below = (above - 1).clamp(min=0)
    up, down = CODES[above] - magnitude, magnitude - CODES[below]
    take_up = (up < down) | ((up == down) & (above % 2 == 0))
    return torch.where(take_up, above, below)


@given(x=activations(shapes), group_size=group_sizes, min_amax=min_amaxes)
def test_reference_is_exact(x, group_size, min_amax):
    """The scale is the correctly rounded quotient; the code is the nearest one to the float32 quotient."""
    q, scale = reference(x, group_size, min_amax=min_amax)
    groups = x.double().unflatten(-1, (-1, group_size))
    amax = groups.abs().amax(-1).clamp(min=float(torch.tensor(min_amax)))
    assert torch.equal(scale.nan_to_num(nan=-1.0), (amax / 448).float().nan_to_num(nan=-1.0))
    quotient = (groups / scale.double().unsqueeze(-1)).float().double()
    codes = q.view(torch.uint8).unflatten(-1, (-1, group_size))
    finite = ~quotient.isnan()
    assert torch.equal((codes & 0x7F == 0x7F), ~finite)
    assert torch.equal((codes & 0x7F)[finite].long(), nearest_codes(quotient)[finite])
    assert torch.equal((codes >= 0x80)[finite], quotient.signbit()[finite])


@given(st.data(), activations(shapes, device=DEVICE), group_sizes, layouts, min_amaxes)
def test_triton_equals_the_reference_bit_for_bit(data, x, group_size, scale_layout, min_amax):
    x = data.draw(relayouts(x))
    options = {"scale_layout": scale_layout, "min_amax": min_amax}
    if x.numel():
        assert_same_bits(triton(x, group_size, **options), reference(x, group_size, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_encodes_every_value_of_a_dtype(dtype):
    """All 65536 bit patterns, in groups whose scale is exactly 1: every tie and every boundary of e4m3."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    largest = torch.tensor(448.0, dtype=dtype)
    values = torch.where(values.abs() <= 448, values, largest)
    # 63 of them to a group of 64 that begins with the largest code.
    x = torch.nn.functional.pad(values, (0, -len(values) % 63), value=448.0).view(-1, 63)
    x = torch.cat([largest.expand(len(x), 1), x], dim=1).to(DEVICE)
    assert torch.equal(reference(x, 64)[1], torch.ones(x.shape[0], 1, device=DEVICE))
    assert_same_bits(triton(x, 64), reference(x, 64))


@pytest.mark.parametrize("which", ["reference", "triton"])
class TestEdges:
    """The table of custom_ops.scales, row by row."""

    @staticmethod
    def quantize(which, values, **options):
        x = torch.zeros(1, 128, dtype=torch.bfloat16, device=DEVICE)
        x[0, : len(values)] = torch.tensor(values).to(torch.bfloat16)
        q, scale = implementation("group_quant", which)(x, 128, **options)
        return q[0, : len(values)].float().tolist(), scale.item()

    def test_zero_group(self, which):
        assert self.quantize(which, [0.0, -0.0]) == ([0.0, 0.0], float(torch.tensor(1e-10) / 448))

    def test_zero_group_without_a_lower_bound(self, which):
        codes, scale = self.quantize(which, [0.0], min_amax=0.0)
        assert scale == 0
        assert math.isnan(codes[0])

    def test_negative_zero_keeps_its_sign(self, which):
        codes, _ = self.quantize(which, [-0.0, 0.0, 448.0])
        assert [math.copysign(1, c) for c in codes[:2]] == [-1, 1]

    def test_subnormal_values(self, which):
        tiny = 2.0**-130
        codes, scale = self.quantize(which, [tiny, -tiny / 2], min_amax=0.0)
        assert scale == float(torch.tensor(tiny) / 448)
        assert abs(codes[0] - 448) <= 32
        assert abs(codes[1] + 224) <= 16

    def test_infinity(self, which):
        codes, scale = self.quantize(which, [math.inf, 5.0, -math.inf, 0.0])
        assert scale == math.inf
        assert [math.isnan(c) for c in codes] == [True, False, True, False]
        assert codes[1] == codes[3] == 0

    def test_nan(self, which):
        codes, scale = self.quantize(which, [1.0, math.nan, math.inf, 0.0])
        assert math.isnan(scale)
        assert all(math.isnan(c) for c in codes)

    @pytest.mark.parametrize("power", [-50, -1, 0, 7, 100])
    def test_exact_powers_of_two(self, which, power):
        values = [448.0 * 2.0**power, 2.0**power, -(2.0 ** (power - 6))]
        codes, scale = self.quantize(which, values, min_amax=0.0)
        assert (codes, scale) == ([448.0, 1.0, -(2.0**-6)], 2.0**power)

    def test_the_lower_bound(self, which):
        assert self.quantize(which, [2.0, -448.0], min_amax=896.0) == ([1.0, -224.0], 2.0)


@given(rows=st.integers(2, 9), seed=st.integers(0, 999))
def test_a_row_gives_the_same_bits_in_any_batch(rows, seed):
    torch.manual_seed(seed)
    x = bf16(rows, 256, device=DEVICE)
    for quantize in (reference, triton):
        q, scale = quantize(x, 128)
        for i in range(rows):
            assert_same_bits(quantize(x[i : i + 1], 128), (q[i : i + 1], scale[i : i + 1]))


def test_dequantized_values_are_close():
    x = bf16(64, 512)
    q, scale = custom_ops.group_quant(x, 128)
    back = q.float() * scale.repeat_interleave(128, -1)
    assert (back - x.float()).abs().max() <= x.abs().max() / 448 * 16 + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [64, 128])
def test_a_large_batch_of_all_magnitudes_is_bit_for_bit(dtype, group_size):
    """4 million quotients by the corrected reciprocal, and tiny groups by true division."""
    x = torch.randn(4096, 1024, device="cuda")
    x = (x * torch.logspace(-42, 5, 4096, device="cuda").unsqueeze(1)).to(dtype)
    for min_amax in (1e-10, 0.0):
        options = {"min_amax": min_amax}
        assert_same_bits(triton(x, group_size, **options), reference(x, group_size, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_more_than_2_31_elements(layout):
    """The last row lies past the reach of 32-bit offsets."""
    x = torch.zeros(2**18 + 1, 8192, dtype=torch.bfloat16, device="cuda")
    x[-1] = bf16(8192, device="cuda")
    q, scale = triton(x, 128, scale_layout=layout)
    last = reference(x[-1:], 128)
    assert_same_bits((q[-1].contiguous(), scale[-1].contiguous()), (last[0][0], last[1][0]))
    assert not q[:-1].view(torch.int64).any()
