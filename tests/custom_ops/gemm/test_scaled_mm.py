"""scaled_mm: against float64, bit for bit where sums are exact, in every shape and stride; who takes what."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import custom_ops
from custom_ops import tables
from custom_ops.gemm import scaled_mm_cublaslt
from custom_ops.gemm.ops import EPILOGUES
from fusion_passes.testing.strategies import fp8_codes, positive_scales, relayouts, token_shapes
from tests.custom_ops.helpers import DEVICE, assert_same_bits, fake_mode, fp8, implementation

reference = implementation("scaled_mm", "reference")
triton = implementation("scaled_mm", "triton")
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8, INT8 = torch.float8_e4m3fn, torch.int8
SIZES = (1, 2, 17, 64, 127, 128, 129, 256, 300)


@st.composite
def int8_codes(draw, shape):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8).to(DEVICE)


@st.composite
def products(draw, dtypes=(FP8, INT8)):
    """Arguments of any shape: scales per tensor, token or channel, of any dtype, with a bias or without."""
    tokens = draw(token_shapes(max_tokens=67))
    n, k = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    codes = int8_codes if draw(st.sampled_from(dtypes)) == INT8 else lambda s: fp8_codes(s, DEVICE)
    a_scale = draw(positive_scales(draw(st.sampled_from(((), (1,), (*tokens, 1)))), DEVICE))
    b_scale = draw(positive_scales(draw(st.sampled_from(((1,), (n,), (n, 1)))), DEVICE))
    out_dtype = draw(st.sampled_from(OUT_DTYPES))
    bias = draw(st.sampled_from((None, out_dtype, torch.float32)))
    bias = None if bias is None else draw(positive_scales((n,), DEVICE)).sub(1).to(bias)
    kwargs = {"out_dtype": out_dtype, "epilogue": draw(st.sampled_from(EPILOGUES))}
    scale_dtype = draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16)))
    args = (draw(codes((*tokens, k))), a_scale.to(scale_dtype), draw(codes((n, k))), b_scale, bias)
    return args, kwargs


def exact_and_magnitude(a, a_scale, b, b_scale, bias) -> tuple[Tensor, Tensor]:
    """The result in float64, and the same of the magnitudes."""
    rows = a_scale.double() if a_scale.numel() != 1 else a_scale.double().reshape(())
    left, right = a.double(), b.double() * b_scale.double().reshape(-1, 1)
    more = 0.0 if bias is None else bias.double()
    magnitude = left.abs() @ right.abs().t() * rows
    return left @ right.t() * rows + more, magnitude + (
        0.0 if bias is None else bias.double().abs()
    )


def assert_close(out, args, roundoff, roundings=1):
    exact, magnitude = exact_and_magnitude(*args)
    info = torch.finfo(out.dtype)
    # what each rounding moves a value by, before the bias and after
    steps = 0.51 * roundings * info.eps * (exact.abs() + (magnitude if roundings > 1 else 0.0))
    bad = (out.double() - exact).abs() > roundoff * magnitude + steps + info.smallest_normal
    largest = magnitude
    if roundings > 1:  # the sum and its first product are values of out_dtype too, and may overflow
        a, a_scale, b, b_scale, _ = args
        one = torch.ones_like(b_scale)
        for scale in (torch.ones_like(a_scale), a_scale):
            largest = torch.maximum(largest, exact_and_magnitude(a, scale, b, one, None)[1])
    assert not (bad & (largest < 0.9 * info.max)).any()


# float32 sums of up to 300 products, and three roundings to float32.
FLOAT32 = 303 * 2.0**-24
# As for block_scaled_mm: Hopper keeps about 14 bits of the largest of 128 products.
ROUNDOFF = FLOAT32 if DEVICE == "cpu" else 128 * 2.0**-14


@given(products())
def test_reference_against_float64(call):
    args, kwargs = call
    out = reference(*args, **kwargs)
    assert out.dtype == kwargs["out_dtype"]
    assert out.is_contiguous()
    assert_close(out, args, FLOAT32, 1 if kwargs["epilogue"] == "float32" else 4)


@given(products())
def test_triton_against_float64(call):
    args, kwargs = call
    out = triton(*args, **kwargs)
    assert_close(out, args, ROUNDOFF, 1 if kwargs["epilogue"] == "float32" else 4)


@given(products(dtypes=(INT8,)))
def test_int8_has_the_same_bits_in_triton_and_the_reference(call):
    args, kwargs = call
    assert_same_bits(triton(*args, **kwargs), reference(*args, **kwargs))


@given(st.data(), products())
def test_triton_takes_any_strides(data, call):
    args, kwargs = call
    moved = [
        t if t is None or t.dim() == 0 or t.dtype == INT8 else data.draw(relayouts(t)) for t in args
    ]
    assert_same_bits(triton(*moved, **kwargs), triton(*args, **kwargs))


@pytest.mark.parametrize("step", [1, 2])
def test_triton_takes_strided_int8(step):
    wide = torch.randint(-128, 128, (40, 300), dtype=torch.int8, device=DEVICE)
    a, b = wide[:7, 3 : 3 + 64 * step : step], wide[9:, 5 : 5 + 64 * step : step]
    scales = torch.rand(7, 1, device=DEVICE), torch.rand(31, device=DEVICE)
    expected = reference(a.contiguous(), scales[0], b.contiguous(), scales[1])
    assert_same_bits(triton(a, scales[0], b, scales[1]), expected)


@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_every_tile_computes_the_same(dtype):
    from custom_ops.gemm.scaled_mm_triton import TILES, scaled_mm

    torch.manual_seed(0)
    a, b = (
        (torch.randn(s, device=DEVICE) * 40).clamp(-127, 127).to(dtype)
        for s in ((70, 272), (50, 272))
    )
    args = a, torch.rand(70, 1, device=DEVICE), b, torch.rand(50, device=DEVICE), None
    expected = reference(*args)
    for name in TILES:
        out = scaled_mm(*args, out_dtype=torch.bfloat16, epilogue="float32", tile=name)
        if dtype == INT8:
            assert_same_bits(out, expected)
        else:
            assert_close(out, args, FLOAT32 if DEVICE == "cpu" else 2.0**-11)


@given(products(dtypes=(INT8,)))
def test_the_epilogue_of_cublaslt_has_the_bits_of_the_reference(call):
    """What follows torch._int_mm, on sums that are exact however they are made."""
    from custom_ops.gemm.scaled_mm_triton import scale_sums

    (a, *rest), kwargs = call
    if a.numel() == 0:
        return
    rows = a.reshape(-1, a.shape[-1])
    sums = (rows.double() @ rest[1].double().t()).int()
    out = scale_sums(sums, rest[0], rest[2], rest[3], **kwargs)
    assert_same_bits(out.view(*a.shape[:-1], -1), reference(a, *rest, **kwargs))


def test_a_row_gives_the_same_bits_in_any_batch():
    a = torch.randint(-128, 128, (131, 384), dtype=torch.int8, device=DEVICE)
    b = torch.randint(-128, 128, (136, 384), dtype=torch.int8, device=DEVICE)
    scale, b_scale = torch.rand(131, 1, device=DEVICE), torch.rand(136, device=DEVICE)
    whole = custom_ops.scaled_mm(a, scale, b, b_scale)
    for start, stop in ((0, 1), (5, 6), (3, 67), (130, 131)):
        part = custom_ops.scaled_mm(a[start:stop], scale[start:stop], b, b_scale)
        assert_same_bits(part, whole[start:stop])


def test_out_dtype_rounds_after_each_step_as_eager_does():
    torch.manual_seed(1)
    a, b = (
        torch.randint(-128, 128, s, dtype=torch.int8, device=DEVICE) for s in ((20, 64), (24, 64))
    )
    for dtype in (torch.bfloat16, torch.float16):
        scale, b_scale = (
            torch.rand(20, 1, device=DEVICE).to(dtype) / 64,
            torch.rand(24, device=DEVICE).to(dtype),
        )
        bias = torch.randn(24, device=DEVICE).to(dtype)
        eager = torch._int_mm(a, b.t()) * scale * b_scale + bias
        for run in (reference, triton):
            out = run(a, scale, b, b_scale, bias, out_dtype=dtype, epilogue="out_dtype")
            assert_same_bits(out, eager)


@pytest.mark.parametrize("dtype", [FP8, INT8])
@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 128), (3, 0, 128), (3, 5, 0), (0, 0, 0)])
def test_empty_operands(dtype, m, n, k):
    a, b = torch.zeros(m, k).to(dtype), torch.zeros(n, k).to(dtype)
    args = [t.to(DEVICE) for t in (a, torch.ones(m, 1), b, torch.ones(n))]
    bias = torch.arange(n, dtype=torch.bfloat16, device=DEVICE)
    for run in (custom_ops.scaled_mm, reference, triton):
        out = run(*args, bias)
        assert out.shape == (m, n)
        assert torch.equal(out, bias.expand(m, n))


def test_nan_and_inf_reach_the_rows_and_columns_that_hold_them_and_no_others():
    a, b = fp8(5, 256, device=DEVICE), fp8(7, 256, device=DEVICE)
    a.view(torch.uint8)[2, 200] = 0x7F
    b.view(torch.uint8)[4, 3] = 0xFF
    scale = torch.ones(5, 1, device=DEVICE)
    scale[1] = float("inf")
    for run in (reference, triton):
        out = run(a, scale, b, torch.ones(7, device=DEVICE))
        expected = torch.zeros(5, 7, dtype=torch.bool, device=DEVICE)
        expected[2], expected[:, 4] = True, True
        assert torch.equal(out.isnan(), expected)
        assert out[1][~expected[1]].isinf().all()


def test_the_largest_int8_sum():
    """(-128)^2 times the largest K is one product short of 2^31."""
    k = 2**17 - 1
    a = torch.full((1, k), -128, dtype=torch.int8, device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    for run in (reference, triton):
        assert run(a, one, a, one, out_dtype=torch.float32).item() == float(k * 2**14)


SAMPLES = {
    "fp8": lambda tokens: (fp8(*tokens, 64), torch.rand(*tokens, 1), fp8(48, 64), torch.rand(48)),
    "fp8 per tensor": lambda tokens: (
        fp8(*tokens, 64),
        torch.rand(()),
        fp8(48, 64),
        torch.rand(1, 1),
    ),
    "int8, bias": lambda tokens: (
        torch.randint(-9, 9, (*tokens, 64), dtype=torch.int8),
        torch.rand(*tokens, 1).bfloat16(),
        torch.randint(-9, 9, (48, 64), dtype=torch.int8),
        torch.rand(48, 1),
        torch.randn(48).bfloat16(),
    ),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample):
    # without test_schema: torch compares inputs with allclose, which has no float8 kernel
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    args = tuple(t.to(DEVICE) for t in SAMPLES[sample]((2, 3)))
    torch.library.opcheck(torch.ops.custom_ops.scaled_mm.default, args, test_utils=checks)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize(
    "tokens", [(), (0,), (1,), (5,), (2, 0), (1, 1), (3, 7), (2, 1, 3)], ids=str
)
def test_fake_and_implementations_give_the_same_strides(sample, tokens):
    args = [t.to(DEVICE) for t in SAMPLES[sample](tokens)]
    real = custom_ops.scaled_mm(*args)
    with fake_mode() as fake:
        faked = custom_ops.scaled_mm(*fake(args))
    for out in (faked, reference(*args), triton(*args)):
        assert (out.shape, out.stride(), out.dtype) == (real.shape, real.stride(), real.dtype)


@pytest.mark.parametrize("sample", SAMPLES)
def test_symbolic_sizes_add_no_guard(sample):
    env = ShapeEnv()
    args = SAMPLES[sample]((6, 5))
    with FakeTensorMode(shape_env=env) as mode:
        fakes = [
            mode.from_tensor(
                t,
                symbolic_context=StatelessSymbolicContext(
                    dynamic_sizes=[DimDynamic.DYNAMIC] * t.dim()
                ),
            )
            for t in args
        ]
        before = len(env.guards)
        custom_ops.scaled_mm(*fakes)
        custom_ops.ops()["scaled_mm"].choose(*fakes)
    assert len(env.guards) == before
    assert not env.deferred_runtime_asserts


def bad_calls() -> dict:
    a, b = fp8(2, 64), fp8(48, 64)
    s, t = torch.rand(2, 1), torch.rand(48)
    i, j = torch.zeros(2, 2**17, dtype=INT8), torch.zeros(48, 2**17, dtype=INT8)
    return {
        "a dtype": ((a.float(), s, b, t), {}, r"a.dtype is torch.float32; accepted: torch.float8_e4m3fn, torch.int8"),
        "b dtype": ((a, s, b.to(INT8), t), {}, r"b.dtype is torch.int8; accepted: torch.float8_e4m3fn"),
        "scale dtype": ((a, s.double(), b, t), {}, r"a_scale.dtype is torch.float64; accepted: torch.float32"),
        "b scale dtype": ((a, s, b, t.int()), {}, r"b_scale.dtype is torch.int32; accepted: torch.float32"),
        "scalar": ((a[0, 0], s, b, t), {}, r"a has no dimension; accepted: \[..., K\]"),
        "b dims": ((a, s, b[0], t), {}, r"b has 1 dimensions; accepted: 2"),
        "b shape": ((a, s, b[:, :32], t), {}, r"b.shape is \(48, 32\); accepted: \(48, 64\)"),
        "a scale": ((a, s[:, 0], b, t), {}, r"a_scale.shape is \(2,\); accepted: \(2, 1\), or one element"),
        "b scale": ((a, s, b, t[None]), {}, r"b_scale.shape is \(1, 48\); accepted: \(48,\), \(48, 1\), or one"),
        "bias shape": ((a, s, b, t, s.bfloat16()), {}, r"bias.shape is \(2, 1\); accepted: \(48,\)"),
        "bias dtype": ((a, s, b, t, t.half()), {}, r"bias.dtype is torch.float16; accepted: torch.bfloat16, torch.f"),
        "out_dtype": ((a, s, b, t), {"out_dtype": FP8}, r"out_dtype is torch.float8_e4m3fn; accepted: torch.bfloat16"),
        "epilogue": ((a, s, b, t), {"epilogue": "bf16"}, r"epilogue is 'bf16'; accepted: float32, out_d"),
        "long sums": ((i, s, j, t), {}, r"K is 131072; accepted for int8: up to 131071"),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_calls())
def test_errors_name_the_argument_and_are_the_same_in_fake_and_kernel(case):
    args, kwargs, message = bad_calls()[case]
    with pytest.raises(ValueError, match=message) as real:
        custom_ops.scaled_mm(*args, **kwargs)
    assert str(real.value).startswith("scaled_mm: ")
    with fake_mode() as fake, pytest.raises(ValueError, match=re.escape(str(real.value))):
        custom_ops.scaled_mm(*fake(args), **kwargs)


def test_devices_must_agree():
    a, b = fp8(2, 64), fp8(48, 64)
    with pytest.raises(ValueError, match="b_scale is on meta; accepted: cpu, as a"):
        custom_ops.scaled_mm(a, torch.rand(2, 1), b, torch.rand(48).to("meta"))


# --- which implementation --------------------------------------------------------------------------------------


def refused(*args, out_dtype=torch.bfloat16, epilogue="float32") -> str:
    return scaled_mm_cublaslt.impossible(*args, out_dtype=out_dtype, epilogue=epilogue) or ""


def test_cublaslt_leaves_what_it_cannot_take():
    """On a CPU the reasons that depend on the arguments alone."""
    a, b, s, t = fp8(32, 64), fp8(48, 64), torch.rand(32, 1), torch.rand(48)
    one = torch.rand(1)
    assert not refused(a, s, b, t)
    assert not refused(a, one, b, one, out_dtype=torch.float16)
    assert "multiples of 16" in refused(a[:, :56], s, b[:, :56], t)
    assert "multiples of 16" in refused(a, s, b[:40], t[:40])
    assert "writes torch.bfloat16" in refused(a, s, b, t, out_dtype=torch.float16)
    assert "float32 scales" in refused(a, s.half(), b, t)
    assert "epilogue" in refused(a, s, b, t, epilogue="out_dtype")
    assert "bias" in refused(a, s, b, t, t)
    assert "nothing to multiply" in refused(a[:0], s[:0], b, t)
    i, j = torch.zeros(32, 64, dtype=INT8), torch.zeros(48, 64, dtype=INT8)
    assert not refused(i, s.half(), j, t, t, epilogue="out_dtype")
    assert "17 tokens" in refused(i[:16], s[:16], j, t)
    assert "multiples of 8" in refused(i[:, :60], s, j[:, :60], t)
    assert "needs a CUDA tensor" in scaled_mm_cublaslt.unavailable(torch.device("cpu"))


ROWS = [
    {"n": 4096, "k": 4096, "m": 16, "implementation": "triton", "tile": "16x32x256"},
    {"n": 4096, "k": 4096, "m": 4096, "implementation": "cublaslt", "tile": "128x256x128"},
    {"n": 1024, "k": 4096, "m": 16, "implementation": "cublaslt", "tile": "16x64x256"},
]


@pytest.fixture
def table(monkeypatch):
    shipped = {90: {"arch": "sm_90", "scaled_mm": {"int8 token": ROWS}}}
    monkeypatch.setattr(tables, "load", lambda: shipped)
    tables.best.cache_clear()
    yield
    tables.best.cache_clear()


@pytest.mark.parametrize(
    ("m", "n", "k", "expected"),
    [
        (1, 4096, 4096, ("triton", "16x32x256")),
        (16, 4096, 4096, ("triton", "16x32x256")),
        (17, 4096, 4096, ("cublaslt", "128x256x128")),
        (10**6, 4096, 4096, ("cublaslt", "128x256x128")),
        (1, 6144, 4096, ("triton", "16x32x256")),
        (1, 1536, 4096, ("cublaslt", "16x64x256")),
    ],
)
def test_a_table_answers_for_what_is_nearest(table, m, n, k, expected):
    best = tables.best("scaled_mm", "int8 token", (9, 0), m, n, k)
    assert (best.implementation, best.tile) == expected


@pytest.mark.usefixtures("table")
def test_an_architecture_without_a_table_takes_the_nearest_older_one_or_the_oldest():
    for capability in ((9, 0), (10, 0), (12, 0), (8, 0)):
        assert tables.nearest(capability)["arch"] == "sm_90"
    assert tables.best("scaled_mm", "float8_e4m3fn token", (9, 0), 1, 4096, 4096) is None


def test_the_shipped_tables_name_what_exists():
    from custom_ops.gemm.scaled_mm_triton import TILES

    if not tables.load():
        pytest.skip(
            "needs a table: python -m bench run --suite gemm and python -m bench tune on a GPU"
        )
    rows = [
        row
        for table in tables.load().values()
        for kind in table["scaled_mm"].values()
        for row in kind
    ]
    assert {row["implementation"] for row in rows} <= {"cublaslt", "triton"}
    assert {row["tile"] for row in rows} <= TILES.keys()


def test_a_tile_takes_as_few_stages_as_the_shared_memory_asks_for():
    from custom_ops.gemm.scaled_mm_triton import TILES

    tile = TILES["128x256x128"]
    assert tile.within(227 * 1024) == tile
    assert tile.within(99 * 1024).stages == 2
    assert tile.within(1).stages == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP8, INT8])
@pytest.mark.parametrize("scales", ["tensor", "token", "mixed"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 4096, 4096), (17, 6144, 4096), (300, 4096, 14336), (1024, 48, 64)]
)
def test_cublaslt_and_triton_against_float64(dtype, scales, bias, m, n, k):
    torch.manual_seed(m + n + k)
    a, b = (
        (torch.randn(s, device="cuda") * 30).clamp(-127, 127).to(dtype) for s in ((m, k), (n, k))
    )
    a_scale = torch.rand((m, 1) if scales != "tensor" else (1,), device="cuda") + 0.1
    b_scale = torch.rand((n,) if scales == "token" else (1,), device="cuda") + 0.1
    args = a, a_scale, b, b_scale, torch.randn(n, device="cuda").bfloat16() if bias else None
    kwargs = {"out_dtype": torch.bfloat16, "epilogue": "float32"}
    roundoff = FLOAT32 if dtype == INT8 else 2.0**-11
    ours = triton(*args, **kwargs)
    assert_close(ours, args, roundoff)
    if reason := scaled_mm_cublaslt.impossible(*args, **kwargs):
        assert dtype == INT8, reason
        assert m < 17, reason
        return
    theirs = implementation("scaled_mm", "cublaslt")(*args, **kwargs)
    assert_close(theirs, args, roundoff)
    if dtype == INT8:
        assert_same_bits(theirs, ours)


@pytest.mark.gpu
def test_cublaslt_takes_codes_off_the_boundary():
    store = torch.randn(33 * 64 + 1, device="cuda").to(FP8)
    a = store[1:].view(33, 64)
    args = (
        a,
        torch.rand(33, 1, device="cuda"),
        fp8(48, 64, device="cuda"),
        torch.rand(48, device="cuda"),
    )
    cublaslt = implementation("scaled_mm", "cublaslt")
    assert_same_bits(cublaslt(*args), cublaslt(a.clone(), *args[1:]))


@pytest.mark.gpu
def test_more_than_2_31_elements():
    a = torch.zeros(2**18 + 1, 128, device="cuda", dtype=INT8)
    a[-1] = torch.randint(-128, 128, (128,))
    b, b_scale = (
        torch.randint(-128, 128, (8192, 128), dtype=INT8, device="cuda"),
        torch.rand(8192, device="cuda"),
    )
    a_scale = torch.rand(2**18 + 1, 1, device="cuda")
    expected = reference(a[-1:], a_scale[-1:], b, b_scale)
    for name in ("triton", "cublaslt"):
        out = implementation("scaled_mm", name)(a, a_scale, b, b_scale)
        assert_same_bits(out[-1:].clone(), expected)
        assert not out[:-1].any()
        del out
