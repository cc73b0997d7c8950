"""The bench of a stock model's layer over ranks, on two CPU processes in tiny sizes."""

from __future__ import annotations

import pytest

from bench import expert_parallel as ep
from bench import expert_parallel_world as world

pytest.importorskip("transformers", reason="needs the extra 'models'")


def test_the_rewrite_on_and_off(tmp_path, monkeypatch):
    """Both give the same bits, and the row says what was compared with what."""
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "triton")  # its interpreter takes seconds for an op
    run, _ = ep.measure(world.Plan("cpu", 2, ("model",), world.TINY, 1.0, tmp_path, ""))
    overlap = "ep_two_batch_overlap"
    cases = ["ep_quantize_before_dispatch", "ep_gather_tokens", overlap, f"{overlap}_gathered"]
    assert [row.case for row in run.rows] == [f"{case}_fp8" for case in cases]
    for row in run.rows:
        assert not row.errors
        assert row.warm_us.keys() == {"ours", "off"}
        assert row.fired == {row.fusion: 1}
        assert row.ratios["plugin_of_inductor"] == row.ratios["of_off"]
