"""Operands that do not begin on 16 bytes, which the Hopper kernels read by: another implementation takes them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from custom_ops.lora import hopper, ways

N, K, RANK = 64, 128, 16
ROWS = ({"kind": "single", "n": N, "k": K, "rank": RANK, "m": 16, "us": {"decode 64x2": 1.0}},)


@pytest.fixture(autouse=True)
def the_kernel_wins(monkeypatch):
    monkeypatch.setattr(ways, "table", lambda: ROWS)
    ways.ranked.cache_clear()
    yield
    ways.ranked.cache_clear()


def placed(rows: int, columns: int, first: int, beside: int) -> Tensor:
    """A bfloat16 matrix that begins `first` elements into its memory, with `beside` elements between its rows."""
    pitch = columns + beside
    memory = torch.empty(first + rows * pitch + 64, dtype=torch.bfloat16)
    assert memory.data_ptr() % 16 == 0
    return memory.as_strided((rows, columns), (pitch, 1), first)


@pytest.mark.parametrize("name", ["x", "weight", "a", "b"])
@given(first=st.integers(0, 17), beside=st.integers(0, 17))
def test_rows_that_are_not_on_16_bytes_are_refused(name, first, beside):
    sizes = {"x": (16, K), "weight": (N, K), "a": (RANK, K), "b": (N, RANK)}
    operands = {each: placed(*size, 0, 0) for each, size in sizes.items()}
    operands[name] = placed(*sizes[name], first, beside)
    x, weight, a, b = operands.values()
    reason = hopper.unsupported_single(x, weight, None, a, b, 1.0)
    if first % 8 == 0 and beside % 8 == 0:
        assert reason is None
    else:
        assert f"needs contiguous rows on 16 bytes; {name} has strides" in reason
