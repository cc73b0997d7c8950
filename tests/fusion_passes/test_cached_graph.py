"""A graph from Inductor's cache never reaches the pass; what it calls must be ready all the same."""

from __future__ import annotations

import pytest
import torch

import custom_ops
from custom_ops.library import Op
from fusion_passes import backend
from fusion_passes.compiled_pattern import CompiledPattern
from fusion_passes.fusion import Pattern, Scalar, Tensor
from fusion_passes.manager import FusionPass
from fusion_passes.reporting import Report, Site


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with a GPU as far as the plugin can see, and a record of what it loads."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Op, "usable", lambda self, device: ("cuda", "reference"))
    monkeypatch.setattr(custom_ops.library, "load_cuda", lambda: calls.append("cuda"))
    return calls


def test_the_cuda_ops_are_loaded_before_the_cache_is_asked(loaded: list[str]) -> None:
    assert FusionPass().uuid()
    assert loaded == ["cuda"]


def test_they_are_not_loaded_where_they_cannot_run(
    loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Op, "usable", lambda self, device: ("triton", "reference"))
    FusionPass().uuid()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    FusionPass().uuid()
    assert loaded == []


def test_a_graph_that_calls_them_is_not_found_where_they_cannot_run(
    loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the kernels were built on another machine, and this one has no nvcc."""
    with_them = FusionPass().uuid()
    assert with_them == FusionPass().uuid()
    monkeypatch.setattr(Op, "usable", lambda self, device: ("triton", "reference"))
    assert FusionPass().uuid() != with_them


def test_the_implementations_that_a_stored_report_names_are_prepared(monkeypatch) -> None:
    prepared: list[str] = []
    monkeypatch.setattr(
        "custom_ops.implementation.Implementation.prepare", lambda self: prepared.append(self.name)
    )
    site = Site("block_scaled_linear", "model.mlp", implementations=("block_scaled_mm:deep_gemm",))
    backend._prepare(Report(sites=[site, site]))
    assert prepared == ["deep_gemm"]


def test_the_interpreter_of_triton_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    interpreted = FusionPass().uuid()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert FusionPass().uuid() != interpreted


@pytest.mark.parametrize("kind", ["sizes", "scalars"])
def test_a_pattern_of_too_many_names_is_refused(kind: str) -> None:
    if kind == "sizes":
        inputs = {f"x{i}": Tensor(f"size_{i}") for i in range(9)}
    else:
        inputs = {"x0": Tensor("size"), **{f"s{i}": Scalar() for i in range(5)}}
    with pytest.raises(ValueError, match=f"{kind}; accepted: up to"):
        CompiledPattern(Pattern(lambda **values: values["x0"] + 1, inputs, name="many"))
