"""What the picture of two halves is drawn from: which kernels, when, and how long they run beside each other."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import expert_parallel_overlap as overlap

DISPATCH = "void deep_ep::intranode::dispatch<2, 768, 8192>(...)"
SPANS = st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=6)


def event(name: str, start: float, us: float, stream: int = 7) -> dict:
    return {"name": name, "start": start, "us": us, "stream": stream}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (DISPATCH, "dispatch"),
        ("void deep_ep::intranode::notify_dispatch<2>(...)", "dispatch"),
        ("void deep_ep::intranode::combine<__nv_bfloat16, 2, 768>(...)", "combine"),
        ("void deep_ep::intranode::cached_notify_combine<2>(...)", "combine"),
        ("ncclDevKernel_AllGather_RING_LL(...)", "all-gather"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(...)", "reduce-scatter"),
        ("Memcpy DtoD (Device -> Device)", "other"),
        ("void at::native::reduce_kernel<128, 4>(...)", "other"),
        ("_products_kernel", "experts"),
    ],
)
def test_what_a_kernel_does(name, kind):
    assert overlap.kind_of(name) == kind


@given(moving=SPANS, working=SPANS)
def test_time_in_which_both_run(moving, working):
    """Counted microsecond by microsecond."""
    events = [event(DISPATCH, *span) for span in moving]
    events += [event("products", *span) for span in working]
    if not events:
        return
    a, b = (
        {t for start, us in spans for t in range(start, start + us)} for spans in (moving, working)
    )
    found = overlap.overlap_of(events)
    assert found["communication"] == len(a)
    assert found["experts"] == len(b)
    assert found["both"] == len(a & b)


def test_the_last_of_three_calls():
    events = [event(DISPATCH, 10 * call + part, 1) for call in range(3) for part in range(2)]
    assert [e["start"] for e in overlap.last_call(events[::-1])] == [20, 21]


def test_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra 'bench'")
    events = [
        event(name, 100 * call + start, 20, stream)
        for call in range(3)
        for name, start, stream in ((DISPATCH, 0, 3), ("products", 20, 7), (DISPATCH, 25, 3))
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(events))
    overlap.draw({"in halves": path, "whole": path}, tmp_path / "plots" / "a.png", "A layer")
    assert (tmp_path / "plots" / "a.png").read_bytes()[:4] == b"\x89PNG"
