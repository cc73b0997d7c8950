"""A DeepGEMM for tests: a folder of headers, and an nvcc that counts its calls and compiles nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from custom_ops.jit import building, deep_gemm, deep_gemm_names
from custom_ops.jit.deep_gemm import COMPILER
from custom_ops.jit.kernel import Kernel, Target

H100 = Target("9.0a", 132, "580.0", "an H100")


@pytest.fixture
def deep_gemm_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A DeepGEMM of the known version, as far as the file system goes."""
    folder = tmp_path / "deep_gemm"
    headers = folder / "include" / "deep_gemm" / "impls"
    headers.mkdir(parents=True)
    (headers / "sm90_fp8_gemm_1d2d.cuh").write_text("#include <deep_gemm/impls/common.cuh>\n")
    (headers / "smxx_layout.cuh").write_text("#include <cutlass/x.h>\n")
    (headers / "common.cuh").write_text("// nothing\n")
    (folder / "_C.so").write_bytes(b"library")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        f"#!{sys.executable} -IS\n"
        "import pathlib, sys\n"
        f"log = open({str(tmp_path / 'calls')!r}, 'a')\n"
        "if sys.argv[1] == '--version':\n"
        "    log.write('version\\n'); print('Cuda compilation tools, release 13.0, V13.0.88')\n"
        "else:\n"
        "    log.write('compile\\n')\n"
        "    out = sys.argv[sys.argv.index('-o') + 1]\n"
        "    pathlib.Path(out).write_bytes(b'cubin of ' + open(sys.argv[1], 'rb').read())\n"
    )
    nvcc.chmod(0o755)
    for name, value in {
        "CUSTOM_OPS_CACHE_DIR": tmp_path / "ours",
        "DG_JIT_CACHE_DIR": tmp_path / "theirs",
        "DG_JIT_NVCC_COMPILER": nvcc,
    }.items():
        monkeypatch.setenv(name, str(value))
    for name in [name for name in os.environ if name.startswith("DG_JIT_")]:
        if name not in ("DG_JIT_CACHE_DIR", "DG_JIT_NVCC_COMPILER"):
            monkeypatch.delenv(name)
    for module in (deep_gemm, deep_gemm_names):
        monkeypatch.setattr(module, "package", lambda: folder)
    monkeypatch.setattr(deep_gemm.platform, "package_version", lambda name: "0.1.4")
    names = deep_gemm_names
    for cached in (names._version, names._file_hash, names._include_hash, names.library_hash):
        cached.cache_clear()
    yield folder
    names.library_hash.cache_clear()


def calls(package: Path) -> list[str]:
    """What the nvcc was called for: "version" or "compile"."""
    path = package.parent / "calls"
    return path.read_text().split() if path.exists() else []


def build(kernels: Iterable[Kernel]) -> building.Outcome:
    """Compile kernels with the compiler of the fixture."""
    return building.compile_all(list(kernels), {"deep_gemm": COMPILER}, H100)
