"""Experts in CUDA C++ for Hopper as whole pipelines, and what they all refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from custom_ops.moe import choice
from custom_ops.moe.parts import Experts, Pipeline

# changes of a Shape that is taken, and what is said of them
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"activation": "relu2"}, "applies silu_mul of halves"),
    ({"interleaved": True}, "applies silu_mul of halves"),
    ({"biased": True}, "adds no bias"),
    ({"hidden": 192}, "needs hidden_size a multiple of 128, it is 192"),
    ({"intermediate": 64}, "needs intermediate_size a multiple of 128, it is 64"),
    ({"transposed": True}, "reads contiguous weights, the strides of gate_up"),
]


def pipeline_of(experts: Experts) -> Pipeline:
    return choice.pipelines()[experts.name]


def here(experts: Experts) -> Pipeline:
    """The pipeline, where it runs; skips the test elsewhere."""
    if reason := experts.unavailable(torch.device("cuda")):
        pytest.skip(reason)
    return pipeline_of(experts)
