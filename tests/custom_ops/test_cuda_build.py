"""The build cache of the CUDA C++ kernels: with a stand-in for nvcc, and with the real one where there is one."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from custom_ops import cuda_build, library, platform

ARCH = "9.0a"

# Says that it is CUDA 13.0, logs each call, and writes the file named after -o. With a file `wait` beside the log it
# hangs, with `fail` it fails.
STAND_IN = """#!/bin/sh
home={home}
[ "$1" = --version ] && echo "Cuda compilation tools, release 13.0, V13.0.88" && exit 0
echo "$@" >> $home/log
[ -e $home/wait ] && exec sleep 60
[ -e $home/fail ] && echo "group_quant.cu(7): error: boom" && exit 3
while [ $# -gt 0 ]; do
  [ "$1" = -o ] && echo "made by the stand-in" > "$2"
  shift
done
"""


@pytest.fixture
def toolkit() -> Iterator[None]:
    cached = platform.toolkit  # a test may put something else in its place
    cached.cache_clear()
    yield
    cached.cache_clear()


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toolkit: None) -> Path:
    """The home of a stand-in for nvcc, and an empty cache."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    script = home / "bin" / "nvcc"
    script.write_text(STAND_IN.format(home=home))
    script.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("CUSTOM_OPS_CACHE_DIR", str(tmp_path / "cache"))
    return home


def links(home: Path) -> int:
    log = home / "log"
    return sum(" -shared " in line for line in log.read_text().splitlines()) if log.exists() else 0


def built(arch: str = ARCH) -> Path:
    return cuda_build.cache_dir() / cuda_build._name(arch) / cuda_build.LIBRARY


def test_builds_once(nvcc: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    assert cuda_build.build([ARCH], lambda *step: steps.append(step)) == cuda_build.cache_dir()
    assert built().read_text() == "made by the stand-in\n"
    assert [done for done, _, _ in steps] == list(range(1, len(steps) + 1))
    assert steps[-1] == (len(steps), len(steps), f"{cuda_build.LIBRARY} for {ARCH}")
    compiled = [line for line in (nvcc / "log").read_text().splitlines() if " -c " in line]
    assert (
        len(compiled)
        == len(steps) - 1
        == len([p for p in cuda_build.sources() if p.suffix in (".cu", ".cpp")])
    )
    cuda_build.build([ARCH], lambda *step: pytest.fail(f"built again: {step}"))
    assert links(nvcc) == 1


def test_each_architecture_is_a_build(nvcc: Path) -> None:
    cuda_build.build(["8.0", "9.0a", "9.0a"])
    assert links(nvcc) == 2
    log = (nvcc / "log").read_text()
    assert "arch=compute_80,code=sm_80" in log
    assert "arch=compute_90a,code=sm_90a" in log
    names = cuda_build.status().built
    assert [name.split("-")[0] for name in names] == ["sm_80", "sm_90a"]


@pytest.mark.parametrize("arch", ["sm_90", "90", "9.0x", ""])
def test_misspelt_architecture(nvcc: Path, arch: str) -> None:
    with pytest.raises(ValueError, match=r"accepted: '8\.0', '9\.0a'"):
        cuda_build.build([arch])


def test_key_holds_sources_and_flags(
    nvcc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {cuda_build._name(ARCH), cuda_build._name("8.0")}
    assert f"torch{torch.__version__}-cuda13.0" in cuda_build._name(ARCH)
    copy = tmp_path / "csrc"
    shutil.copytree(cuda_build.CSRC, copy)
    monkeypatch.setattr(cuda_build, "CSRC", copy)
    assert cuda_build._name(ARCH) in names
    for path in cuda_build.sources():
        path.write_text(path.read_text() + "\n")
        names.add(cuda_build._name(ARCH))
    monkeypatch.setattr(cuda_build, "FLAGS", (*cuda_build.FLAGS, "-g"))
    names.add(cuda_build._name(ARCH))
    assert len(names) == 3 + len(cuda_build.sources())


def _build_at(barrier: multiprocessing.synchronize.Barrier) -> None:
    barrier.wait()
    cuda_build.build([ARCH])


# pytest has other threads, which a child that only compiles does not miss.
FORKS = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@FORKS
def test_eight_processes_compile_once(nvcc: Path) -> None:
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(8)
    processes = [fork.Process(target=_build_at, args=(barrier,)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    assert links(nvcc) == 1
    assert built().exists()


@FORKS
def test_killed_builder(nvcc: Path) -> None:
    (nvcc / "wait").touch()
    builder = os.fork()
    if builder == 0:
        os.setsid()
        cuda_build.build([ARCH])
        os._exit(0)
    deadline = time.monotonic() + 30
    while not (nvcc / "log").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    leavings = list(cuda_build.cache_dir().glob(".sm_*"))
    os.kill(builder, signal.SIGKILL)
    os.waitpid(builder, 0)
    assert len(leavings) == 1
    (nvcc / "wait").unlink()
    cuda_build.build([ARCH])
    os.killpg(builder, signal.SIGKILL)  # the compilers that it left behind
    assert built().read_text() == "made by the stand-in\n"
    assert not list(cuda_build.cache_dir().glob(".sm_*"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5])


DAMAGE = {
    "truncated library": lambda: truncate(built()),
    "no library": lambda: built().unlink(),
    "no manifest": lambda: (built().parent / cuda_build.MANIFEST).unlink(),
    "truncated manifest": lambda: truncate(built().parent / cuda_build.MANIFEST),
    "another manifest": lambda: (built().parent / cuda_build.MANIFEST).write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_build_is_built_again(nvcc: Path, damage: str) -> None:
    cuda_build.build([ARCH])
    DAMAGE[damage]()
    assert cuda_build.status().built == ()
    cuda_build.build([ARCH])
    assert links(nvcc) == 2
    assert cuda_build.status().built == (built().parent.name,)


def test_compiler_error_is_shown(nvcc: Path) -> None:
    (nvcc / "fail").touch()
    with pytest.raises(cuda_build.BuildError, match=r"exit code 3\n.*(?s:.)*error: boom"):
        cuda_build.build([ARCH])
    assert [p.suffix for p in cuda_build.cache_dir().iterdir()] == [".lock"]
    (nvcc / "fail").unlink()
    cuda_build.build([ARCH])
    assert built().exists()


def test_without_nvcc(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "cuda_capability", lambda device=None: (9, 0))
    assert cuda_build.why_not() is None
    cuda_build.build()
    made = built()
    monkeypatch.setattr(platform, "toolkit", lambda: None)
    assert cuda_build.why_not() is None  # built ahead
    assert cuda_build._find(ARCH) == made.parent
    assert cuda_build.status().nvcc is None
    made.unlink()
    assert "there is no nvcc" in (cuda_build.why_not() or "")
    with pytest.raises(RuntimeError, match="no nvcc"):
        cuda_build.build([ARCH])
    with pytest.raises(RuntimeError, match="no nvcc"):
        cuda_build.load()


def test_without_a_gpu_that_can(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "cuda_capability", lambda device=None: None)
    assert cuda_build.why_not() == "there is no CUDA GPU here"
    with pytest.raises(RuntimeError, match="no GPU here to take it from"):
        cuda_build.build()
    monkeypatch.setattr(platform, "cuda_capability", lambda device=None: (7, 5))
    assert "8.0 or newer, this GPU has 7.5" in (cuda_build.why_not() or "")


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUSTOM_OPS_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cuda_build.cache_dir() == tmp_path / "custom_ops"
    monkeypatch.setenv("CUSTOM_OPS_CACHE_DIR", str(tmp_path / "here"))
    assert cuda_build.cache_dir() == tmp_path / "here"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container that runs under any number: kernels are built all the same."""

    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("CUSTOM_OPS_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert cuda_build.cache_dir() == Path(tempfile.gettempdir()) / f"custom_ops-{os.getuid()}"


def test_a_cache_that_cannot_be_written(nvcc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is a reason that a report and the doctor show, unless what it would hold was built ahead."""
    monkeypatch.setattr(platform, "cuda_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(cuda_build.os, "access", lambda path, mode: False)
    assert "cannot be written to; set CUSTOM_OPS_CACHE_DIR" in (cuda_build.why_not() or "")
    with pytest.raises(
        RuntimeError, match=r"CUDA C\+\+ kernels cannot be used: .* cannot be written"
    ):
        cuda_build.load()
    monkeypatch.undo()
    monkeypatch.setenv("CUSTOM_OPS_CACHE_DIR", str(nvcc / "log" / "inside of a file"))
    (nvcc / "log").write_text("")
    assert "cannot be made (Not a directory)" in (
        cuda_build.cannot_write(cuda_build.cache_dir()) or ""
    )


def test_what_was_built_ahead_needs_no_cache_that_can_be_written(
    nvcc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "cuda_capability", lambda device=None: (9, 0))
    cuda_build.build([ARCH])
    monkeypatch.setattr(cuda_build.os, "access", lambda path, mode: False)
    assert cuda_build.why_not() is None


# ---- the real compiler ------------------------------------------------------------------------------------------


@pytest.fixture
def real_nvcc(toolkit: None) -> None:
    if platform.toolkit() is None:
        pytest.skip("needs the CUDA toolkit's nvcc")


def compile_for(arch: str, directory: Path) -> Path:
    compiled = [p for p in cuda_build.sources() if p.suffix in (".cu", ".cpp")]
    cuda_build.compile_library(directory / cuda_build.LIBRARY, arch, compiled)
    return directory / cuda_build.LIBRARY


@pytest.mark.parametrize("arch", [a for a in cuda_build.TESTED_ARCHS if a != ARCH])
def test_sources_compile(
    real_nvcc: None, arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_build, "FLAGS", (*cuda_build.FLAGS, "-Werror=all-warnings"))
    assert compile_for(arch, tmp_path).stat().st_size > 100_000


# What a CUDA build of torch has and a CPU build lacks, so that the library loads into either.
STUBS = """
extern "C" {
int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
int aoti_torch_create_cuda_guard(int, void**) { return 1; }
int aoti_torch_delete_cuda_guard(void*) { return 1; }
}
"""
SHOW_SCHEMAS = """
import ctypes, sys, torch
if len(sys.argv) > 2:
    ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[1])
for schema in sorted(map(str, torch._C._jit_get_all_schemas())):
    if schema.startswith("custom_ops_cuda::"):
        print(schema)
"""


def test_compiled_library_loads_with_the_schemas_of_the_ops(
    real_nvcc: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tuned for this architecture: a register spilled to memory is an error too.
    strict = ("-Werror=all-warnings", "-Xptxas=-warn-spills,-Werror")
    monkeypatch.setattr(cuda_build, "FLAGS", (*cuda_build.FLAGS, *strict))
    arguments = [compile_for(ARCH, tmp_path)]
    if torch.version.cuda is None:
        source, stubs = tmp_path / "stubs.cpp", tmp_path / "stubs.so"
        source.write_text(STUBS)
        subprocess.run(["g++", "-shared", "-fPIC", source, "-o", stubs], check=True)
        arguments.append(stubs)
    shown = subprocess.run(
        [sys.executable, "-c", SHOW_SCHEMAS, *arguments], capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    found = {
        line.partition("(")[0].removeprefix("custom_ops_cuda::"): line
        for line in shown.stdout.splitlines()
    }
    expected = {
        name: str(op.overload._schema).replace("custom_ops::", "custom_ops_cuda::", 1)
        for name, op in library.ops().items()
        if any(each.name == "cuda" and each.direct for each in op.implementations)
    }
    # see custom_ops/lora/hopper.py, custom_ops/moe/prepare.py and custom_ops/moe/experts_hopper*.py
    called_by_others = {
        "lora_batch_expand",
        "lora_batch_shrink",
        "lora_decode",
        "lora_prefill",
        "moe_align_group_quant",
        "moe_fp8_down",
        "moe_fp8_gate_up",
        "moe_grouped_down",
        "moe_grouped_gate_up",
    }
    assert found.keys() == expected.keys() | called_by_others
    assert {name: found[name] for name in expected} == expected
