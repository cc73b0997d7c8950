"""The CUDA C++ kernels of few elements, which take a way of their own: gates alone, and quantization.

The same values one element further in memory are misaligned, and take the other way, as do more elements than few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from custom_ops import library
from custom_ops.scales import CODE_DTYPES, CODE_MODES
from tests.custom_ops.helpers import assert_same_bits
from tests.custom_ops.schemes import GATES, kernel, scale_modes

pytestmark = pytest.mark.gpu

SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 448.0, -1.0, 6e4)
NUMBERS = {"clamped_swiglu": (1.702, 7.0)}
# around where a thread takes more elements, and where the way ends: csrc/activations.cuh, csrc/tensor_quant.cu
EDGES = (2**17, 2**18, 2**20, 2**22)
dtypes = st.sampled_from((torch.bfloat16, torch.float16))
scales = st.sampled_from(
    (
        0.0173,
        1.0,
        3e38,
        2.0**125,
        2.0**126,
        2.0**-69,
        2.0**-70,
        1e-40,
        0.0,
        math.inf,
        math.nan,
        -0.5,
    )
)


@pytest.fixture(scope="module", autouse=True)
def loaded() -> Iterator[None]:
    library.load_cuda()
    yield
    torch.cuda.empty_cache()


def values(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    """Normal values with special ones among them."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(shape, device="cuda", generator=generator).to(dtype)
    flat = x.view(-1)
    at = torch.randint(
        0, flat.numel(), (flat.numel() // 50 + 1,), device="cuda", generator=generator
    )
    flat[at] = torch.tensor(SPECIAL, device="cuda").to(dtype)[at % len(SPECIAL)]
    return x


def shifted(x: Tensor) -> Tensor:
    """The same values, misaligned."""
    return torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view(x.shape).copy_(x)


def zero_of(value: int | None, wide: bool) -> Tensor | None:
    """A zero point as int32, where it is wide or no int8."""
    if value is None:
        return None
    dtype = torch.int32 if wide or not -128 <= value <= 127 else torch.int8
    return torch.tensor([value], dtype=dtype, device="cuda")


def reference(name: str, *args: Any, **options: Any) -> Any:
    op = library.ops()[name]
    return op.reference(*args, **op.defaults | options)


@given(
    rows=st.sampled_from((1, 2, 16, 257)),
    cols=st.sampled_from((1, 7, 8, 24, 520, 2048, 7168)),
    scale=scales,
    dtype=dtypes,
    codes=st.sampled_from(CODE_DTYPES),
    code_mode=st.sampled_from(CODE_MODES),
    seed=st.integers(0, 99),
)
def test_a_given_scale(rows, cols, scale, dtype, codes, code_mode, seed) -> None:
    x = values(seed, rows, cols, dtype=dtype)
    given_scale = torch.tensor([scale], device="cuda")
    options = {"dtype": codes, "code_mode": code_mode}
    want = reference("tensor_quant_static", x, given_scale, **options)
    run = kernel("tensor_quant_static", "cuda")
    for way in (x, shifted(x)):
        assert_same_bits(run(way, given_scale, **options), want)


@given(
    rows=st.sampled_from((1, 2, 16, 257)),
    cols=st.sampled_from((1, 7, 8, 24, 520, 2048, 7168)),
    scale=scales,
    zero_point=st.sampled_from((None, 0, -7, 127, -128, 1000)),
    wide=st.booleans(),
    dtype=dtypes,
    code_mode=st.sampled_from(CODE_MODES),
    seed=st.integers(0, 99),
)
def test_a_given_zero_point(rows, cols, scale, zero_point, wide, dtype, code_mode, seed) -> None:
    x = values(seed, rows, cols, dtype=dtype)
    rest = (torch.tensor([scale], device="cuda"), zero_of(zero_point, wide))
    want = reference("tensor_quant_static_asymmetric", x, *rest, code_mode=code_mode)
    run = kernel("tensor_quant_static_asymmetric", "cuda")
    for way in (x, shifted(x)):
        assert_same_bits(run(way, *rest, code_mode=code_mode), want)


@given(
    rows=st.sampled_from((1, 2, 3, 16, 64, 256, 257)),
    cols=st.sampled_from((8, 16, 24, 104, 128, 520, 1000, 1024, 2048, 8192, 8200)),
    how=st.sampled_from([(codes, mode) for codes in CODE_DTYPES for mode in scale_modes(codes)]),
    min_amax=st.sampled_from((0.0, 1e-10)),
    dtype=dtypes,
    seed=st.integers(0, 99),
)
def test_few_tokens(rows, cols, how, min_amax, dtype, seed) -> None:
    """Rows of a vector a thread, several to a warp or several warps to a row; and rows too many or too long for it."""
    x = values(seed, rows, cols, dtype=dtype)
    x[::2] = x[::2].nan_to_num(0.0, 1.0, -1.0)  # a special value makes a whole row special
    options = {"scale_mode": how[1], "min_amax": min_amax, "dtype": how[0]}
    want = reference("token_quant", x, **options)
    run = kernel("token_quant", "cuda")
    for way in (x, shifted(x)):
        assert_same_bits(run(way, **options), want)


@given(
    rows=st.sampled_from((1, 2, 16, 64, 129, 1031)),
    cols=st.sampled_from((128, 384, 1024, 2048, 4224)),
    layout=st.sampled_from(("row_major", "column_major", "column_major_tma")),
    dtype=dtypes,
    codes=st.sampled_from(CODE_DTYPES),
    seed=st.integers(0, 99),
)
def test_groups_by_the_usual_rules(rows, cols, layout, dtype, codes, seed) -> None:
    """float8 and int8 have kernels that know their rule; one with a bound on the scale is any rule's."""
    x = values(seed, rows, cols, dtype=dtype)
    run = kernel("group_quant", "cuda")
    for min_scale in (0.0, 1e-6):
        options = {"scale_layout": layout, "dtype": codes, "min_scale": min_scale}
        want = reference("group_quant", x, 128, **options)
        for way in (x, shifted(x)):
            assert_same_bits(run(way, 128, **options), want)


@pytest.mark.parametrize("codes", CODE_DTYPES)
@pytest.mark.parametrize("code_mode", ["divide", "reciprocal"])
def test_every_value_by_a_given_scale(codes, code_mode) -> None:
    """All 65536 of both dtypes, by scales that saturate, that underflow, and between."""
    run = kernel("tensor_quant_static", "cuda")
    bits = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype).view(16, -1)
        for scale in (0.0173, 1.0, 7.0, 1e-20, 2.0**-69, 1e30):
            given_scale = torch.tensor([scale], device="cuda")
            options = {"dtype": codes, "code_mode": code_mode}
            want = reference("tensor_quant_static", x, given_scale, **options)
            assert_same_bits(run(x, given_scale, **options), want)


