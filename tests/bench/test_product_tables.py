"""The tables of matrix products that `bench tune` distils from the results."""

from __future__ import annotations

import json

from bench import tuning
from bench.results import Row, Run
from custom_ops import tables


def row_of(case: str, tokens: int, n: int = 4096, **us: float) -> Row:
    row = Row(case, {"tokens": tokens, "n": n, "k": 4096})
    row.warm_us = {name.replace("tile_", "tile "): time for name, time in us.items()}
    row.finish(3000.0)
    return row


def run_of(*rows: Row, date: str = "2026-01-01T00:00:00+00:00", device: str = "GPU") -> Run:
    return Run(
        "gemm", {"name": device, "arch": "sm_90"}, {}, "abc", "", date, "", 3000.0, list(rows)
    )


FAST = {"tile_64x64x128": 3.0, "tile_16x32x256": 2.0, "cublaslt": 4.0}
SLOW = {"tile_64x64x128": 5.0, "tile_128x128x128": 4.5, "cublaslt": 4.0}


def test_the_fastest_way_is_written_and_read_again(tmp_path, monkeypatch):
    run = run_of(
        row_of("scaled_mm_float8_e4m3fn_token", 16, **FAST),
        row_of("scaled_mm_float8_e4m3fn_token", 1024, **SLOW),
        row_of("scaled_mm_int8_token", 16, **{k: v for k, v in FAST.items() if k != "cublaslt"}),
        row_of("scaled_linear_fp8_token", 16, plugin=1.0, inductor=2.0),
    )
    _, path = tuning.write([run], tmp_path)
    assert path == tmp_path / "products" / "sm_90.json"
    table = json.loads(path.read_text())
    assert table["scaled_mm"].keys() == {"float8_e4m3fn token", "int8 token"}
    monkeypatch.setattr(tables, "load", lambda: {90: table})
    tables.best.cache_clear()
    answers = [
        tables.best("scaled_mm", kind, (9, 0), m, 4096, 4096)
        for kind, m in (
            ("float8_e4m3fn token", 1),
            ("float8_e4m3fn token", 17),
            ("int8 token", 9999),
        )
    ]
    tables.best.cache_clear()
    assert answers == [
        tables.Best("triton", "16x32x256"),
        tables.Best("cublaslt", "128x128x128"),
        tables.Best("triton", "16x32x256"),
    ]


def test_of_two_devices_the_one_measured_last_decides():
    older = run_of(row_of("scaled_mm_int8_token", 64, **FAST))
    newer = run_of(
        row_of("scaled_mm_int8_token", 64, **SLOW), date="2026-02-01T00:00:00+00:00", device="Other"
    )
    pairs = [(run, row) for run in (newer, older) for row in run.rows]
    (row,) = tuning.distil_products(pairs)["scaled_mm"]["int8 token"]
    assert (row["implementation"], row["us"]) == ("cublaslt", {"triton": 4.5, "cublaslt": 4.0})


def test_results_without_products_leave_their_tables_alone(tmp_path):
    (path,) = tuning.write([run_of(Row("group_quant", {"tokens": 1}))], tmp_path)
    assert path == tmp_path / "sm_90.json"
