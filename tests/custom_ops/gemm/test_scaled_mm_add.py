"""scaled_mm_add: against float64 with scales per row and per tensor, whatever its strides; what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import custom_ops
from fusion_passes.testing.strategies import fp8_codes, positive_scales, relayouts, token_shapes
from tests.custom_ops.helpers import DEVICE, assert_same_bits, fake_mode, fp8, implementation

reference = implementation("scaled_mm_add", "reference")
FP8 = torch.float8_e4m3fn


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(torch.bfloat16)


@st.composite
def sums(draw, sizes=(1, 16, 17, 64, 128, 144)):
    """Arguments of any shape, with scales per row or per tensor."""
    tokens = draw(token_shapes(max_tokens=67))
    n, k = draw(st.sampled_from(sizes)), draw(st.sampled_from(sizes))
    per_tensor = draw(st.booleans())
    shapes = (
        (st.sampled_from(((), (1,), (1, 1))),) * 2
        if per_tensor
        else (st.just((*tokens, 1)), st.sampled_from(((n,), (n, 1))))
    )
    a_scale, b_scale = (draw(positive_scales(draw(shape), DEVICE)) for shape in shapes)
    seed = draw(st.integers(0, 99))
    residual = torch.randn(*tokens, n, generator=torch.Generator().manual_seed(seed))
    residual = residual.to(torch.bfloat16).to(DEVICE)
    codes = draw(fp8_codes((*tokens, k), DEVICE)), draw(fp8_codes((n, k), DEVICE))
    return codes[0], a_scale, codes[1], b_scale, residual


def assert_close(out: Tensor, args: tuple[Tensor, ...], roundoff: float) -> None:
    """Within the sum's error and one rounding to bfloat16 of float64."""
    a, a_scale, b, b_scale, residual = args
    rows = a_scale.double() if a_scale.numel() != 1 else a_scale.double().reshape(())
    left, right = a.double(), b.double() * b_scale.double().reshape(-1, 1)
    exact = left @ right.t() * rows + residual.double()
    magnitude = left.abs() @ right.abs().t() * rows + residual.double().abs()
    info = torch.finfo(torch.bfloat16)
    bound = roundoff * magnitude + 0.51 * info.eps * exact.abs() + info.smallest_normal
    bad = ~((out.double() - exact).abs() <= bound)
    assert not (bad & (magnitude < 0.9 * info.max)).any()


# float32 sums of up to 144 products, and four roundings to float32
FLOAT32 = 148 * 2.0**-24
HOPPER = 128 * 2.0**-14
"""Its tensor cores keep about 14 bits of the largest of 128 products."""


@given(sums())
def test_reference_against_float64(args):
    out = reference(*args)
    assert out.dtype is torch.bfloat16
    assert out.is_contiguous()
    assert_close(out, args, FLOAT32)


@given(sums())
def test_it_is_nearer_to_float64_than_a_product_that_is_rounded_first(args):
    a, a_scale, b, b_scale, residual = args
    product = custom_ops.scaled_mm(a, a_scale, b, b_scale)
    rows = a_scale.double() if a_scale.numel() != 1 else a_scale.double().reshape(())
    exact = a.double() @ b.double().t() * rows * b_scale.double().flatten() + residual.double()
    once, twice = ((out.double() - exact).norm() for out in (reference(*args), product + residual))
    assert once <= 1.02 * twice + 1e-3 * exact.norm()


@given(st.data(), sums())
def test_any_strides(data, args):
    moved = [t if t.dim() == 0 else data.draw(relayouts(t)) for t in args]
    assert_close(custom_ops.scaled_mm_add(*moved), args, FLOAT32 if DEVICE == "cpu" else HOPPER)


@pytest.mark.parametrize("tokens", [(), (0,), (1,), (2, 0), (2, 3)], ids=str)
def test_the_fake_has_the_strides_of_the_result(tokens):
    args = fp8(*tokens, 64), torch.rand(*tokens, 1), fp8(48, 64), torch.rand(48), bf16(*tokens, 48)
    args = tuple(t.to(DEVICE) for t in args)
    real = custom_ops.scaled_mm_add(*args)
    with fake_mode() as fake:
        faked = custom_ops.scaled_mm_add(*fake(args))
    assert (real.shape, real.stride(), real.dtype) == (faked.shape, faked.stride(), faked.dtype)