@pytest.mark.parametrize("code_mode", ["divide", "reciprocal"])
@pytest.mark.parametrize("zero_point", [None, -7, 1000])
def test_every_value_by_a_given_zero_point(zero_point, code_mode) -> None:
    run = kernel("tensor_quant_static_asymmetric", "cuda")
    bits = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype).view(16, -1)
        for scale in (0.0173, 1.0, 7.0, 1e-20, 2.0**-69, 1e30):
            rest = (torch.tensor([scale], device="cuda"), zero_of(zero_point, wide=True))
            want = reference("tensor_quant_static_asymmetric", x, *rest, code_mode=code_mode)
            assert_same_bits(run(x, *rest, code_mode=code_mode), want)
            many = x.repeat(20, 1)  # beyond the flat kernels
            want = reference("tensor_quant_static_asymmetric", many, *rest, code_mode=code_mode)
            assert_same_bits(run(many, *rest, code_mode=code_mode), want)


@pytest.mark.parametrize("elements", [edge + more for edge in EDGES for more in (-8, 0, 8)])
def test_where_the_ways_part(elements: int) -> None:
    x = values(0, 1, elements, dtype=torch.bfloat16)
    given_scale = torch.tensor([0.0173], device="cuda")
    want = reference("tensor_quant_static", x, given_scale)
    assert_same_bits(kernel("tensor_quant_static", "cuda")(x, given_scale), want)
    for gate in GATES:
        run, numbers = kernel(gate, "cuda"), NUMBERS.get(gate, ())
        up = x.flip(-1)
        assert_same_bits(run(x, up, *numbers), run(shifted(x), shifted(up), *numbers))
        fused = kernel(f"{gate}_tensor_quant_static", "cuda")
        want = reference("tensor_quant_static", run(x, up, *numbers), given_scale)
        assert_same_bits(fused(x, up, *numbers, given_scale), want)
        rest = (given_scale, zero_of(-7, wide=False))
        fused = kernel(f"{gate}_tensor_quant_static_asymmetric", "cuda")
        want = reference("tensor_quant_static_asymmetric", run(x, up, *numbers), *rest)
        assert_same_bits(fused(x, up, *numbers, *rest), want)


