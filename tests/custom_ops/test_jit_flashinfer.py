"""FlashInfer's modules in a warm-up, with a stand-in for the package that describes and builds them."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from custom_ops import monitor, platform
from custom_ops.gemm import flashinfer_sm90
from custom_ops.jit import compilers, flashinfer, tracing
from custom_ops.jit.building import CompileError, compile_all
from custom_ops.jit.kernel import Kernel, Target
from custom_ops.moe import experts_flashinfer

HOPPER = Target("9.0a", 132, "580.0", "a stand-in")
PACKAGE = """
import os, pathlib

class Spec:
    is_aot = False

    def __init__(self, name):
        self.path = pathlib.Path(os.environ["STAND_IN_CACHE"]) / (name + ".so")

    def build(self, verbose):
        if os.environ.get("STAND_IN_FAILS"):
            raise RuntimeError("nvcc says no")
        with open(self.path.with_suffix(".built"), "a") as built:
            built.write(os.environ["FLASHINFER_CUDA_ARCH_LIST"] + "\\n")
        self.path.write_text("library")

    def get_library_path(self):
        return self.path

def {generator}():
    return Spec("{name}")
"""


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose modules are described by functions of the names that the real one has."""
    jit = tmp_path / "path" / "flashinfer" / "jit"
    jit.mkdir(parents=True)
    for folder in (jit.parent, jit):
        (folder / "__init__.py").touch()
    for name, target in flashinfer.MODULES.items():
        module, _, generator = target.partition(":")
        file = jit / f"{module.removeprefix('flashinfer.jit.')}.py"
        file.write_text(PACKAGE.format(generator=generator, name=name))
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "path"))
    monkeypatch.setenv("STAND_IN_CACHE", str(cache))
    monkeypatch.setenv("CUSTOM_OPS_CACHE_DIR", str(tmp_path / "markers"))
    monkeypatch.delenv("FLASHINFER_CUDA_ARCH_LIST", raising=False)
    has, version = platform.has_package, platform.package_version
    monkeypatch.setattr(platform, "has_package", lambda name: name == "flashinfer" or has(name))
    monkeypatch.setattr(
        platform, "package_version", lambda name: "0.6.6" if name == "flashinfer" else version(name)
    )
    return cache


def kernel(name: str) -> Kernel:
    return Kernel.of("fused_moe", "flashinfer", {"module": name})


def build(*kernels: Kernel, target: Target = HOPPER):
    found = compilers.find("flashinfer")
    assert found is not None
    return compile_all(kernels, {"flashinfer": found}, target)


@pytest.mark.parametrize("name", flashinfer.MODULES)
def test_a_module_is_built_once_where_the_package_puts_it(name: str, package: Path) -> None:
    assert build(kernel(name)).compiled == [kernel(name)]
    assert (package / f"{name}.so").read_text() == "library"
    again = build(kernel(name))
    assert again.compiled == []
    assert again.found == [kernel(name)]
    assert (package / f"{name}.built").read_text() == "9.0a\n"


@pytest.mark.parametrize("harm", ["remove", "truncate"])
def test_a_library_that_is_gone_or_cut_off_is_built_again(harm: str, package: Path) -> None:
    library = package / "fused_moe_90.so"
    build(kernel("fused_moe_90"))
    library.unlink() if harm == "remove" else library.write_text("lib")
    assert build(kernel("fused_moe_90")).compiled == [kernel("fused_moe_90")]
    assert library.read_text() == "library"


def test_another_version_or_architecture_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    build(kernel("fused_moe_90"))
    other = dataclasses.replace(HOPPER, arch="9.0")
    assert build(kernel("fused_moe_90"), target=other).compiled == [kernel("fused_moe_90")]
    monkeypatch.setattr(platform, "package_version", lambda name: "0.6.7")
    assert build(kernel("fused_moe_90")).compiled == [kernel("fused_moe_90")]


def test_what_the_package_says_when_it_fails_is_in_the_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STAND_IN_FAILS", "1")
    with pytest.raises(CompileError, match="nvcc says no"):
        build(kernel("fused_moe_90"))


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = flashinfer.COMPILER
    assert compiler.why_not(HOPPER) is None
    assert "is cpu" in str(compiler.why_not(Target("cpu")))
    monkeypatch.setattr(platform, "has_package", lambda name: False)
    assert "is not installed" in str(compiler.why_not(HOPPER))


@pytest.mark.parametrize("unnamed", ["", "compiles more by itself"])
def test_a_traced_call_names_its_module(unnamed: str) -> None:
    trace = tracing.Trace.__new__(tracing.Trace)
    trace.target, trace.kernels, trace.notes, trace._op = HOPPER, {}, {}, "fused_moe"
    flashinfer.note(trace, "fused_moe", "fused_moe_90", unnamed)
    assert list(trace.kernels) == [kernel("fused_moe_90")]
    assert list(trace.notes) == [unnamed] * bool(unnamed)
    trace.target, trace.kernels = Target("cpu"), {}
    flashinfer.note(trace, "fused_moe", "fused_moe_90", unnamed)
    assert not trace.kernels
    assert any("for Hopper" in why for why in trace.notes)


def test_the_product_names_its_module_in_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = []
    monkeypatch.setattr(tracing, "current", lambda: "a trace")
    monkeypatch.setattr(flashinfer, "note", lambda *said: noted.append(said))
    a, b = (torch.zeros(64, 128).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones(64, 1), torch.ones(1, 1)
    out = flashinfer_sm90.block_scaled_mm(a, one[0], b, one[1], out_dtype=torch.bfloat16)
    assert out.shape == (64, 64)
    (said,) = noted
    assert said == ("a trace", "block_scaled_mm", "fp8_blockscale_gemm_90", flashinfer_sm90.UNNAMED)
    assert "for every N x K" in flashinfer_sm90.UNNAMED
    assert "for every shape" in experts_flashinfer.UNNAMED


@pytest.mark.parametrize("place", ["FLASHINFER_JIT_DIR", "FLASHINFER_AOT_DIR"])
def test_a_module_that_is_built_after_a_warm_up_is_an_event(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jit = ModuleType("flashinfer.jit")
    jit.env = ModuleType("flashinfer.jit.env")
    for name in ("FLASHINFER_JIT_DIR", "FLASHINFER_AOT_DIR"):
        setattr(jit.env, name, tmp_path / name)
    for name, module in (("flashinfer", ModuleType("flashinfer")), ("flashinfer.jit", jit)):
        monkeypatch.setitem(sys.modules, name, module)
    try:
        flashinfer.first_call("fused_moe", "fused_moe_90")  # nobody warmed up
        assert monitor.events() == ()
        monitor.arm()
        flashinfer.first_call("fused_moe", "fused_moe_90")
        (event,) = monitor.events()
        assert (event.op, event.implementation, event.kernel) == (
            "fused_moe",
            "flashinfer",
            "fused_moe_90",
        )
        monitor.arm(strict=True)
        with pytest.raises(monitor.JitError, match="fused_moe_90"):
            flashinfer.first_call("fused_moe", "fused_moe_90")
        library = tmp_path / place / "fused_moe_90" / "fused_moe_90.so"
        library.parent.mkdir(parents=True)
        library.touch()
        flashinfer.first_call("fused_moe", "fused_moe_90")
        assert len(monitor.events()) == 1
    finally:
        monitor.disarm()