def bad_calls() -> dict:
    good = [fp8(2, 64), torch.rand(2, 1), fp8(48, 64), torch.rand(48), bf16(2, 48).cpu()]

    def but(**changed) -> list[Tensor]:
        names = ("a", "a_scale", "b", "b_scale", "residual")
        return [changed.get(name, value) for name, value in zip(names, good, strict=True)]

    return {
        "codes": (but(a=good[0].view(torch.int8)), r"a.dtype is torch.int8; accepted: .*e4m3fn"),
        "scales": (but(b_scale=good[3].half()), r"b_scale.dtype is torch.float16; .*float32"),
        "residual": (but(residual=good[4].half()), r"residual.dtype is torch.float16; .*bfloat16"),
        "rows": (but(residual=bf16(3, 48).cpu()), r"residual.shape is \(3, 48\); .*\(2, 48\)"),
        "K": (but(b=fp8(48, 32)), r"b.shape is \(48, 32\); accepted: \(48, 64\)"),
        "one scale": (but(a_scale=torch.rand(1)), r"a_scale.shape is \(1,\); .*\(2, 1\), or both"),
        "a number": (but(a=fp8(2, 64)[0, 0]), r"a has no dimension"),
        "weights": (but(b=fp8(48, 64)[0]), r"b has 1 dimensions; accepted: 2"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_errors(name):
    args, message = bad_calls()[name]
    with pytest.raises(ValueError, match=message):
        custom_ops.scaled_mm_add(*args)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def runs(*args: Tensor) -> bool:
    return custom_ops.explain("scaled_mm_add", *args).implementation.name == "cuda"


def layer(m: int, n: int, k: int, per_row: bool) -> tuple[Tensor, ...]:
    scales = (torch.rand(m, 1), torch.rand(n, 1)) if per_row else (torch.rand(1, 1),) * 2
    return (
        fp8(m, k).to(DEVICE),
        scales[0].to(DEVICE),
        fp8(n, k).to(DEVICE),
        scales[1].to(DEVICE),
        bf16(m, n),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 16, 16),
        (1, 4096, 4096),
        (7, 48, 144),
        (64, 1024, 512),
        (1000, 4096, 1024),
        (257, 272, 4096),
    ],
)
def test_cublaslt_against_float64(m, n, k, per_row, fast):
    args = layer(m, n, k, per_row)
    assert runs(*args)
    # fast sums keep about 14 bits of the largest product for all of K
    assert_close(
        custom_ops.scaled_mm_add(*args, fast_sums=fast), args, HOPPER * (k / 128 if fast else 1)
    )


@pytest.mark.gpu
def test_operands_off_the_boundary_and_strided():
    a, a_scale, b, b_scale, residual = layer(33, 64, 128, True)
    expected = custom_ops.scaled_mm_add(a, a_scale, b, b_scale, residual)
    wide = torch.zeros(33 * 128 + 3, dtype=torch.int8, device=DEVICE).view(FP8)
    off = wide[3:].view(33, 128)
    off.copy_(a)
    columns = b.t().contiguous().t()
    strided = torch.zeros(33, 130, dtype=torch.bfloat16, device=DEVICE)[:, 1:129:2]
    strided.copy_(residual)
    assert_same_bits(custom_ops.scaled_mm_add(off, a_scale, columns, b_scale, strided), expected)


@pytest.mark.gpu
def test_in_a_cuda_graph_with_other_scales_between():
    """A plan is kept, and told of other addresses before each product."""
    args, others = layer(32, 64, 128, True), layer(32, 64, 128, True)
    expected = [custom_ops.scaled_mm_add(*each) for each in (args, others)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = [custom_ops.scaled_mm_add(*each) for each in (args, others)]
    for out in made:
        out.zero_()
    graph.replay()
    for out, want in zip(made, expected, strict=True):
        assert_same_bits(out, want)


@pytest.mark.gpu
def test_more_lengths_than_plans_are_kept():
    _, _, b, b_scale, _ = layer(1, 16, 16, True)
    for m in (*range(1, 600), 3):
        a, a_scale = fp8(m, 16).to(DEVICE), torch.ones(m, 1, device=DEVICE)
        residual = torch.zeros(m, 16, dtype=torch.bfloat16, device=DEVICE)
        out = custom_ops.scaled_mm_add(a, a_scale, b, b_scale, residual)
    assert_close(out, (a, a_scale, b, b_scale, residual), HOPPER)
