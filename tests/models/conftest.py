"""Fixtures of the tests with whole models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a CPU: the reference implementations; Triton's interpreter takes minutes for a model."""
    monkeypatch.setenv("FUSION_PASSES_ALLOW_REFERENCE", "1")
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "triton")
    yield
    torch.compiler.reset()
