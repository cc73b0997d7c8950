"""The CUDA C++ kernels against the references, on a GPU.

Quantization equals its reference bit for bit, and silu_mul does with the expf of torch's own CUDA build.
What holds a sum may differ from eager by what a float32 rounding does: the flipped codes are counted, and each
is one step away. Small sizes with all keywords, drawn by hypothesis, are in test_fused.py and
quantization/test_schemes.py; here are those that take another kernel, another address, or more than 2^31 elements.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from custom_ops import library
from custom_ops.activation import reference as activation
from custom_ops.normalization import reference as normalization
from custom_ops.quantization import reference as quantization
from custom_ops.scales import CODE_DTYPES, CODE_MODES, GROUP_SIZES, SCALE_LAYOUTS, SCALE_MODES
from tests.custom_ops.helpers import assert_same_bits, outputs
from tests.custom_ops.schemes import ASYMMETRIC, GATES, NORMS, PAIRS, SCHEMES, kernel

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)
WEIGHT_MODES = ("rounded", "float32", "float32_plus_one")
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-40, 6e-8, 448.0, -1.0)
EPS = 1e-6


@pytest.fixture(scope="module", autouse=True)
def ops() -> Iterator[object]:
    library.load_cuda()
    torch.manual_seed(0)
    yield torch.ops.custom_ops_cuda
    torch.cuda.empty_cache()


def reference(name: str, *args, **options):
    """The reference of an op, its keywords by default."""
    op = library.ops()[name]
    return op.reference(*args, **op.defaults | options)


def randn(*shape: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    """Normal values whose rows differ in size by powers of two."""
    x = torch.randn(*shape, device="cuda", dtype=torch.float32)
    rows = torch.randn(*shape[:-1], 1, device="cuda") * spread
    return (x * torch.exp2(rows)).to(dtype)


def with_special(x: Tensor) -> Tensor:
    """x with zero groups and the special values here and there."""
    x = x.clone()
    flat = x.view(-1)
    at = torch.randint(0, flat.numel(), (max(1, flat.numel() // 300),), device="cuda")
    pick = torch.randint(0, len(SPECIAL), at.shape, device="cuda")
    flat[at] = torch.tensor(SPECIAL, device="cuda").to(x.dtype)[pick]
    x[..., :128] *= (torch.rand(*x.shape[:-1], 1, device="cuda") > 0.3).to(x.dtype)
    return x


def steps(codes: Tensor) -> Tensor:
    """The code's place among the values of float8_e4m3fn, -0 and +0 being one; NaN is 1000."""
    bits = codes.view(torch.uint8).int()
    size = bits & 0x7F
    return torch.where(size == 0x7F, 1000, torch.where(bits > 0x7F, -size, size))


