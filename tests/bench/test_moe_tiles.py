"""The table of tiles of the expert kernels: what wins, what is written, and that the kernels read it back."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton", reason="needs triton")

from bench import moe_tiles
from bench.suites.moe import MODELS
from custom_ops.moe.tiles import Strip, Tile

QWEN = MODELS["qwen3_30b_a3b"]
FIRST, SECOND = Tile(64, 128, 4, 4, swap=True), Tile(64, 256, 4, 3)


def test_a_block_size_wins_by_the_sum_of_both_products():
    times = {
        ("gate_up", 16, FIRST): 10.0,
        ("gate_up", 16, SECOND): 9.0,
        ("down", 16, FIRST): 9.0,
        ("gate_up", 64, FIRST): 8.0,
        ("down", 64, SECOND): 9.0,
        ("gate_up", 128, FIRST): 1.0,  # of which there is no second product
    }
    assert moe_tiles.winner(times) == (17.0, 64, FIRST, SECOND)
    assert moe_tiles.winner({}) is None


@pytest.mark.parametrize(("us", "noted"), [(20.0, True), (25.9, True), (26.1, False)])
def test_kernels_for_few_pairs_are_noted_where_they_win(us, noted):
    few = (us, (Strip(8, 512, 4), Strip(4, 256, 4, prefetch=True)))
    row = moe_tiles.row(QWEN, 8, "16_bit", (20.0, 16, FIRST, SECOND), few)
    assert ("strips" in row) == noted


def test_a_table_keeps_what_was_not_measured_anew(tmp_path):
    path = tmp_path / "moe_sm_90.json"
    grouped = (20.0, 16, FIRST, SECOND)
    rows = [moe_tiles.row(QWEN, pairs, "16_bit", grouped, None) for pairs in (128, 8)]
    moe_tiles.write(path, "a GPU", {"16_bit": rows})
    again = moe_tiles.row(QWEN, 8, "16_bit", (15.0, 32, FIRST, SECOND), None)
    moe_tiles.write(path, "a GPU", {"16_bit": [again], "fp8_block": rows})
    table = json.loads(path.read_text())
    assert table["arch"] == "sm_90"
    assert [row["block_size"] for row in table["tiles"]["16_bit"]] == [32, 16]
    assert [row["pairs"] for row in table["tiles"]["fp8_block"]] == [8, 128]
    assert Tile(**table["tiles"]["16_bit"][0]["gate_up"]) == FIRST


@pytest.mark.parametrize("kind", ["16_bit", "fp8_block"])
@pytest.mark.parametrize("pairs_per_expert", [0.1, 1, 16, 17, 64, 256])
def test_there_are_candidates_of_both_products_for_any_number_of_pairs(kind, pairs_per_expert):
    blocks = [
        {block for block, _ in moe_tiles.tiles(kind, product, pairs_per_expert)}
        for product in ("gate_up", "down")
    ]
    assert blocks[0]
    assert blocks[0] == blocks[1]
