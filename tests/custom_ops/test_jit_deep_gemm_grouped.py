"""DeepGEMM's grouped products: the lines that it writes for them, the watch over calls; on a GPU its own choices."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from custom_ops import monitor
from custom_ops.jit import deep_gemm_first_call, deep_gemm_grouped
from custom_ops.jit.deep_gemm import COMPILER
from custom_ops.jit.deep_gemm_names import code, directory
from custom_ops.jit.deep_gemm_tiles import Product, choose, kernel_of, tiles, transpose_of
from custom_ops.jit.kernel import Kernel
from custom_ops.scales import pitch_of
from tests.custom_ops.deep_gemm_stand_in import build, calls, deep_gemm_package

package = deep_gemm_package

CONTIGUOUS = """\
// Includes' hash value: HASH

#include <deep_gemm/impls/sm90_fp8_gemm_1d2d.cuh>

using namespace deep_gemm;

static void __instantiate_kernel() {
    auto ptr = reinterpret_cast<void*>(&sm90_fp8_gemm_1d2d_impl<
        cute::UMMA::Major::K,
        0, 1536, 2048,
        128,
        128, 128, 128,
        128, 128, 128,
        5,
        128, 256,
        2, false,
        132, GemmType::MGroupedContiguous,
        cutlass::bfloat16_t,
        epilogue::transform::EpilogueIdentity
    >);
};
"""


def test_the_lines_hold_the_sizes_and_the_number_of_groups(package) -> None:
    tile = {"block_m": 128, "block_n": 128, "stages": 5, "cluster": 2, "multicast_a": 0}
    spec = tile | {
        "multiprocessors": 132,
        "kind": "contiguous",
        "groups": 128,
        "n": 1536,
        "k": 2048,
    }
    kernel = Kernel.of("block_scaled_mm", "deep_gemm", spec)
    assert re.sub("(?<=value: ).*", "HASH", code(kernel)) == CONTIGUOUS
    assert directory(kernel).name.startswith("kernel.sm90_m_grouped_fp8_gemm_contiguous_1d2d.")
    masked = Kernel.of("block_scaled_mm", "deep_gemm", spec | {"kind": "masked"})
    assert "132, GemmType::MGroupedMasked," in code(masked)
    assert directory(masked).name.startswith("kernel.sm90_fp8_m_grouped_gemm_masked_1d2d.")


@given(
    m=st.integers(1, 4096),
    n=st.integers(1, 512).map(lambda n: 8 * n),
    kind=st.sampled_from(["contiguous", "masked"]),
    groups=st.integers(1, 64),
)
def test_kernels_are_not_shared_by_sizes_groups_or_kinds(m, n, kind, groups) -> None:
    kernel = kernel_of(m, Product(n, 512, kind, groups), 132)
    other = {"contiguous": "masked", "masked": "contiguous"}[kind]
    for changed in (
        Product(n + 8, 512, kind, groups),
        Product(n, 640, kind, groups),
        Product(n, 512, kind, groups + 1),
        Product(n, 512, other, groups),
        Product(n, 512),
    ):
        assert kernel_of(m, changed, 132) != kernel


def tensors(kind: str, rows: int, groups: int = 4, n: int = 128, k: int = 256, major: str = "tma"):
    """Arguments of a call, on the CPU: nothing is computed."""
    lead = (rows,) if kind == "contiguous" else (groups, rows)
    codes = torch.zeros(*lead, k, dtype=torch.float8_e4m3fn)
    pitch = pitch_of(rows, "column_major_tma")
    scale = torch.zeros(*lead[:-1], k // 128, pitch).transpose(-1, -2)[..., :rows, :]
    scale = scale if major == "tma" else scale.contiguous()
    weight = torch.zeros(groups, n, k, dtype=torch.float8_e4m3fn)
    right = weight, torch.ones(groups, n // 128, k // 128)
    out = torch.zeros(*lead, n, dtype=torch.bfloat16)
    which = torch.zeros(rows if kind == "contiguous" else groups, dtype=torch.int32)
    return (codes, scale), right, out, which


class TestCalls:
    """The calls themselves, with a DeepGEMM that only notes what it is called with."""

    @pytest.fixture(autouse=True)
    def deep_gemm_here(self, package, monkeypatch):
        self.calls = noted = []

        class Module:
            alignment = 128
            get_num_sms = staticmethod(lambda: 132)
            get_mk_alignment_for_contiguous_layout = classmethod(lambda cls: cls.alignment)
            m_grouped_fp8_gemm_nt_contiguous = staticmethod(lambda *args: noted.append(args))
            fp8_m_grouped_gemm_nt_masked = staticmethod(lambda *args: noted.append(args))

        self.module = Module
        monkeypatch.setitem(sys.modules, "deep_gemm", Module)
        monkeypatch.setattr(deep_gemm_first_call, "_loaded", set())
        monkeypatch.setattr(deep_gemm_grouped, "_ran", set())
        self.capturing = False
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monitor.disarm()
        yield
        monitor.disarm()

    def call(self, kind: str, rows: int, expected_m: int = 5, **sizes: Any) -> None:
        arguments = tensors(kind, rows, **sizes)
        if kind == "contiguous":
            deep_gemm_grouped.contiguous(*arguments)
        else:
            deep_gemm_grouped.masked(*arguments, expected_m)

    def test_each_goes_to_its_function(self) -> None:
        self.call("contiguous", 128)
        self.call("masked", 3, expected_m=9)
        assert [len(args) for args in self.calls] == [4, 5]
        assert self.calls[1][4] == 9

    @pytest.mark.parametrize("kind", ["contiguous", "masked"])
    def test_no_rows_are_no_call(self, kind) -> None:
        self.call(kind, 0)
        assert self.calls == []

    def test_a_kernel_that_was_warmed_is_no_event(self) -> None:
        product = Product(128, 256, "contiguous", 4)
        build([kernel_of(m, product, 132) for m in (128, 256)])
        monitor.arm(strict=True)
        self.call("contiguous", 128)
        self.call("contiguous", 256)
        assert monitor.events() == ()

    @pytest.mark.parametrize("kind", ["contiguous", "masked"])
    def test_a_compilation_is_an_event_with_its_sizes(self, kind) -> None:
        monitor.arm()
        self.call(kind, 128, expected_m=5)
        self.call(kind, 128, expected_m=5)
        (event,) = monitor.events()
        assert (
            event.sizes == f"{kind}, 4 groups, M={128 if kind == 'contiguous' else 5}, N=128, K=256"
        )
        assert "groups=4" in event.kernel

    def test_strict_raises_before_it_runs(self) -> None:
        monitor.arm(strict=True)
        with pytest.raises(monitor.JitError, match="masked, 4 groups, M=5, N=128, K=256"):
            self.call("masked", 64)
        assert self.calls == []

    def test_in_a_capture_only_what_has_run_runs(self) -> None:
        self.capturing = True
        with pytest.raises(RuntimeError, match=r"4 groups.* while a CUDA graph is captured"):
            self.call("masked", 64)
        self.capturing = False
        self.call("masked", 64)
        self.capturing = True
        self.call("masked", 64)
        assert len(self.calls) == 2

    @pytest.mark.parametrize("kind", ["contiguous", "masked"])
    @pytest.mark.parametrize(("major", "transposes"), [("tma", False), ("row", True)])
    def test_row_major_scales_need_the_transposition(self, kind, major, transposes) -> None:
        monitor.arm()
        self.call(kind, 128, major=major)
        wanted = {transpose_of(1, Product(128, 256)).label} if transposes else set()
        assert {e.kernel for e in monitor.events() if "transpose" in e.kernel} == wanted

    def test_another_alignment_of_groups_is_an_error(self) -> None:
        self.module.alignment = 64
        with pytest.raises(RuntimeError, match="to 64 rows; accepted: 128"):
            self.call("contiguous", 128)
        self.call("masked", 128)

    def test_loading_runs_each_kernel_once(self, monkeypatch) -> None:
        real = torch.empty, torch.zeros, torch.full, torch.device

        def on_cpu(function):
            return lambda *args, **kw: function(*args, **{**kw, "device": "cpu"})

        for name, function in zip(("empty", "zeros", "full"), real):
            monkeypatch.setattr(torch, name, on_cpu(function))
        kernels = [
            kernel_of(300, Product(128, 256, "contiguous", 4), 132),
            kernel_of(7, Product(128, 256, "masked", 4), 132),
            transpose_of(7, Product(128, 384, "masked", 2)),
        ]
        COMPILER.load(kernels)
        shapes = [(tuple(args[0][0].shape), tuple(args[1][0].shape)) for args in self.calls]
        assert shapes == [
            ((384, 256), (4, 128, 256)),
            ((4, 128, 256), (4, 128, 256)),
            ((2, 128, 384), (2, 128, 384)),
        ]
        assert [args[0][1].is_contiguous() for args in self.calls] == [False, False, True]
        assert self.calls[1][4] == self.calls[2][4] == 7
        assert int(self.calls[0][3].max()) == -1
        assert int(self.calls[1][3].max()) == 0


def test_grouped_kernels_compile_like_others(package) -> None:
    wanted = [kernel_of(m, Product(256, 512, "masked", 8), 132) for m in (1, 64, 400)]
    outcome = build(wanted)
    assert len(outcome.compiled) == len(set(wanted)) == calls(package).count("compile")
    for kernel in wanted:
        assert (directory(kernel) / "kernel.cu").read_text() == code(kernel)


# Qwen3-30B-A3B and a rank of DeepSeek-V3: gate and up, down.
PRODUCTS = [
    Product(n, k, kind, groups)
    for kind in ("contiguous", "masked")
    for n, k, groups in ((1536, 2048, 16), (2048, 768, 16), (4096, 7168, 2), (576, 1536, 3))
]
ROWS = {
    "contiguous": (128, 256, 640, 1024, 2176, 4096, 8192, 16384),
    "masked": (1, 2, 15, 16, 17, 63, 64, 65, 100, 128, 129, 200, 256, 500, 1024),
}

_RECORD = """
import deep_gemm
from custom_ops.jit import deep_gemm_grouped
from custom_ops.jit.deep_gemm_tiles import kernel_of, transpose_of
from tests.custom_ops.test_jit_deep_gemm_grouped import PRODUCTS, ROWS
for product in PRODUCTS:
    for m in ROWS[product.kind]:
        deep_gemm_grouped.run_once(kernel_of(m, product, deep_gemm.get_num_sms()))
    deep_gemm_grouped.run_once(transpose_of(m, product))
