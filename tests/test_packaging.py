"""What is installed: entry points, package data, extras; and that CI, make and pre-commit run the same checks."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import custom_ops
import fusion_passes
from fusion_passes import torch_internals

ROOT = Path(__file__).parent.parent
METADATA = importlib.metadata.metadata("fusion-passes")


def test_the_backend_is_found_without_an_import():
    code = "import torch; torch._dynamo.lookup_backend('fusion_passes'); print('found')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "found\n", done.stderr
    assert "fusion_passes" in torch.compiler.list_backends()


def test_importing_is_free():
    """No CUDA, no Inductor, no optional package, no compiler: 'Importing ... never compiles'."""
    code = (
        "import sys, torch; before = set(sys.modules); import fusion_passes, custom_ops; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new & {'triton', 'deep_gemm', 'flashinfer', 'transformers', 'pydantic', 'typer', 'rich'}), "
        "'torch._inductor.compile_fx' in sys.modules, torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[] False False\n", done.stderr


def test_the_console_script():
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="fusion-passes")
    assert script.value == "fusion_passes.cli:app"


@pytest.mark.parametrize("package", [fusion_passes, custom_ops])
def test_types_are_published(package):
    assert (Path(package.__file__).parent / "py.typed").exists()


@pytest.mark.slow
def test_a_wheel_holds_sources_of_kernels_and_tables(tmp_path):
    clone = tmp_path / "clone"  # a build leaves files beside its sources
    for package in ("custom_ops", "fusion_passes"):
        shutil.copytree(
            ROOT / package, clone / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        tmp_path,
        clone,
    ]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("custom_ops", "fusion_passes"):
        wanted = {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / package).rglob("*")
            if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp", ".json")
            or path.name == "py.typed"
        }
        assert wanted - names == set()
    assert not [name for name in names if name.startswith(("tests", "bench"))]


@pytest.mark.slow
def test_a_source_distribution_holds_the_pages_that_the_readme_leads_to(tmp_path):
    clone = tmp_path / "clone"
    for package in ("custom_ops", "fusion_passes", "docs"):
        shutil.copytree(
            ROOT / package, clone / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, clone)
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=clone, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (archive,) = (clone / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").iterdir()} <= names
    assert "README.md" in names


def test_requirements():
    assert METADATA["Requires-Python"] == ">=3.10"
    assert METADATA["License-Expression"] == "Apache-2.0"
    requirements = METADATA.get_all("Requires-Dist")
    assert "torch>=2.11" in requirements
    assert {"models", "lora", "deepgemm", "flashinfer", "test", "bench", "dev"} == set(
        METADATA.get_all("Provides-Extra")
    )
    (triton,) = [each for each in requirements if each.startswith("triton")]
    assert "x86_64" in triton
    assert "Linux" in triton


def test_ci_runs_lint_and_test():
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script
    assert script.rstrip().endswith("make lint test")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_pre_commit_runs_what_ci_runs():
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"entry: (.*)", config) == ["make lint"]
    assert re.findall(r"repo: (.*)", config) == ["local"]


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_make_installs_a_torch_for_a_cpu_without_a_gpu(target, tmp_path):
    """A fresh clone with no .venv: what make would do, on a machine without nvidia-smi and on one with it."""
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    plan = _plan(tmp_path, target, "GPU=")
    assert "torch==2.13.0" in plan
    assert "-m venv .venv" in plan
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        assert "triton==3.7.1" in plan
    plan = _plan(tmp_path, target, "GPU=/usr/bin/nvidia-smi")
    (oldest, newest) = torch_internals.SUPPORTED
    assert "torch>={}.{},<{}.{}'".format(*oldest, newest[0], newest[1] + 1) in plan
    assert "triton==" not in plan
    assert "--index-url somewhere" in _plan(tmp_path, target, "TORCH_INDEX=somewhere")


def test_make_names_no_registry():
    text = (ROOT / "Makefile").read_text() + (ROOT / "pyproject.toml").read_text()
    assert "://" not in text


def test_make_says_so_without_a_python(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    done = subprocess.run(
        ["make", "-C", tmp_path, "test", "PYTHON="], capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "Python >= 3.10 is needed" in done.stderr


def _plan(folder, target, *arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", "-n", "-C", str(folder), target, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60, env=environment
    ).stdout