@pytest.mark.parametrize("gate", GATES)
@given(
    rows=st.sampled_from((1, 3, 64)),
    cols=st.sampled_from((8, 24, 512, 520, 2880)),
    layout=st.sampled_from(("apart", "halves", "interleaved", "expanded", "sliced", "odd pitch")),
    dtype=dtypes,
    seed=st.integers(0, 99),
)
def test_gates_of_any_layout(gate, rows, cols, layout, dtype, seed) -> None:
    run, numbers = kernel(gate, "cuda"), NUMBERS.get(gate, ())
    a, b = (values(seed + n, rows, cols, dtype=dtype) for n in range(2))
    if layout == "halves":
        a, b = torch.cat([a, b], -1).chunk(2, -1)
    elif layout == "interleaved":
        mixed = torch.stack([a, b], -1).flatten(-2)
        a, b = mixed[..., ::2], mixed[..., 1::2]
    elif layout == "expanded":
        a, b = (each[:1].expand(rows, cols) for each in (a, b))
    elif layout == "sliced":  # rows of different pitch
        a = torch.cat([a, a, a], -1)[:, cols : 2 * cols]
    elif layout == "odd pitch":
        a, b = (torch.cat([each, each[:, :3]], -1)[:, :cols] for each in (a, b))
    want = run(shifted(a), shifted(b), *numbers)
    assert_same_bits(run(a, b, *numbers), want)
    given_scale = torch.tensor([0.0173], device="cuda")
    fused = kernel(f"{gate}_tensor_quant_static", "cuda")
    for options in ({}, {"dtype": torch.int8}, {"code_mode": "reciprocal"}):
        codes = reference("tensor_quant_static", want, given_scale, **options)
        assert_same_bits(fused(a, b, *numbers, given_scale, **options), codes)
    rest = (given_scale, zero_of(-7, wide=False))
    fused = kernel(f"{gate}_tensor_quant_static_asymmetric", "cuda")
    for mode in ("divide", "reciprocal", "reciprocal_input"):
        codes = reference("tensor_quant_static_asymmetric", want, *rest, code_mode=mode)
        assert_same_bits(fused(a, b, *numbers, *rest, code_mode=mode), codes)


@pytest.mark.parametrize("gate", GATES)
def test_more_rows_than_a_grid_has_in_y(gate) -> None:
    run, numbers = kernel(gate, "cuda"), NUMBERS.get(gate, ())
    for rows in (65535, 65536):
        a, b = (values(n, rows, 16, dtype=torch.bfloat16) for n in range(2))
        assert_same_bits(run(a, b, *numbers), run(shifted(a), shifted(b), *numbers))


def test_rows_far_apart() -> None:
    """Whose offsets do not fit in 31 bits."""
    wide = torch.zeros(3, 2**30, device="cuda", dtype=torch.bfloat16)
    a = wide[:, :64].normal_()
    run = kernel("silu_mul", "cuda")
    assert_same_bits(run(a, a), run(a.contiguous(), a.contiguous()))
