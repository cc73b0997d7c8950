"""block_scaled_mm: against float64, in every layout and shape, Triton and DeepGEMM against the reference."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import custom_ops
from custom_ops.gemm import cublaslt, deep_gemm
from custom_ops.gemm.reference import dequantize_blocks, dequantize_rows
from custom_ops.jit import deep_gemm_first_call
from custom_ops.scales import SCALE_LAYOUTS, to_layout
from fusion_passes.testing.strategies import (
    fp8_codes,
    positive_scales,
    relayout,
    relayouts,
    token_shapes,
)
from tests.custom_ops.helpers import DEVICE, assert_same_bits, fp8, implementation

reference = implementation("block_scaled_mm", "reference")
triton = implementation("block_scaled_mm", "triton")
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (1, 2, 17, 64, 127, 128, 129, 256, 300)


@st.composite
def products(draw):
    """a, a_scale, b, b_scale of any shape, the scales of a in any layout."""
    tokens = draw(token_shapes(max_tokens=67))
    n, k = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    a, b = draw(fp8_codes((*tokens, k), DEVICE)), draw(fp8_codes((n, k), DEVICE))
    k_blocks, n_blocks = -(-k // 128), -(-n // 128)
    a_scale = to_layout(
        draw(positive_scales((*tokens, k_blocks), DEVICE)), draw(st.sampled_from(SCALE_LAYOUTS))
    )
    return a, a_scale, b, draw(positive_scales((n_blocks, k_blocks), DEVICE))


def exact_and_bound(a, a_scale, b, b_scale, roundoff) -> tuple[Tensor, Tensor]:
    """The product in float64, and `roundoff` times the product of the magnitudes."""
    left = a.double() * a_scale.double().repeat_interleave(128, -1)[..., : a.shape[-1]]
    scale = b_scale.double().repeat_interleave(128, 0)[: b.shape[0]]
    right = b.double() * scale.repeat_interleave(128, 1)[:, : b.shape[1]]
    return left @ right.t(), left.abs() @ right.abs().t() * roundoff


def assert_close(out, args, roundoff):
    exact, bound = exact_and_bound(*args, roundoff)
    half_step = (
        torch.finfo(out.dtype).eps / 2 * 1.01 * exact.abs() + torch.finfo(out.dtype).smallest_normal
    )
    bad = (out.double() - exact).abs() > bound + half_step
    overflow = exact.abs() > torch.finfo(out.dtype).max
    assert not (bad & ~overflow).any()


# float32 sums of up to 300 products, dequantized in float32.
FLOAT32 = 300 * 2.0**-24
# Hopper's FP8 tensor cores align the products of a sum to the largest and keep about 14 bits, so that each
# of 128 products can lose 2^-14 of the largest; codes of all magnitudes, as drawn here, come close.
ROUNDOFF = FLOAT32 if DEVICE == "cpu" else 128 * 2.0**-14
# On normal data the losses average out.
NORMAL_DATA_ROUNDOFF = 2.0**-11


@given(products(), st.sampled_from(OUT_DTYPES))
def test_reference_against_float64(args, out_dtype):
    out = reference(*args, out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert_close(out, args, FLOAT32)


@given(products(), st.sampled_from(OUT_DTYPES))
def test_triton_against_float64(args, out_dtype):
    assert_close(triton(*args, out_dtype=out_dtype), args, ROUNDOFF)


@given(st.data(), products())
def test_triton_takes_any_strides(data, args):
    moved = [data.draw(relayouts(t)) for t in args]
    assert_same_bits(triton(*moved), triton(*args))


@pytest.mark.parametrize("which", ["reference", "triton"])
def test_layouts_of_the_scale_give_the_same_bits(which):
    a, b = fp8(37, 384, device=DEVICE), fp8(136, 384, device=DEVICE)
    scale, b_scale = torch.rand(37, 3, device=DEVICE), torch.rand(2, 3, device=DEVICE)
    run = implementation("block_scaled_mm", which)
    first = run(a, scale, b, b_scale)
    for layout in SCALE_LAYOUTS[1:]:
        assert_same_bits(run(a, to_layout(scale, layout), b, b_scale), first)
    assert_same_bits(run(a, relayout(scale, "pitched"), b, b_scale), first)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 128), (3, 0, 128), (3, 5, 0), (0, 0, 0)])
def test_empty_operands(m, n, k):
    args = (
        torch.zeros(m, k).to(torch.float8_e4m3fn),
        torch.ones(m, -(-k // 128)),
        torch.zeros(n, k).to(torch.float8_e4m3fn),
        torch.ones(-(-n // 128), -(-k // 128)),
    )
    args = [t.to(DEVICE) for t in args]
    for run in (custom_ops.block_scaled_mm, reference, triton):
        out = run(*args)
        assert out.shape == (m, n)
        assert not out.float().any()


def test_nan_reaches_the_rows_and_columns_that_hold_it_and_no_others():
    a, b = fp8(5, 256, device=DEVICE), fp8(7, 256, device=DEVICE)
    a.view(torch.uint8)[2, 200] = 0x7F
    b.view(torch.uint8)[4, 3] = 0xFF
    args = a, torch.ones(5, 2, device=DEVICE), b, torch.ones(1, 2, device=DEVICE)
    expected = torch.zeros(5, 7, dtype=torch.bool, device=DEVICE)
    expected[2], expected[:, 4] = True, True
    assert torch.equal(reference(*args).isnan(), expected)
    assert torch.equal(triton(*args).isnan(), expected)


def test_rounded_once():
    """The dequantized operands keep their float32 values: 17 * 1.0625 does not fit bfloat16's 8 bits."""
    a = torch.full((1, 128), 0.0).to(torch.float8_e4m3fn)
    a[0, 0] = torch.tensor(1.125).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0009765625]])
    b = torch.zeros(1, 128).to(torch.float8_e4m3fn)
    b[0, 0] = torch.tensor(1.0).to(torch.float8_e4m3fn)
    args = [t.to(DEVICE) for t in (a, scale, b, torch.ones(1, 1))]
    for run in (reference, triton):
        assert run(*args, out_dtype=torch.float32).item() == 1.125 * 1.0009765625