"""


@pytest.mark.gpu
def test_deep_gemm_chooses_and_names_as_foreseen(tmp_path: Path) -> None:
    """The configurations that DeepGEMM prints are those of the model, and it compiles nothing that is warm."""
    pytest.importorskip("deep_gemm", reason="needs sgl-deep-gemm")
    from custom_ops.jit import building, target

    here = target.here()
    if reason := COMPILER.why_not(here):
        pytest.skip(f"needs a GPU that DeepGEMM is modelled on: {reason}")
    environment = {
        "DG_JIT_CACHE_DIR": str(tmp_path / "theirs"),
        "CUSTOM_OPS_CACHE_DIR": str(tmp_path / "ours"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        wanted = [
            kernel
            for product in PRODUCTS
            for kernel in (
                *(kernel_of(m, product, here.multiprocessors) for m in ROWS[product.kind]),
                transpose_of(1, product),
            )
        ]
        building.compile_all(wanted, {"deep_gemm": COMPILER}, here)
        warm = {directory(kernel).name for kernel in wanted}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", _RECORD],
        env={
            **os.environ,
            **environment,
            "DG_PRINT_CONFIGS": "1",
            "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)]),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    pattern = (
        r"gemm_type=(\d+).*?m=(\d+), n=(\d+), k=(\d+), num_groups=(\d+).*?num_sms=(\d+).*?"
        r"expected_m=(\d+).*?block_m=(\d+), block_n=(\d+).*?"
        r"cluster_m=(\d+), cluster_n=(\d+).*?num_stages=(\d+)"
    )
    printed = [tuple(map(int, found)) for found in re.findall(pattern, done.stdout)]
    assert len(printed) > 80
    wrong = []
    for kind, _, n, k, groups, multiprocessors, m, *choice in printed:
        product = Product(n, k, {1: "contiguous", 2: "masked"}[kind], groups)
        tile = tiles(product)[int(choose(np.array([m]), product, multiprocessors)[0])]
        if choice != [tile.block_m, tile.block_n, tile.cluster_m, tile.cluster_n, tile.stages]:
            wrong.append((m, product, choice, tile))
    assert wrong == []
    assert set(os.listdir(tmp_path / "theirs" / "cache")) == warm
