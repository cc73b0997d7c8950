"""The bench of warm-up as far as it goes without a GPU: what it counts, and how it judges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import warmup
from bench.warmup import Lab, rows


@pytest.fixture
def raw() -> dict[str, Any]:
    """The answers of a run that meets every bar."""
    return {
        "cold": {"calls": {"50": 6.0, "300": 12.0}},
        "parallel": {"wall": 20.0, "compiled": 35, "workers": 16},
        "serial": {"seconds": 48.0, "kernels": 8},
        "sweep": {
            "events": [],
            "new_folders": [],
            "calls": 580,
            "slowest": 0.02,
            "median": 0.004,
            "second_start": 1.5,
            "found_seconds": 0.1,
            "nvcc": 0,
            "compiled": 0,
            "graphs": 3,
            "more_graphs": 0,
            "graphs_of_stock": 4,
            "more_graphs_of_stock": 0,
        },
        "triton": {
            "events": [],
            "more_graphs": 0,
            "calls": 200,
            "slowest": 0.03,
            "median": 0.01,
            "compiled": 22,
            "traced_seconds": 9.0,
            "wall": 12.0,
            "notes": [],
        },
        "together": {"compiled": 35, "nvcc": 35, "digests": 1, "errors": [], "seconds": 25.0},
        "killed": {"killed": True, "whole": True, "survived": 3, "compiled": 10},
    }


def test_a_run_that_meets_every_bar_misses_none(raw) -> None:
    assert [row.missed for row in rows(raw)] == [[]] * 8
    assert [row.errors for row in rows(raw)] == [{}] * 8


@pytest.mark.parametrize(
    ("phase", "name", "value", "bar"),
    [
        ("sweep", "events", [{"op": "x"}], "no_event"),
        ("sweep", "new_folders", ["kernel.x"], "no_new_folder"),
        ("sweep", "slowest", 0.05, "of_ten_medians"),
        ("sweep", "more_graphs", 1, "no_graph"),
        ("sweep", "graphs", 5, "no_more_than_stock"),
        ("triton", "events", [{"op": "x"}], "no_event"),
        ("triton", "more_graphs", 1, "no_graph"),
        ("triton", "slowest", 0.11, "of_ten_medians"),
        ("triton", "notes", ["not covered"], "covered"),
        ("triton", "compiled", 0, "covered"),
        ("sweep", "second_start", 3.1, "of_three_seconds"),
        ("sweep", "nvcc", 1, "no_compiler"),
        ("parallel", "wall", 36.0, "of_serial"),
        ("together", "nvcc", 36, "once"),
        ("together", "compiled", 34, "once"),
        ("together", "digests", 2, "equal"),
        ("together", "errors", ["no"], "no_error"),
        ("killed", "whole", False, "recovered"),
        ("killed", "killed", False, "killed"),
    ],
)
def test_each_bar_can_be_missed(raw, phase, name, value, bar) -> None:
    raw[phase][name] = value
    missed = [sentence for row in rows(raw) for sentence in row.missed]
    assert len(missed) == 1
    assert missed[0].startswith(f"{bar} is ")


@pytest.mark.parametrize(
    "phase", ["cold", "parallel", "sweep", "triton", "together", "killed", "serial"]
)
def test_a_phase_that_failed_is_an_error(raw, phase) -> None:
    raw[phase] = {"failed": "out of memory"}
    assert "out of memory" in [text for row in rows(raw) for text in row.errors.values()]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    nvcc = tmp_path / "real-nvcc"
    nvcc.write_text('#!/bin/sh\necho "it got $*"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("DG_JIT_NVCC_COMPILER", str(nvcc))
    (tmp_path / "lab").mkdir()
    return Lab(tmp_path / "lab")


def test_the_wrapper_counts_compilations_and_runs_the_compiler(lab: Lab) -> None:
    assert lab.compilations() == 0
    for arguments in (["--version"], ["kernel.cu", "-cubin", "-o", "x"]):
        said = subprocess.run([lab.shim, *arguments], capture_output=True, text=True, check=True)
        assert said.stdout == f"it got {' '.join(arguments)}\n"
    assert lab.compilations() == 1


def test_caches_of_a_new_name_hold_what_was_built_and_no_kernel(lab: Lab) -> None:
    ours = Path(lab.environment("cold")["CUSTOM_OPS_CACHE_DIR"])
    (ours / "jit").mkdir(parents=True)
    (ours / "reports").mkdir()
    found = lab.environment("warm")
    assert os.listdir(found["CUSTOM_OPS_CACHE_DIR"]) == ["reports"]
    assert not Path(found["DG_JIT_CACHE_DIR"]).exists()


def test_results_name_no_folder_of_the_machine(tmp_path: Path) -> None:
    said = {"failed": f"{tmp_path}/x and {warmup.ROOT}/y and {sys.prefix}/z"}
    assert warmup._without_paths(said, str(tmp_path))["failed"].split()[::2] == [
        "CACHE/x",
        "./y",
        "PYTHON/z",
    ]
    assert json.dumps(said)
