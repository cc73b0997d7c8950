"""What every test here relies on: a clean environment, Triton's interpreter without a GPU, profiles.

Marker `gpu`: needs an NVIDIA GPU; skipped without one, with that reason. Hypothesis profiles: `ci` (25
examples a test, the same ones every time) and `nightly` (200, new ones every time), chosen with
HYPOTHESIS_PROFILE.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

for _name in list(os.environ):
    if _name.startswith(("FUSION_PASSES", "CUSTOM_OPS_DISABLE")):
        del os.environ[_name]  # no setting of the shell leaks into a test

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU:
    # Before anything imports Triton: it reads this when a kernel is declared.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A first example pays for imports, Triton or Inductor: no deadline, no health check of the time.
_slow = [HealthCheck.too_slow]
settings.register_profile(
    "ci", max_examples=25, deadline=None, derandomize=True, suppress_health_check=_slow
)
settings.register_profile(
    "nightly", max_examples=200, deadline=None, print_blob=True, suppress_health_check=_slow
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """0 / 0 and Inf / Inf are part of the contract; NumPy, under Triton's interpreter, warns of them."""
    for what in ("invalid value", "divide by zero", "overflow"):
        rule = f"ignore:{what} encountered:RuntimeWarning:triton.runtime.interpreter"
        config.addinivalue_line("filterwarnings", rule)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and say so."""
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU and a CUDA build of torch: make test-gpu")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