def test_a_row_gives_the_same_bits_in_any_batch():
    a, b = fp8(131, 384, device=DEVICE), fp8(136, 384, device=DEVICE)
    scale, b_scale = torch.rand(131, 3, device=DEVICE), torch.rand(2, 3, device=DEVICE)
    whole = triton(a, scale, b, b_scale)
    for start, stop in ((0, 1), (5, 6), (3, 67), (0, 65), (130, 131)):
        part = triton(a[start:stop], scale[start:stop], b, b_scale)
        assert_same_bits(part, whole[start:stop])


def test_dequantized_operands():
    a, b = fp8(3, 200), fp8(150, 200)
    a_scale, b_scale = torch.rand(3, 2), torch.rand(2, 2)
    rows, blocks = dequantize_rows(a, a_scale), dequantize_blocks(b, b_scale)
    assert rows[1, 130] == a.float()[1, 130] * a_scale[1, 1]
    assert blocks[140, 5] == b.float()[140, 5] * b_scale[1, 0]
    assert rows.shape == (3, 200)
    assert blocks.shape == (150, 200)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 7, 64, 65, 300, 1024])
@pytest.mark.parametrize(("n", "k"), [(4096, 7168), (136, 144), (576, 512), (2112, 1536 + 16)])
class TestDeepGemm:
    """Needs Hopper and `pip install sgl-deep-gemm apache-tvm-ffi`; skipped otherwise with what is missing."""

    @pytest.fixture(autouse=True)
    def _needs_deep_gemm(self):
        if reason := deep_gemm.unavailable(torch.device("cuda", 0)):
            pytest.skip(f"DeepGEMM {reason}")

    @staticmethod
    def operands(m, n, k, layout="column_major_tma"):
        torch.manual_seed(m + n + k)
        a, b = fp8(m, k, device="cuda"), fp8(n, k, device="cuda")
        a_scale = torch.rand(m, -(-k // 128), device="cuda") + 0.1
        b_scale = torch.rand(-(-n // 128), -(-k // 128), device="cuda") + 0.1
        return a, to_layout(a_scale, layout), b, b_scale

    def test_against_float64(self, m, n, k):
        args = self.operands(m, n, k)
        chosen = custom_ops.explain("block_scaled_mm", *args).implementation.name
        assert chosen in ("cublaslt", "deep_gemm")
        out = custom_ops.block_scaled_mm(*args)
        assert_close(out, args, NORMAL_DATA_ROUNDOFF)
        # either may be chosen for a row, depending on its batch
        assert_same_bits(out, deep_gemm.block_scaled_mm(*args, out_dtype=torch.bfloat16))
        assert_close(triton(*args), args, NORMAL_DATA_ROUNDOFF)

    def test_layouts_of_the_scale_give_the_same_bits(self, m, n, k):
        expected = deep_gemm.block_scaled_mm(*self.operands(m, n, k), out_dtype=torch.bfloat16)
        for layout in SCALE_LAYOUTS[:2]:
            args = self.operands(m, n, k, layout)
            assert_same_bits(deep_gemm.block_scaled_mm(*args, out_dtype=torch.bfloat16), expected)

    def test_a_row_gives_the_same_bits_in_any_batch(self, m, n, k):
        a, a_scale, b, b_scale = self.operands(m, n, k)
        whole = custom_ops.block_scaled_mm(a, a_scale, b, b_scale)
        alone = custom_ops.block_scaled_mm(a[-1:], a_scale[-1:].clone(), b, b_scale)
        assert_same_bits(alone, whole[-1:])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1024, 4096, 4096), (4096, 1024, 4096), (516, 4096, 2048)]
)
def test_cublaslt_takes_one_wave_of_large_tiles_with_the_bits_of_deep_gemm(m, n, k):
    if reason := cublaslt.unavailable(torch.device("cuda", 0)) or deep_gemm.unavailable(
        torch.device("cuda", 0)
    ):
        pytest.skip(f"cuBLASLt against DeepGEMM {reason}")
    args = TestDeepGemm.operands(m, n, k)
    assert custom_ops.explain("block_scaled_mm", *args).implementation.name == "cublaslt"
    expected = deep_gemm.block_scaled_mm(*args, out_dtype=torch.bfloat16)
    assert_same_bits(custom_ops.block_scaled_mm(*args), expected)


def test_cublaslt_leaves_what_it_cannot_take():
    """On a CPU the reasons that depend on shapes alone."""
    a, b = (
        torch.zeros(6, 1024).to(torch.float8_e4m3fn),
        torch.zeros(256, 1024).to(torch.float8_e4m3fn),
    )
    a_scale, b_scale = torch.ones(6, 8), torch.ones(2, 8)
    assert "divisible by 4" in cublaslt.unsupported(
        a, a_scale, b, b_scale, out_dtype=torch.bfloat16
    )
    assert "column-major" in cublaslt.unsupported(
        a[:4], a_scale[:4], b, b_scale, out_dtype=torch.bfloat16
    )
    assert "out_dtype" in cublaslt.unsupported(a, a_scale, b, b_scale, out_dtype=torch.float16)
    assert "multiple of 512" in cublaslt.unsupported(
        a, a_scale, b[:200], b_scale, out_dtype=torch.bfloat16
    )
    assert "needs a CUDA tensor" in cublaslt.unavailable(torch.device("cpu"))


def test_deep_gemm_starts_its_runtime_when_it_is_loaded(monkeypatch):
    """Not in the first call, which may allocate from the memory pool of a CUDA graph."""
    started = []
    stand_in = types.ModuleType("deep_gemm")
    stand_in.get_num_sms = lambda: started.append(True)
    monkeypatch.setitem(sys.modules, "deep_gemm", stand_in)
    assert deep_gemm.load() is deep_gemm.block_scaled_mm
    assert started == [True]


@pytest.mark.gpu
def test_deep_gemm_in_a_cuda_graph(monkeypatch):
    if reason := deep_gemm.unavailable(torch.device("cuda", 0)):
        pytest.skip(f"DeepGEMM {reason}")
    a, a_scale, b, b_scale = TestDeepGemm.operands(33, 256, 512)
    expected = custom_ops.block_scaled_mm(a, a_scale, b, b_scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = custom_ops.block_scaled_mm(a, a_scale, b, b_scale)
    out.zero_()
    graph.replay()
    assert_same_bits(out, expected)
    # as in a process in which no other test has loaded a kernel
    monkeypatch.setattr(deep_gemm_first_call, "_loaded", set())
    monkeypatch.setattr(deep_gemm, "compiled", set())
    other = torch.zeros(4096, 512, device="cuda").to(torch.float8_e4m3fn)  # wide: another tile
    other_scale = torch.ones(32, 4, device="cuda")
    not_run = pytest.raises(RuntimeError, match=r"M=33, N=4096, K=512 yet .* before the capture")
    with torch.cuda.graph(torch.cuda.CUDAGraph()), not_run:
        custom_ops.block_scaled_mm(a, a_scale, other, other_scale)


@pytest.mark.gpu
def test_more_than_2_31_elements():
    a = torch.zeros(2**18 + 1, 128, device="cuda").to(torch.float8_e4m3fn)
    a[-1] = fp8(128, device="cuda")
    b, b_scale = fp8(8192, 128, device="cuda"), torch.rand(64, 1, device="cuda")
    a_scale = torch.rand(2**18 + 1, 1, device="cuda")
    out = triton(a, a_scale, b, b_scale)
    assert_same_bits(out[-1:].clone(), triton(a[-1:], a_scale[-1:], b, b_scale))
    assert not out[:-1].any()
