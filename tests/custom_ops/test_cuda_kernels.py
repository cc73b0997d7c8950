"""The CUDA C++ kernels against the references, on a GPU.

Group quantization equals its reference bit for bit, and silu_mul does with the expf of torch's own CUDA build.
What holds a sum may differ from eager by what a float32 rounding does: the flipped codes are counted, and each
is one step away.
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
from custom_ops.scales import SCALE_LAYOUTS

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
    assert flips <= max(2, 1e-4 * got[0].numel())


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
@pytest.mark.parametrize("group_size", [64, 128])
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
@pytest.mark.parametrize("group_size", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_group_quant(ops, dtype: torch.dtype, group_size: int, layout: str) -> None:
    for rows, cols in ((1, 128), (3, 384), (129, 2048), (1031, 2048), (2500, 4096)):
        gate = randn(rows, cols, dtype=dtype, spread=2)
        up = randn(rows, cols, dtype=dtype)
        options = {"scale_layout": layout, "min_amax": 1e-10}
        got = ops.silu_mul_group_quant(gate, up, group_size, **options)
        want = activation.silu_mul_group_quant(gate, up, group_size, **options)
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
@pytest.mark.parametrize("group_size", [64, 128])
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
        want = normalization.rms_norm_group_quant(x, weight, EPS, group_size, **options)
        assert_few_flips(got, want, group_size)
        normed = ops.rms_norm(x, weight, EPS, weight_mode=mode)
        assert_same_quantized(got, ops.group_quant(normed, group_size, **quant))

        got = ops.add_rms_norm_group_quant(x, residual, weight, EPS, group_size, **options)
        want = normalization.add_rms_norm_group_quant(
            x, residual, weight, EPS, group_size, **options
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
    want = normalization.rms_norm_group_quant(x, weight, EPS, 128, weight_mode="rounded", **options)
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
    "group_size": lambda ops: ops.group_quant(torch.ones(2, 256, **X), 32),
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
