"""The table of the ways of a linear layer with adapters: what `python -m bench tune` makes of the lora suite."""

from __future__ import annotations

import json

import pytest

from bench import lora_table, tuning
from bench.results import Row
from tests.bench.test_bench import run_of

SIZES = {"tokens": 64, "n": 4096, "k": 4096, "rank": 16}


def row_of(case: str = "lora_linear_single", tokens: int = 64, **us: float) -> Row:
    row = Row(case, {**SIZES, "tokens": tokens})
    row.warm_us = {"ours": 1.0, **{f"way {name}": time for name, time in us.items()}}
    return row


def test_the_ways_of_each_size_are_kept():
    rows = [row_of(apart=3.0, beside=2.0), row_of("lora_linear", apart=4.0), row_of(tokens=1)]
    run = run_of(*rows)
    table = lora_table.distil([(run, row) for row in rows])
    found = {(row["kind"], row["m"]): row["us"] for row in table["rows"]}
    assert found == {("single", 64): {"apart": 3.0, "beside": 2.0}, ("batch", 64): {"apart": 4.0}}


def test_of_batches_of_one_size_the_slowest_counts():
    """They differ in their adapters, which a call does not know."""
    rows = [
        row_of("lora_linear", apart=4.0, beside=1.0),
        row_of("lora_linear", apart=2.0, beside=3.0),
    ]
    rows[1].sizes["adapters"] = 8
    (row,) = lora_table.distil([(run_of(*rows), each) for each in rows])["rows"]
    assert row["us"] == {"apart": 4.0, "beside": 3.0}


@pytest.mark.parametrize(
    ("later", "kept"),
    [
        ({"apart": 2.09, "beside": 2.0}, {"apart": 2.0, "beside": 2.05}),  # near each other
        ({"apart": 2.11, "beside": 2.0}, {"apart": 2.11, "beside": 2.0}),
        ({"apart": 3.0, "beside": 3.1}, {"apart": 3.0, "beside": 3.1}),
        ({"apart": 2.05, "beside": 2.1, "after": 2.0}, {"apart": 2.05, "beside": 2.1, "after": 2}),
        ({"beside": 2.0}, {"beside": 2.0}),
    ],
)
def test_the_state_of_a_gpu_turns_no_order(later, kept):
    """The row that is measured last decides, but not between ways that are near each other in it."""
    runs = [run_of(row_of(apart=2.0, beside=2.05)), run_of(row_of(**later))]
    runs[1].date = runs[0].date + "1"
    (row,) = lora_table.distil([(run, run.rows[0]) for run in runs])["rows"]
    assert row["us"] == kept


def test_without_rows_it_is_an_error():
    with pytest.raises(ValueError, match="no row of the lora suite"):
        lora_table.distil([(run_of(), Row("group_quant", {"tokens": 1}))])


def test_tune_writes_it_beside_the_others(tmp_path):
    paths = tuning.write([run_of(row_of(apart=3.0))], tmp_path)
    (path,) = (path for path in paths if path.name.startswith("lora_"))
    assert path == tmp_path / "products" / "lora_sm_90.json"
    assert json.loads(path.read_text())["rows"][0]["us"] == {"apart": 3.0}
