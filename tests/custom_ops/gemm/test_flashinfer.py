"""block_scaled_mm on FlashInfer: what is handed to its function, and that nothing but a measurement chooses it."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import custom_ops
from bench import tuning
from bench.results import Row, Run
from custom_ops import platform, tables
from custom_ops.gemm import flashinfer_sm90, reference
from custom_ops.scales import SCALE_LAYOUTS, pitch_of, to_layout
from tests.custom_ops.helpers import fp8

SIZES = st.tuples(
    st.sampled_from(((), (1,), (3,), (2, 5))), st.sampled_from((64, 192)), st.sampled_from((1, 3))
)


def operands(tokens: tuple[int, ...], n: int, blocks: int, layout: str = "row_major"):
    k = 128 * blocks
    scale = to_layout(torch.rand(*tokens, blocks), layout)
    return fp8(*tokens, k), scale, fp8(n, k), torch.rand(-(-n // 128), blocks)


@pytest.fixture(scope="module")
def stand_in():
    """A flashinfer whose function is the reference, of scales as it lies in memory when they are TMA-aligned."""
    seen: list[tuple[torch.Tensor, ...]] = []

    def product(a, b, a_scale, b_scale, out):
        m, groups = a.shape[0], b_scale.shape[1]
        memory = a_scale.as_strided((groups, m), (pitch_of(m, "column_major_tma"), 1))
        seen.append((a, b, a_scale, b_scale))
        out.copy_(reference.block_scaled_mm(a, memory.t(), b, b_scale, out_dtype=out.dtype))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("flashinfer", "flashinfer.gemm"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["flashinfer.gemm"].fp8_blockscale_gemm_sm90 = product
        yield seen


@given(sizes=SIZES, layout=st.sampled_from(SCALE_LAYOUTS))
def test_it_is_handed_what_it_reads(stand_in, sizes, layout):
    arguments = operands(*sizes, layout)
    out = flashinfer_sm90.block_scaled_mm(*arguments, out_dtype=torch.bfloat16)
    expected = reference.block_scaled_mm(*arguments, out_dtype=torch.bfloat16)
    assert out.shape == expected.shape
    assert out.is_contiguous()
    torch.testing.assert_close(out, expected)
    a, b, a_scale, b_scale = stand_in[-1]
    assert a.dim() == b.dim() == a_scale.dim() == b_scale.dim() == 2
    assert all(t.is_contiguous() for t in (a, b, b_scale))
    assert a_scale.stride() == (1, pitch_of(a.shape[0], "column_major_tma"))


def test_what_it_cannot_take_has_a_reason():
    def reason(tokens=(2,), n=64, blocks=1, out_dtype=torch.bfloat16):
        return flashinfer_sm90.impossible(*operands(tokens, n, blocks), out_dtype=out_dtype)

    assert reason() is None
    assert "torch.float16" in reason(out_dtype=torch.float16)
    assert "N of 64; b is 72 x 128" in reason(n=72)
    assert "nothing to multiply" in reason(tokens=(0,))


def test_nothing_but_a_measurement_chooses_it(monkeypatch):
    a = operands((2,), 64, 1)
    assert "was not measured to be the fastest for M = 2, N = 64, K = 128" in str(
        flashinfer_sm90.unsupported(*a, out_dtype=torch.bfloat16)
    )
    row = {"n": 64, "k": 128, "m": 2, "implementation": "flashinfer", "tile": ""}
    table = {"arch": "sm_90", "block_scaled_mm": {flashinfer_sm90.KIND: [row]}}
    monkeypatch.setattr(tables, "load", lambda: {90: table})
    monkeypatch.setattr(platform, "cuda_capability", lambda _device: (9, 0))
    tables.best.cache_clear()
    try:
        assert flashinfer_sm90.unsupported(*a, out_dtype=torch.bfloat16) is None
        other = operands((2,), 128, 1)  # it would compile for minutes again
        assert "N = 128" in str(flashinfer_sm90.unsupported(*other, out_dtype=torch.bfloat16))
    finally:
        tables.best.cache_clear()


def test_without_a_gpu_it_says_what_it_needs():
    reasons = custom_ops.explain("block_scaled_mm", *operands((2,), 64, 1)).rejected
    assert reasons["flashinfer"] == "needs a CUDA tensor, this one is on cpu"


def test_the_fastest_way_is_written_into_the_table():
    def row(m, **us):
        return Row("block_scaled_mm", {"tokens": m, "n": 64, "k": 128}, warm_us=us)

    rows = [
        row(1, ours=9.0, deep_gemm=9.0, flashinfer=7.0),
        row(64, ours=9.0, deep_gemm=9.0, flashinfer=9.5, inductor=1.0),
        row(128, ours=9.0, deep_gemm=9.0, flashinfer=8.8),  # what a run is ahead by chance
        row(256, ours=9.0, deep_gemm=9.0),
    ]
    device = {"name": "GPU", "arch": "sm_90"}
    run = Run("gemm", device, {}, "commit", "command", "2026-01-01", "timer", 3000.0, rows)
    found = tuning.distil_block_products([(run, each) for each in rows])
    entries = found["block_scaled_mm"][flashinfer_sm90.KIND]
    assert [(e["m"], e["implementation"]) for e in entries] == [
        (1, "flashinfer"),
        (64, "deep_gemm"),
        (128, "deep_gemm"),
    ]
    assert entries[1]["us"] == {"flashinfer": 9.5, "deep_gemm": 9.0}


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 16, 33, 256])
def test_it_equals_the_reference_on_a_gpu(m):
    """Needs Hopper and flashinfer, which compiles for minutes."""
    device = torch.device("cuda", 0)
    if reason := flashinfer_sm90.unavailable(device):
        pytest.skip(reason)
    arguments = [t.to(device) for t in operands((m,), 512, 8)]
    out = flashinfer_sm90.block_scaled_mm(*arguments, out_dtype=torch.bfloat16)
    expected = reference.block_scaled_mm(*arguments, out_dtype=torch.float32)
    error = (out.float() - expected).norm() / expected.norm()
    assert error <= 1e-2
