"""Fixtures of the tests of graph passes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fusion_passes import reporting


@pytest.fixture(scope="module")
def references() -> Iterator[None]:
    """The graph is the point, not the kernel: references run at once, the Triton interpreter takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUSTOM_OPS_DISABLE", "triton,deep_gemm,cuda")
        yield
    torch.compiler.reset()


@pytest.fixture
def fresh_reports() -> Iterator[None]:
    """No report and no compiled graph of another test is left."""
    torch.compiler.reset()
    reporting.reset_reports()
    yield
    torch.compiler.reset()
    reporting.reset_reports()


@pytest.fixture(scope="module")
def empty_caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Inductor's and our own caches hold nothing from before."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("TORCHINDUCTOR_CACHE_DIR", "CUSTOM_OPS_CACHE_DIR"):
            patch.setenv(variable, str(tmp_path_factory.mktemp(variable.lower())))
        yield
