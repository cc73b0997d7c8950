"""The verdict of a fusion that leaves to stock what is nearest to a row that was behind."""

from __future__ import annotations

from typing import Any

from bench.results import Row
from bench.tuning import verdict


def row_of(tokens: int, ours: float, stock: float | None, case: str = "lora_linear_single") -> Row:
    sizes = {"tokens": tokens, "n": 4096, "k": 4096, "rank": 16}
    row = Row(case, sizes, fusion="lora_linear", fired={"lora_linear": 1})
    row.warm_us = {"ours": ours, "plugin": ours, **({"inductor": stock} if stock else {})}
    row.finish(3000.0)
    return row


def found(*rows: Row) -> dict[str, Any]:
    return verdict("lora_linear", rows)


def test_it_is_on_with_the_rows_that_are_behind() -> None:
    one = found(row_of(1, 10.0, 20.0), row_of(64, 20.0, 10.0, "lora_linear_single_float32"))
    assert one["on"]
    assert [row["speedup"] for row in one["rows"]] == [2.0, 0.5]
    assert [row["adapter"] for row in one["rows"]] == ["16 bits", "float32"]
    assert "nearest to the 1 of 2 rows that are behind is left to stock" in one["why"]


def test_it_is_off_where_nothing_is_ahead() -> None:
    assert not found(row_of(1, 20.0, 10.0))["on"]
    assert found()["why"] == "not measured"


def test_rows_without_stock_say_nothing() -> None:
    one = found(row_of(1, 10.0, 20.0), row_of(64, 10.0, None))
    assert one["on"]
    assert len(one["rows"]) == 1


def test_a_row_that_raised_turns_it_off() -> None:
    broken = row_of(64, 10.0, None)
    broken.errors["plugin"] = "AssertionError: differs from eager"
    del broken.warm_us["plugin"]
    one = found(row_of(1, 10.0, 20.0), broken)
    assert not one["on"]
    assert "was not measured" in one["why"]
