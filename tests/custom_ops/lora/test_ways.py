"""Which way the table takes, and what the kernels for Hopper refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from custom_ops import library
from custom_ops.lora import hopper, hopper_batch, ways
from tests.custom_ops.helpers import fake_mode

ROWS = (
    {
        "kind": "single",
        "n": 4096,
        "k": 4096,
        "rank": 16,
        "m": 1,
        "us": {"apart": 17.0, "decode 64x2": 11.0},
    },
    {
        "kind": "single",
        "n": 4096,
        "k": 4096,
        "rank": 16,
        "m": 1024,
        "us": {"apart": 60.0, "prefill": 55.0, "fused": 56.0},
    },
    {
        "kind": "single",
        "n": 1024,
        "k": 1024,
        "rank": 16,
        "m": 64,
        "us": {"apart": 5.0, "decode 64x4": 6.0},
    },
    {
        "kind": "batch",
        "n": 4096,
        "k": 4096,
        "rank": 16,
        "m": 64,
        "us": {"apart": 30.0, "decode 128x4": 20.0},
    },
)


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(ways, "table", lambda: ROWS)
    ways.ranked.cache_clear()
    yield
    ways.ranked.cache_clear()


@pytest.mark.parametrize(
    ("call", "order"),
    [
        (("single", 1, 4096, 4096, 16), ("decode 64x2", "apart")),
        (("single", 2, 4096, 4096, 16), ("prefill", "fused", "apart")),
        (("single", 9000, 4096, 4096, 16), ("prefill", "fused", "apart")),
        (("single", 40, 512, 1024, 8), ("apart", "decode 64x4")),
        # another size was measured with such a number of tokens, this one was not
        (("single", 1, 1024, 4096, 16), ("decode 64x2", "apart")),
        (("single", 1000, 1024, 2048, 16), ("prefill", "fused", "apart")),
        (("single", 60, 1024, 1024, 32), ("apart", "decode 64x4")),
        (("batch", 1, 1, 1, 1), ("decode 128x4", "apart")),
        (("single float32", 1, 4096, 4096, 16), ()),
    ],
)
def test_the_nearest_row_decides(rows, call, order):
    assert ways.ranked(*call) == order


def test_a_way_that_cannot_be_taken_is_passed_over(rows):
    assert ways.best("single", 1024, 4096, 4096, 16, ("fused", "apart")) == "fused"
    assert ways.best("single", 1, 4096, 4096, 16, ("prefill",)) == "apart"


def test_the_shipped_table_is_whole():
    for row in ways.table():
        assert row["kind"] in ways.KINDS
        assert all(row[name] > 0 for name in ("n", "k", "rank", "m"))
        assert set(row["us"]) <= set(ways.WAYS)
        assert row["us"]
        assert all(us > 0 for us in row["us"].values())


def single(tokens=4, columns=4096, channels=4096, rank=16, dtype=torch.bfloat16, step=1):
    x = torch.zeros(tokens, channels * step, dtype=torch.bfloat16)[:, ::step]
    weight = torch.zeros(columns, channels, dtype=torch.bfloat16)
    a, b = torch.zeros(rank, channels, dtype=dtype), torch.zeros(columns, rank, dtype=dtype)
    return x, weight, None, a, b, 1.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": 1}, None),
        ({"tokens": 1000}, None),
        ({"tokens": 0}, "there is nothing to multiply"),
        ({"columns": 4100}, "needs N, H and rank to be multiples of 8, they are 4100, 4096 and 16"),
        ({"rank": 12}, "multiples of 8"),
        ({"tokens": 1000, "dtype": torch.float32}, "the table has Triton for 1000 tokens"),
        ({"tokens": 1, "step": 2}, r"needs contiguous rows on 16 bytes; x has strides"),
    ],
)
def test_what_the_kernels_for_hopper_take(rows, changes, reason):
    with fake_mode():
        answer = hopper.unsupported_single(*single(**changes))
    assert answer is None if reason is None else reason in str(answer)


@pytest.mark.parametrize(
    ("widths", "tokens", "way"),
    [
        ((256, 128), 9, "decode 128x4"),
        ((192, 192), 9, "apart"),
        ((128,) * 5, 9, "apart"),
        ((384,), 200, "apart"),
    ],
)
def test_slices_that_the_decode_kernel_takes(rows, widths, tokens, way):
    a = [torch.empty(2, 16, 64, device="meta") for _ in widths]
    b = [torch.empty(2, width, 16, device="meta") for width in widths]
    weight = torch.empty(sum(widths), 64, device="meta")
    x = torch.empty(tokens, 64, device="meta")
    assert hopper.way_of("batch", x, weight, a, b) == way


@given(st.integers(0, 5000), st.integers(1, 100).map(lambda eights: 8 * eights * 37))
def test_the_parts_of_the_shrink_in_tiles(tiles, channels):
    """What the kernel takes, and no part without channels."""
    each = hopper_batch.split_channels(tiles, channels)
    assert each % hopper_batch.SHRINK_CHANNELS == 0
    assert each * (-(-channels // each) - 1) < channels <= each * -(-channels // each)
    assert -(-channels // each) * tiles <= max(tiles, hopper_batch.SHRINK_BLOCKS)


@pytest.mark.parametrize(
    ("dtype", "rank", "widths", "taken"),
    [
        (torch.bfloat16, 16, (40,), True),
        (torch.bfloat16, 64, (64, 128, 8), True),
        (torch.float16, 16, (64,), False),
        (torch.bfloat16, 8, (64,), False),
        (torch.bfloat16, 32, (40, 64), False),
        (torch.bfloat16, 16, (64,) * 5, False),
    ],
)
def test_what_the_kernels_for_tiles_take(dtype, rank, widths, taken):
    b = [torch.empty(2, width, rank, dtype=dtype) for width in widths]
    assert hopper_batch.takes(torch.empty(4, 64, dtype=dtype), b, torch.empty(2, 3, 4)) is taken


def test_the_name_of_a_way_says_its_tile():
    assert [hopper.tile_of(way) for way in ways.DECODES] == [(64, 2), (64, 4), (128, 2), (128, 4)]


def test_where_the_kernels_for_hopper_run():
    assert hopper.unavailable(torch.device("cpu")) == "needs a CUDA tensor, this one is on cpu"
    names = [each.name for each in library.ops()["lora_linear"].implementations]
    assert names == ["cuda", "triton", "reference"]
