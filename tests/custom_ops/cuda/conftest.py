"""The CUDA C++ kernels against the references, on a GPU.

Small sizes with all keywords, drawn by hypothesis, are in test_fused.py and quantization/test_schemes.py; here are
those that take another kernel, another address, or more than 2^31 elements.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from custom_ops import library


@pytest.fixture(scope="module", autouse=True)
def ops() -> Iterator[object]:
    library.load_cuda()
    torch.manual_seed(0)
    yield torch.ops.custom_ops_cuda
    torch.cuda.empty_cache()
