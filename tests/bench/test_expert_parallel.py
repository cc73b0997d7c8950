"""The bench of expert parallelism on two CPU processes: every part that needs no GPU, in tiny sizes."""

from __future__ import annotations

import pytest

from bench import expert_parallel as ep
from bench import expert_parallel_world as world
from bench import results


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The run, and the file that it was written to."""
    out = tmp_path_factory.mktemp("results")
    parts = tuple(part for part in ep.PARTS if part not in ("captured", "model"))
    return ep.measure(world.Plan("cpu", 2, parts, world.TINY, 20.0, out, "abc"))


def test_every_part_has_its_rows(measured):
    run, path = measured
    assert [row.case for row in run.rows] == [
        "ep_dispatch_bf16",
        "ep_dispatch_fp8",
        "ep_combine_bf16",
        "ep_dispatch_low_latency_bf16",
        "ep_combine_low_latency",
        "ep_steps",
        "ep_layer_bf16",
        "ep_layer_bf16",
        "ep_overlap_bf16",
        *["ep_gather_even_bf16", "ep_gather_uneven_bf16"] * 2,
    ]
    assert results.load(path).rows == run.rows
    assert run.commit == "abc"
    assert run.device["ranks"] == 2


def test_rows_say_what_ran_against_what(measured):
    run, _ = measured
    for row in run.rows:
        assert not row.errors
        assert not row.targets  # there is no DeepEP to be as fast as
        others = {name for name in row.warm_us if name != "ours"}
        assert {f"of_{name}" for name in others} == {n for n in row.ratios if n.startswith("of_")}
        assert all(time > 0 for time in row.warm_us.values())
    (halves,) = (row for row in run.rows if row.case == "ep_overlap_bf16")
    assert {"overlap_off", "gathered", "gathered_in_halves"} <= halves.warm_us.keys()
    assert halves.ratios["elements_that_differ"] == 0
    assert run.rows[0].chosen == "reference"
    steps = run.rows[5]
    assert steps.sizes["steps"] == 8
    assert steps.ratios == {"wrong": 0.0, "grown_mib": 0.0}


def test_a_part_that_measures_nothing_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="no row was measured"):
        ep.measure(world.Plan("cpu", 2, ("captured",), world.TINY, 1.0, tmp_path, ""))
