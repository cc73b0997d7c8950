"""A process group of this process alone."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def alone(tmp_path):
    """The name of a group of one rank."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD.group_name
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def dynamo_as_it_comes():
    """parallelize_experts_ turns a setting of Dynamo on, for the process."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=False):
        yield


@pytest.fixture(autouse=True)
def no_triton(monkeypatch):
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "triton")  # its interpreter takes seconds for an op
