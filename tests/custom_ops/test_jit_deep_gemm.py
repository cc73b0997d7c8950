"""The model of DeepGEMM's choice of kernels: against the rule spelt out, and on a GPU against DeepGEMM."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from custom_ops import monitor
from custom_ops.gemm import deep_gemm as op
from custom_ops.jit import (
    deep_gemm,
    deep_gemm_first_call,
    deep_gemm_names,
    deep_gemm_tiles,
)
from custom_ops.jit.deep_gemm import COMPILER
from custom_ops.jit.deep_gemm_names import code, digest, directory
from custom_ops.jit.deep_gemm_tiles import Product, Tile, choose, tiles
from custom_ops.jit.kernel import Kernel, Operand, Problem, Target
from custom_ops.scales import empty_scale
from tests.custom_ops.deep_gemm_stand_in import H100, build, calls, deep_gemm_package

package = deep_gemm_package

sizes = {
    "m": st.integers(1, 20000),
    "n": st.integers(1, 4096).map(lambda n: 8 * n),
    "k": st.integers(1, 2048).map(lambda k: 16 * k),
    "multiprocessors": st.sampled_from([78, 114, 132]),
}


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def kernel_of(m: int, n: int, k: int, multiprocessors: int) -> Kernel:
    return deep_gemm_tiles.kernel_of(m, Product(n, k), multiprocessors)


def cycles(tile: Tile, m: int, product: Product, multiprocessors: int) -> float:
    """The cost of a tile, in Python's integers, one problem at a time."""
    n, k = product.n, product.k
    if tile.block_m in (16, 32) and m > tile.block_m:
        return float("inf")
    blocks = -(-m // tile.block_m) * -(-n // tile.block_n)
    if product.kind == "masked":  # M of each group
        blocks *= product.groups
    waves = -(-blocks // multiprocessors)
    if tile.cluster_m * tile.cluster_n > 1 and waves <= 1:
        return float("inf")
    written = tile.block_m * tile.block_n * 2
    l2 = k * (tile.block_m // tile.cluster_n + tile.block_n // tile.cluster_m) + written
    l1 = k * (tile.block_m + tile.block_n) + k * (max(64, tile.block_m) + tile.block_n)
    l1 += 2 * written
    slowest = max(
        l1 * blocks // (128 * multiprocessors),
        l2 * blocks // int(min(64.0 * multiprocessors, 8e6 / 1.3e3)),
    )
    efficiency = _float32(_float32(blocks) / _float32(waves * multiprocessors))
    return int(_float32(_float32(slowest) / efficiency))


def problem(n: int, k: int, layout: str = "column_major_tma") -> Problem:
    groups = -(-k // 128)
    scale = Operand("float32", ("s0", groups), (1, "4*((s0 + 3)//4)"), layout)
    if not layout:
        scale = Operand("float32", ("s0", groups), (groups, 1))
    return Problem(
        "block_scaled_mm",
        "deep_gemm",
        (
            Operand("float8_e4m3fn", ("s0", k), (k, 1)),
            scale,
            Operand("float8_e4m3fn", (n, k), (k, 1)),
            Operand("float32", (-(-n // 128), groups), (groups, 1)),
            "torch.bfloat16",
        ),
        (2, None),
        True,
    )


@given(**sizes, kind=st.sampled_from(deep_gemm_tiles.KINDS), groups=st.integers(1, 256))
def test_the_choice_is_the_first_of_the_cheapest(m, n, k, multiprocessors, kind, groups) -> None:
    product = Product(n, k, kind, groups)
    costs = [cycles(tile, m, product, multiprocessors) for tile in tiles(product)]
    assert costs.index(min(costs)) == int(choose(np.array([m]), product, multiprocessors)[0])


@given(n=sizes["n"], k=sizes["k"])
def test_tiles_of_grouped_products_have_the_heights_that_their_layout_allows(n, k) -> None:
    contiguous, masked = (tiles(Product(n, k, kind, 8)) for kind in ("contiguous", "masked"))
    assert {tile.block_m for tile in contiguous} == {128}
    assert {tile.block_m for tile in masked} <= {64, 128}
    for tile in masked:  # a cluster does not reach over the end of a group
        assert -(-n // tile.block_n) % (tile.cluster_m * tile.cluster_n) == 0


@given(n=sizes["n"], k=sizes["k"], low=st.integers(1, 300), count=st.integers(0, 400))
def test_full_is_exactly_what_the_range_reaches(n, k, low, count) -> None:
    found = set(COMPILER.kernels(problem(n, k), low, low + count, "full", H100))
    if k <= 128:
        found.discard(deep_gemm_tiles.transpose_of(1, Product(n, k)))
    assert found == {kernel_of(m, n, k, 132) for m in range(low, low + count + 1)}


@given(n=sizes["n"], k=sizes["k"], high=st.integers(1, 9000))
def test_relax_is_a_part_of_full_and_holds_the_powers_of_two(n, k, high) -> None:
    full = set(COMPILER.kernels(problem(n, k), 1, high, "full", H100))
    relaxed = set(COMPILER.kernels(problem(n, k), 1, high, "relax", H100))
    powers = {kernel_of(1 << bit, n, k, 132) for bit in range(high.bit_length())}
    assert powers <= relaxed <= full


@given(n=sizes["n"], k=sizes["k"])
def test_an_example_reaches_its_kernel(n, k) -> None:
    for kernel in COMPILER.kernels(problem(n, k), 1, 4096, "full", H100):
        if "transpose_groups" not in dict(kernel.spec):
            assert kernel_of(**dict(kernel.example), multiprocessors=132) == kernel


@given(n=sizes["n"], k=sizes["k"], kind=st.sampled_from(deep_gemm_tiles.KINDS))
def test_every_tile_fits_into_shared_memory(n, k, kind) -> None:
    for tile in tiles(Product(n, k, kind, 8)):
        stage = (tile.block_m + tile.block_n) * 128 + 4 * tile.block_m
        assert tile.stages >= 3
        assert tile.stages * stage + 2 * tile.block_m * tile.block_n < deep_gemm_tiles.SHARED_MEMORY


def test_layers_of_llama_3_8b_share_their_kernels() -> None:
    layers = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
    each = [set(COMPILER.kernels(problem(n, k), 1, 8192, "full", H100)) for n, k in layers]
    assert len(set.union(*each)) < sum(map(len, each))
    assert len(set.union(*each)) == 35


@pytest.mark.parametrize(("layout", "extra"), [("column_major_tma", 0), ("", 1)])
def test_scales_that_have_to_be_transposed_need_one_kernel_more(layout, extra) -> None:
    found = list(COMPILER.kernels(problem(4096, 4096, layout), 1, 64, "full", H100))
    assert sum("transpose_groups" in dict(kernel.spec) for kernel in found) == extra


def test_the_hashes_are_those_that_their_authors_publish() -> None:
    assert deep_gemm_names._fnv1a(b"a", 0xCBF29CE484222325) == 0xAF63DC4C8601EC8C
    assert deep_gemm_names._finalize(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # first of seed 0
    # of nothing, the seeds are only finalized
    assert digest(b"")[16:] == "e220a8397b1dcdaf"
    assert len(digest(b"a")) == 32


def test_kernels_go_where_deep_gemm_looks_and_a_second_start_runs_no_compiler(package) -> None:
    wanted = list(COMPILER.kernels(problem(4096, 4096), 1, 64, "full", H100))
    assert COMPILER.why_not(H100) is None
    build(wanted)
    assert calls(package).count("compile") == len(wanted)
    for kernel in wanted:
        place = directory(kernel)
        assert place.parent == package.parent / "theirs" / "cache"
        assert (place / "kernel.cu").read_text() == code(kernel)
        assert place.stat().st_mode & 0o777 == 0o755
        assert (place / "kernel.cubin").read_bytes().startswith(b"cubin of // Includes")
    before = calls(package)
    deep_gemm_names._version.cache_clear()  # as in a new process
    assert len(build(wanted).found) == len(wanted)
    assert calls(package) == before
    assert list((package.parent / "theirs" / "tmp").iterdir()) == []


def test_a_truncated_cubin_is_built_again(package) -> None:
    kernel = kernel_of(64, 4096, 4096, 132)
    build([kernel])
    cubin = directory(kernel) / "kernel.cubin"
    whole = cubin.read_bytes()
    cubin.write_bytes(whole[:10])
    assert build([kernel]).compiled == [kernel]
    assert cubin.read_bytes() == whole


@pytest.mark.parametrize("changed", ["header", "library", "compiler"])
def test_another_deep_gemm_or_toolkit_misses(package, changed) -> None:
    kernel = kernel_of(64, 4096, 4096, 132)
    before = COMPILER.identity(kernel, H100), directory(kernel)
    if changed == "header":
        (package / "include" / "deep_gemm" / "impls" / "common.cuh").write_text("// changed\n")
        deep_gemm_names._file_hash.cache_clear()
        deep_gemm_names._include_hash.cache_clear()
        assert directory(kernel) != before[1]
        return
    if changed == "library":
        (package / "_C.so").write_bytes(b"another")
        deep_gemm_names.library_hash.cache_clear()
    else:
        nvcc = package.parent / "nvcc"
        nvcc.write_text(nvcc.read_text().replace("13.0", "13.1"))
        deep_gemm_names._version.cache_clear()
    assert COMPILER.identity(kernel, H100) != before[0]


@pytest.mark.parametrize(
    ("target", "variable", "reason"),
    [
        (Target("10.0a", 148), {}, "sm_90a"),
        (H100, {"DG_JIT_USE_NVRTC": "1"}, "NVRTC"),
        (H100, {"DG_JIT_NVCC_COMPILER": "nowhere/nvcc"}, "nowhere/nvcc"),
    ],
    ids=["arch", "nvrtc", "nvcc"],
)
def test_why_it_cannot_be_done_is_said(package, monkeypatch, target, variable, reason) -> None:
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    assert reason in (COMPILER.why_not(target) or "")


def test_another_version_of_deep_gemm_is_not_guessed_at(package, monkeypatch) -> None:
    monkeypatch.setattr(deep_gemm.platform, "package_version", lambda name: "0.2.0")
    assert "known for 0.1.4, here is 0.2.0" in (COMPILER.why_not(H100) or "")


class TestMonitor:
    @pytest.fixture(autouse=True)
    def deep_gemm_here(self, package, monkeypatch):
        class Module:
            get_num_sms = staticmethod(lambda: 132)

        monkeypatch.setitem(sys.modules, "deep_gemm", Module())
        monkeypatch.setattr(deep_gemm_first_call, "_loaded", set())
        monitor.disarm()
        yield
        monitor.disarm()

    def call(self, m: int, *, capturing: bool = False, compiles: str = "") -> None:
        with deep_gemm_first_call.first_call(0, m, 4096, 4096, False, capturing):
            if compiles:
                (deep_gemm_names.cache() / "cache" / compiles).mkdir(parents=True)

    def test_before_a_warm_up_nothing_is_counted(self) -> None:
        self.call(64)
        assert monitor.events() == ()

    def test_a_warmed_kernel_is_no_event(self) -> None:
        build(COMPILER.kernels(problem(4096, 4096), 1, 256, "full", H100))
        monitor.arm()
        for m in (1, 17, 64, 65, 255):
            self.call(m)
        assert monitor.events() == ()

    def test_a_compilation_is_counted_and_logged_once(self, caplog) -> None:
        monitor.arm()
        self.call(64)
        self.call(64)  # loaded by now
        (event,) = monitor.events()
        assert (event.op, event.sizes) == ("block_scaled_mm", "M=64, N=4096, K=4096")
        assert caplog.text.count("after warm-up") == 1

    def test_strict_raises_before_it_compiles(self) -> None:
        monitor.arm(strict=True)
        with pytest.raises(monitor.JitError, match="M=64, N=4096, K=4096"):
            self.call(64, compiles="never")
        assert not (deep_gemm_names.cache() / "cache" / "never").exists()

    def test_what_was_not_foreseen_is_counted(self) -> None:
        build([kernel_of(64, 4096, 4096, 132)])
        monitor.arm()
        self.call(64, compiles="kernel.other.0")
        (event,) = monitor.events()
        assert event.kernel == "kernel.other.0 (not foreseen)"

    def test_what_was_not_foreseen_is_counted_though_the_kernel_is_loaded(self) -> None:
        build([kernel_of(64, 4096, 4096, 132)])
        self.call(64)
        monitor.arm()
        self.call(64, compiles="kernel.other.0")
        assert len(monitor.events()) == 1

    def test_in_a_capture_only_what_is_loaded_runs(self) -> None:
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            self.call(64, capturing=True)
        self.call(64)
        same = next(
            m
            for m in range(63, 0, -1)
            if kernel_of(m, 4096, 4096, 132) == kernel_of(64, 4096, 4096, 132)
        )
        self.call(same, capturing=True)

    def test_of_an_unknown_version_a_capture_is_an_error(self, monkeypatch) -> None:
        monkeypatch.setattr(deep_gemm.platform, "package_version", lambda name: "0.2.0")
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
            self.call(64, capturing=True)


_RECORD = """
import random, sys
from custom_ops.gemm import deep_gemm
random.seed(0)
for n, k in ((4096, 4096), (1024, 4096), (4096, 14336), (576, 1536)):
    edges = [m + d for m in (16, 32, 64, 128, 256, 1024, 4096) for d in (-1, 0, 1)]
    for m in [1, *edges, *random.sample(range(1, 8193), 30)]:
        deep_gemm.run_once(m, n, k, "column_major_tma")
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
        wanted = dict.fromkeys(
            kernel
            for n, k in ((4096, 4096), (1024, 4096), (4096, 14336), (576, 1536))
            for kernel in COMPILER.kernels(problem(n, k), 1, 8192, "full", here)
        )
        building.compile_all(list(wanted), {"deep_gemm": COMPILER}, here)
        warm = {directory(kernel).name for kernel in wanted}
    done = subprocess.run(
        [sys.executable, "-c", _RECORD],
        env={
            **os.environ,
            **environment,
            "DG_PRINT_CONFIGS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    pattern = (
        r"m=(\d+), n=(\d+), k=(\d+).*?num_sms=(\d+).*?block_m=(\d+), block_n=(\d+).*?"
        r"cluster_m=(\d+), cluster_n=(\d+).*?num_stages=(\d+)"
    )
    printed = [tuple(map(int, found)) for found in re.findall(pattern, done.stdout)]
    assert len(printed) > 100
    wrong = []
    for m, n, k, multiprocessors, *choice in printed:
        product = Product(n, k)
        tile = tiles(product)[int(choose(np.array([m]), product, multiprocessors)[0])]
        if choice != [tile.block_m, tile.block_n, tile.cluster_m, tile.cluster_n, tile.stages]:
            wrong.append((m, n, k, choice, tile))
    assert wrong == []
    assert set(os.listdir(tmp_path / "theirs" / "cache")) == warm


class TestTheOp:
    """The implementation itself, with a DeepGEMM that only notes what it is called with."""

    @pytest.fixture(autouse=True)
    def deep_gemm_here(self, package, monkeypatch):
        self.calls = calls = []
        self.watched = watched = []

        class Module:
            get_num_sms = staticmethod(lambda: 132)
            fp8_gemm_nt = staticmethod(lambda left, right, out: calls.append(left[1].stride()))

        original = deep_gemm_first_call.first_call

        def first_call(*arguments):
            watched.append(arguments)
            return original(*arguments)

        monkeypatch.setitem(sys.modules, "deep_gemm", Module())
        monkeypatch.setattr(deep_gemm_first_call, "_loaded", set())
        monkeypatch.setattr(deep_gemm_first_call, "first_call", first_call)
        monkeypatch.setattr(op, "compiled", set())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def call(self, m: int, layout: str, k: int = 256) -> None:
        a = torch.zeros(m, k, dtype=torch.float8_e4m3fn)
        b = torch.zeros(128, k, dtype=torch.float8_e4m3fn)
        groups = -(-k // 128)
        a_scale = empty_scale((m,), groups, layout, "cpu")
        op.block_scaled_mm(a, a_scale, b, torch.ones(1, groups), out_dtype=torch.bfloat16)

    @pytest.mark.parametrize("m", [1, 3, 4, 65])
    @pytest.mark.parametrize("layout", ["row_major", "column_major_tma"])
    def test_only_the_first_call_of_a_problem_is_watched(self, m, layout) -> None:
        for _ in range(3):
            self.call(m, layout)
        assert self.watched == [(None, m, 128, 256, layout == "row_major", False)]
        assert len(self.calls) == 3

    @pytest.mark.parametrize("layout", ["row_major", "column_major_tma"])
    def test_with_one_group_it_may_transpose(self, layout) -> None:
        self.call(1, layout, k=128)
        assert self.watched[0][4] is True

    def test_both_layouts_of_one_size_are_two_problems(self) -> None:
        for layout in ("row_major", "column_major_tma"):
            self.call(8, layout)
        assert len(self.watched) == 2

    def test_a_call_that_fails_is_watched_again(self, monkeypatch) -> None:
        def fail(*arguments):
            raise RuntimeError("no")

        monkeypatch.setattr(sys.modules["deep_gemm"], "fp8_gemm_nt", fail)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no"):
                self.call(8, "row_major")
        assert len(self.watched) == 2