def assert_same_quantized(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for a, b in zip(got[:2], want[:2], strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=0, equal_nan=True)
    a, b = (t[0].contiguous().view(torch.uint8) for t in (got, want))
    nan = ((a & 0x7F) == 0x7F) & ((b & 0x7F) == 0x7F)  # which NaN is not specified
    assert torch.equal(torch.where(nan, 0, a), torch.where(nan, 0, b))


def count_flips(
    got: tuple[Tensor, ...], want: tuple[Tensor, ...], group_size: int
) -> tuple[int, int]:
    """Codes that differ, and codes that differ by more than a step although their scale is the same."""
    for a, b in zip(got[:2], want[:2], strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    apart = (steps(got[0]) - steps(want[0])).abs()
    same = ((got[1] == want[1]) | (got[1].isnan() & want[1].isnan())).repeat_interleave(
        group_size, -1
    )
    return int((apart > 0).sum()), int(((apart > 1) & same).sum())


def assert_few_flips(got: tuple[Tensor, ...], want: tuple[Tensor, ...], group_size: int) -> None:
    flips, far = count_flips(got, want, group_size)
    assert far == 0
    expected = 1e-4 * got[0].numel()
    assert flips <= expected + 4 * expected**0.5 + 2  # four deviations of a count with that mean


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values at other addresses: misaligned, a strided half, padded rows."""
    *lead, cols = x.shape
    shifted = torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view(x.shape)
    packed = torch.empty(*lead, 2 * cols, device="cuda", dtype=x.dtype)[..., cols:]
    odd_pitch = torch.empty(*lead, cols + 3, device="cuda", dtype=x.dtype)[..., :cols]
    return {
        "shifted": shifted.copy_(x),
        "packed": packed.copy_(x),
        "odd pitch": odd_pitch.copy_(x),
    }


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_alignment_does_not_matter(ops, dtype: torch.dtype) -> None:
    x = with_special(randn(37, 384, dtype=dtype))
    up = with_special(randn(37, 384, dtype=dtype))
    clean = randn(37, 384, dtype=dtype)
    weight = randn(384, dtype=dtype)
    odd_weight = torch.empty(385, device="cuda", dtype=dtype)[1:].copy_(weight)
    quantized = ops.group_quant(x, 128)
    product, product_q = ops.silu_mul(x, up), ops.silu_mul_group_quant(x, up, 128)
    normed = ops.add_rms_norm_group_quant(clean, up.nan_to_num(0, 1, 1), weight, EPS, 64)
    for name, other in layouts(x).items():
        assert_same_quantized(ops.group_quant(other, 128), quantized)
        torch.testing.assert_close(
            ops.silu_mul(other, layouts(up)[name]), product, rtol=0, atol=0, equal_nan=True
        )
        assert_same_quantized(ops.silu_mul_group_quant(other, up, 128), product_q)
        other_clean, residual = layouts(clean)[name], layouts(up.nan_to_num(0, 1, 1))[name]
        for w in (weight, odd_weight):
            again = ops.add_rms_norm_group_quant(other_clean, residual, w, EPS, 64)
            assert_same_quantized(again, normed)
            assert torch.equal(again[2], normed[2])


def errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """Mean and largest error, in units of the last place of what is exact."""
    _, exponent = torch.frexp(exact)
    digits = {torch.bfloat16: 8, torch.float16: 11}[got.dtype]
    smallest = {torch.bfloat16: -125, torch.float16: -13}[got.dtype]
    ulp = torch.exp2(exponent.clamp(min=smallest).double() - digits)
    error = (got.double() - exact).abs() / ulp
    return error.mean().item(), error.max().item()


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


def norm_weight(cols: int, dtype: torch.dtype, mode: str, float32: bool) -> Tensor:
    base = 0.0 if mode == "float32_plus_one" else 1.0
    weight = base + 0.3 * torch.randn(cols, device="cuda")
    weight[:1] = -0.0
    return weight if float32 else weight.to(dtype)


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
    whole = ops.add_rms_norm_group_quant(x, residual, weight, EPS, 64)
    for rows in (1, 2, 100, 511, 513):
        part = ops.add_rms_norm_group_quant(x[:rows], residual[:rows], weight, EPS, 64)
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(
                a[:rows].contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
            )


def test_more_rows_than_a_grid_has_in_y(ops) -> None:
    x = randn(200_003, 128, dtype=torch.bfloat16, spread=4)
    want = quantization.group_quant(x, 64, scale_layout="column_major", min_amax=1e-10)
    assert_same_quantized(ops.group_quant(x, 64, scale_layout="column_major"), want)
    weight = torch.ones(128, device="cuda", dtype=torch.bfloat16)
    got = ops.rms_norm(x, weight, EPS)
    assert torch.equal(got[-5:], ops.rms_norm(x[-5:], weight, EPS))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(ops) -> None:
    cols = 8192
    rows = 2**31 // cols + 77
    x = torch.empty(rows, cols, device="cuda", dtype=torch.bfloat16)
    x.view(torch.int16).random_(0x3C00, 0x4100)
    weight = torch.ones(cols, device="cuda", dtype=torch.bfloat16)
    for layout in SCALE_LAYOUTS:
        whole = ops.group_quant(x, 128, scale_layout=layout)
        part = ops.group_quant(x[-100:], 128, scale_layout="row_major")
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[-100:].contiguous().view(torch.uint8), b.view(torch.uint8))
        del whole
    for name, op in {
        "silu_mul": lambda t: ops.silu_mul_group_quant(t, t, 128),
        "norm": lambda t: ops.rms_norm_group_quant(t, weight, EPS, 128),
    }.items():
        whole, part = op(x), op(x[-100:])
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[-100:].view(torch.uint8), b.view(torch.uint8)), name
        del whole
    half = x[:, : cols // 2]  # the same offsets through the scalar path
    odd = torch.as_strided(x.view(-1), half.shape, half.stride(), 1)
    whole, part = ops.group_quant(odd, 128), ops.group_quant(odd[-100:].clone(), 128)
    assert torch.equal(whole[0][-100:].view(torch.uint8), part[0].view(torch.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_more_than_2_to_the_31_threads(ops, layout: str) -> None:
    """The numbers of the threads need 64 bits. The rows are one row: 2^34 elements would not fit."""
    row = randn(1, 8192, dtype=torch.bfloat16)
    codes, scale = ops.group_quant(row.expand(2**21 + 5, 8192), 128, scale_layout=layout)
    want = quantization.group_quant(row, 128, scale_layout="row_major", min_amax=1e-10)
    for at in (0, 2**20, 2**21 - 1, 2**21 + 4):
        assert torch.equal(codes[at].view(torch.uint8), want[0][0].view(torch.uint8))
    assert bool((scale == want[1]).all())


def test_current_stream_and_graph(ops) -> None:
    x = randn(64, 1024, dtype=torch.bfloat16)
    want = ops.group_quant(x, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails unless the launch goes to the capturing stream
        got = ops.group_quant(x, 128)
    x.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got[1], want[1] * 2)


def test_device_of_the_tensor(ops) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = randn(4, 256, dtype=torch.bfloat16)
    got = ops.group_quant(x.to("cuda:1"), 128)
    assert got[0].device == torch.device("cuda:1")
    assert_same_quantized(tuple(t.to("cuda:0") for t in got), ops.group_quant(x, 128))
    assert torch.cuda.current_device() == 0


X = {"device": "cuda", "dtype": torch.bfloat16}
BAD = {
    "must be on a CUDA device": lambda ops: ops.rms_norm(
        torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(8, **X), EPS
    ),
    "on the device of": lambda ops: ops.rms_norm(
        torch.ones(2, 8, **X), torch.ones(8, dtype=torch.bfloat16), EPS
    ),
    "group_size": lambda ops: ops.group_quant(torch.ones(2, 256, **X), 16),
    "dtype must": lambda ops: ops.group_quant(torch.ones(2, 128, **X), 128, dtype=torch.uint8),
    "scale_format must": lambda ops: ops.token_quant(
        torch.ones(2, 128, **X), scale_format="ue8m0_packed"
    ),
    "for scale_format 'ue8m0_packed'": lambda ops: ops.group_quant(
        torch.ones(2, 128, **X), 128, scale_format="ue8m0_packed"
    ),
    "scale_mode must": lambda ops: ops.token_quant(torch.ones(2, 128, **X), scale_mode="log"),
    "code_mode must": lambda ops: ops.tensor_quant(torch.ones(2, 128, **X), code_mode="log"),
    "scale must be float32": lambda ops: ops.tensor_quant_static(
        torch.ones(2, 128, **X), torch.ones(2, device="cuda")
    ),
    "min_scale must": lambda ops: ops.token_quant(torch.ones(2, 128, **X), min_scale=-1.0),
    "multiple of group_size": lambda ops: ops.group_quant(torch.ones(2, 100, **X), 128),
    "scale_layout": lambda ops: ops.group_quant(torch.ones(2, 128, **X), 128, scale_layout="row"),
    "min_amax": lambda ops: ops.group_quant(torch.ones(2, 128, **X), 128, min_amax=-1.0),
    "bfloat16 or float16": lambda ops: ops.group_quant(torch.ones(2, 128, device="cuda"), 128),
    "shape of gate": lambda ops: ops.silu_mul(torch.ones(2, 8, **X), torch.ones(2, 9, **X)),
    "dtype of gate": lambda ops: ops.silu_mul(torch.ones(2, 8, **X), torch.ones(2, 8, **X).half()),
    "weight must be contiguous": lambda ops: ops.rms_norm(
        torch.ones(2, 8, **X), torch.ones(9, **X), EPS
    ),
    "weight_mode must": lambda ops: ops.rms_norm(
        torch.ones(2, 8, **X), torch.ones(8, **X), EPS, weight_mode="gemma"
    ),
    "'rounded'": lambda ops: ops.rms_norm(torch.ones(2, 8, **X), torch.ones(8, device="cuda"), EPS),
    "shape of x": lambda ops: ops.add_rms_norm(
        torch.ones(2, 8, **X), torch.ones(1, 8, **X), torch.ones(8, **X), EPS
    ),
}


@pytest.mark.parametrize("words", BAD)
def test_bad_arguments(ops, words: str) -> None:
    with pytest.raises((ValueError, RuntimeError), match=words):
        BAD[words](ops)


def test_schemas_are_those_of_the_ops(ops) -> None:
    for name, op in library.ops().items():
        if hasattr(ops, name):
            ours = str(getattr(ops, name).default._schema)
            assert ours == str(op.overload._schema).replace("custom_ops::", "custom_ops_cuda::")


# ---- every scheme, every pair ---------------------------------------------------------------------------

MODES = list(itertools.product(CODE_DTYPES, SCALE_MODES, CODE_MODES))
# A row in a part of a warp, in a warp, in a block; odd; hidden 128 x 33; past what registers hold.
COLS = (1, 7, 33, 127, 128, 384, 1000, 2048, 4224, 5120, 7168, 14336, 16385, 40001)


def rest_of(scheme: str, group_size: int = 128) -> tuple:
    """The positional arguments of a scheme after what it quantizes."""
    given = torch.tensor([0.0173], device="cuda")
    return {"group_quant": (group_size,), "tensor_quant_static": (given,)}.get(scheme, ())


def inputs_of(producer: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> tuple:
    """The arguments of a producer: rows whose sizes differ by powers of two, halves of one tensor."""
    if producer in NORMS:
        rows = [randn(*shape, dtype=dtype, spread=2) for _ in range(1 + (producer != "rms_norm"))]
        return (*rows, norm_weight(shape[-1], dtype, "rounded", False), EPS)
    packed = randn(*shape[:-1], 2 * shape[-1], dtype=dtype, spread=2)
    if producer == "clamped_swiglu":
        return packed[..., ::2], packed[..., 1::2], 1.702, 7.0
    return packed.chunk(2, -1)


@pytest.mark.parametrize(("codes", "scale_mode", "code_mode"), MODES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_is_bitwise(ops, scheme: str, codes, scale_mode: str, code_mode: str) -> None:
    run = kernel(scheme, "cuda")
    dynamic = scheme != "tensor_quant_static"
    for rows, cols, dtype in itertools.product((1, 5, 700), COLS, DTYPES):
        if scheme == "group_quant" and cols % 128:
            continue
        x = with_special(randn(rows, cols, dtype=dtype, spread=8))
        x = randn(rows, cols, dtype=dtype, spread=8) if scheme == "tensor_quant" else x
        options = {"dtype": codes, "code_mode": code_mode}
        for bounds in ((0.0, 0.0), (1e-10, 1e-5)) if dynamic else ((0, 0),):
            if dynamic:
                options |= {"scale_mode": scale_mode, "min_amax": bounds[0], "min_scale": bounds[1]}
            rest = rest_of(scheme, (32, 64, 128)[cols // 128 % 3])
            assert_same_bits(run(x, *rest, **options), reference(scheme, x, *rest, **options))


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


@pytest.mark.parametrize("scheme", [*SCHEMES, ASYMMETRIC])
def test_schemes_of_other_shapes_and_addresses(ops, scheme: str) -> None:
    run = kernel(scheme, "cuda")
    base = randn(6, 5, 4, 256, dtype=torch.bfloat16, spread=4)
    tensors = [base, base.transpose(0, 2), base[:, ::2], base[::2, :, 1], base[0, 0, 0]]
    tensors += [base[:1, :1], base[0, 0, :1].expand(7, 256), base.flatten(0, 2)]
    tensors += [base.transpose(-1, -2)[..., :1].expand(6, 5, 256, 128), base[..., 1:129]]
    tensors += [
        *layouts(base).values(),
        base[..., ::2],
        base.permute(2, 1, 0, 3),
    ]
    for x in tensors:
        want = reference(scheme, x, *rest_of(scheme))
        assert_same_bits(run(x, *rest_of(scheme)), want)


@pytest.mark.parametrize("scheme", [*SCHEMES, ASYMMETRIC])
def test_schemes_of_no_elements(ops, scheme: str) -> None:
    """Called as a graph calls it, with no check in Python before it."""
    kernel(scheme, "cuda")
    for shape in ((0, 128), (3, 0, 128)):
        x = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        got = getattr(ops, scheme)(x, *rest_of(scheme))
        assert_same_bits(got, reference(scheme, x, *rest_of(scheme)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("producer", "scheme"), PAIRS)
def test_a_pair_is_the_composition(ops, producer: str, scheme: str, dtype: torch.dtype) -> None:
    """Bit for bit that of its own producer; and of eager's but for what a float32 step of an exp or a mean moves."""
    run, produce = kernel(f"{producer}_{scheme}", "cuda"), kernel(producer, "cuda")
    for (rows, cols), codes in itertools.product(
        ((1, 128), (3, 384), (129, 4224), (1031, 2048), (700, 7168), (5, 16384), (3, 20480)),
        CODE_DTYPES,
    ):
        inputs = inputs_of(producer, rows, cols, dtype=dtype)
        for group_size in GROUP_SIZES if scheme == "group_quant" else (128,):
            rest = rest_of(scheme, group_size)
            options = {} if scheme == ASYMMETRIC else {"dtype": codes}
            got = outputs(run(*inputs, *rest, **options))
            values, *residual = outputs(produce(*inputs))
            want = outputs(reference(scheme, values, *rest, **options))
            assert_same_bits(got, (*want, *residual))


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


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [*SCHEMES, ASYMMETRIC])
def test_schemes_of_more_than_2_to_the_31_elements(ops, scheme: str) -> None:
    """2^31 + 8192 elements: the last row lies past the reach of 32-bit offsets."""
    run = kernel(scheme, "cuda")
    cols = 8192
    x = torch.empty(2**31 // cols + 1, cols, device="cuda", dtype=torch.bfloat16)
    x.view(torch.int16).random_(0x3C00, 0x4100)
    if scheme == "tensor_quant":
        x[-1, -1] = 100.0  # the largest of all, and the last
    got = [t[-1:] if t.numel() > 1 else t for t in outputs(run(x, *rest_of(scheme)))]
    want = outputs(reference(scheme, x[-1:], *rest_of(scheme)))
    assert_same_bits(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", CODE_DTYPES)
def test_blocks_of_more_than_2_to_the_31_elements(ops, dtype: torch.dtype) -> None:
    """The last row is a block row of its own, as 2^31 elements are a whole number of them."""
    run = kernel("block_quant", "cuda")
    cols = 8192
    x = torch.empty(2**31 // cols + 1, cols, device="cuda", dtype=torch.bfloat16)
    x.view(torch.int16).random_(0x3C00, 0x4100)
    got = [t[-1:] for t in outputs(run(x, dtype=dtype))]
    assert_same_bits(got, outputs(reference("block_quant", x[-1:].clone(), dtype=dtype)))
    odd = torch.as_strided(x.view(-1), (x.shape[0], cols - 1), x.stride(), 1)  # no vectors
    got = [t[-1:] for t in outputs(run(odd, dtype=dtype))]
    assert_same_bits(got, outputs(reference("block_quant", odd[-1:].clone(), dtype=dtype)))


@pytest.mark.slow
@pytest.mark.parametrize("producer", GATES)
def test_gates_of_more_than_2_to_the_31_elements(ops, producer: str) -> None:
    cols = 8192
    x = torch.empty(2**31 // cols + 1, cols, device="cuda", dtype=torch.bfloat16)
    x.view(torch.int16).random_(0x3C00, 0x4100)
    numbers = (1.702, 7.0) if producer == "clamped_swiglu" else ()
    for scheme in ("group_quant", "token_quant", "tensor_quant_static", ASYMMETRIC):
        run = kernel(f"{producer}_{scheme}", "cuda")
        rest = (*numbers, *rest_of(scheme))
        got, want = outputs(run(x, x, *rest)), outputs(run(x[-3:], x[-3:], *rest))
        assert_same_bits([t[-3:].contiguous() for t in got], [t.contiguous() for t in want])
        del got


@pytest.mark.slow
@pytest.mark.parametrize("producer", NORMS)
def test_norms_of_more_than_2_to_the_31_elements(ops, producer: str) -> None:
    cols = 8192
    x = torch.empty(2**31 // cols + 1, cols, device="cuda", dtype=torch.bfloat16)
    x.view(torch.int16).random_(0x3C00, 0x4100)
    weight = torch.ones(cols, device="cuda", dtype=torch.bfloat16)
    for scheme in ("token_quant", "tensor_quant_static", ASYMMETRIC):
        run = kernel(f"{producer}_{scheme}", "cuda")
        args = (*((x, x) if producer == "add_rms_norm" else (x,)), weight, EPS, *rest_of(scheme))
        few = [t[-3:] if isinstance(t, Tensor) and t.dim() == 2 else t for t in args]
        got, want = outputs(run(*args)), outputs(run(*few))
        assert_same_bits([t[-3:] for t in got], want)
        del got


@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
def test_opcheck(ops, layout: str) -> None:
    x = randn(3, 5, 256, dtype=torch.bfloat16)
    weight = torch.ones(256, **X)
    tests = ("test_schema", "test_faketensor")
    quant = {"scale_layout": layout}
    torch.library.opcheck(ops.group_quant.default, (x, 128), quant, test_utils=tests)
    torch.library.opcheck(
        ops.silu_mul_group_quant.default, (x, x.clone(), 64), quant, test_utils=tests
    )
    arguments = (x, x.clone(), weight, EPS, 128)
    torch.library.opcheck(ops.add_rms_norm_group_quant.default, arguments, quant, test_utils=tests)
