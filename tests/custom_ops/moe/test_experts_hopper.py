"""Experts in CUDA C++ for Hopper: what they refuse and why, anywhere; what they compute, on such a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_ops.moe import choice, experts_hopper
from custom_ops.moe.problem import Problem
from tests.custom_ops.helpers import assert_same_bits
from tests.custom_ops.moe.pipelines import REFUSED, here, pipeline_of
from tests.custom_ops.moe.problems import ROUTINGS, Shape, assert_as_good, shapes

PLAIN = Shape(tokens=5, top_k=2, experts=4, hidden=256, intermediate=128)
(EXPERTS,) = experts_hopper.EXPERTS


# --- anywhere ----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(shapes(tokens=[1, 7], hidden=[128, 200], intermediate=[128, 136]))
def test_what_is_taken_is_what_the_kernels_compute(shape):
    reason = pipeline_of(EXPERTS).unsupported(shape.problem("cpu"))
    taken = (
        shape.weights == "16_bit"
        and shape.dtype == torch.bfloat16
        and shape.activation == "silu_mul"
        and not (shape.interleaved or shape.biased or shape.transposed)
        and shape.hidden % 128 == shape.intermediate % 128 == 0
    )
    assert (reason is None) == taken, reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": torch.float16}, "writes torch.bfloat16, hidden_states are torch.float16"),
        *REFUSED,
    ],
)
def test_what_is_refused_says_why(change, said):
    shape = dataclasses.replace(PLAIN, **change)
    assert said in str(pipeline_of(EXPERTS).unsupported(shape.problem("cpu")))


def test_more_experts_than_it_counts_are_refused():
    shape = dataclasses.replace(PLAIN, experts=257, hidden=128)
    reason = pipeline_of(EXPERTS).unsupported(shape.problem("cpu"))
    assert reason == "takes 1 to 256 experts, here are 257"


def test_a_table_must_ask_for_it(monkeypatch):
    """Without a measurement there is always another part before it."""
    problem = PLAIN.problem("cpu")
    for times, chosen in (({}, False), ({"hopper": 1.0, "triton": 2.0}, True)):
        monkeypatch.setattr(choice, "measured", lambda problem, times=times: times)
        pipeline, _ = choice.decide(problem, choice.FAMILIES)
        assert pipeline is not None
        assert (pipeline.experts.name == "hopper") == chosen


# --- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_against_float64(data):
    pipeline = here(EXPERTS)
    shape = data.draw(
        shapes(
            weights="16_bit",
            tokens=[1, 8, 9, 40, 129],
            top_k=[1, 2, 3],
            experts=[1, 2, 5, 33, 64],
            hidden=[128, 256, 384, 1024],
            intermediate=[128, 256, 640],
            activation="silu_mul",
            interleaved=False,
            biased=False,
            transposed=False,
            dtype=torch.bfloat16,
            routing=list(ROUTINGS),
        )
    )
    problem = shape.problem("cuda")
    assert pipeline.unsupported(problem) is None
    assert_as_good(pipeline(problem), problem)


@pytest.mark.gpu
def test_a_token_does_not_depend_on_how_many_there_are():
    """Every number of rows of an expert, through every tile and every cut of an expert into tiles: bit for bit."""
    pipeline = here(EXPERTS)
    most = 700
    shape = Shape(most, 1, 1, 256, 256)
    problem = shape.problem("cuda")
    whole = pipeline(problem)
    assert_as_good(whole, problem)
    for tokens in (*range(1, 330), 639, 640, 641, 699):
        assert_same_bits(pipeline(problem.of_tokens(0, tokens)), whole[:tokens])


@pytest.mark.gpu
def test_nan_and_infinity_stay_with_their_token():
    """Rows of padding read the first token; nothing of it reaches another one."""
    pipeline = here(EXPERTS)
    shape = Shape(37, 2, 8, 256, 256)
    args, kwargs = shape.call("cuda")
    clean = pipeline(Problem.of(*args, **kwargs))
    args[0][0] = float("nan")
    args[0][9, 3] = float("inf")
    out = pipeline(Problem.of(*args, **kwargs))
    assert bool(out[0].isnan().all())
    kept = [token for token in range(37) if token not in (0, 9)]
    assert_same_bits(out[kept], clean[kept])


@pytest.mark.gpu
def test_many_experts_and_tiles_give_the_same_bits_every_time_and_in_a_graph():
    pipeline = here(EXPERTS)
    shape = Shape(2048, 8, 128, 512, 384, routing="skewed")
    args, kwargs = shape.call("cuda")
    problem = Problem.of(*args, **kwargs)
    expected = pipeline(problem)
    plain = choice.pipelines()["triton"](problem)
    apart = (expected.double() - plain.double()).norm() / plain.double().norm()
    assert apart <= 5e-3
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pipeline(problem)
    for _ in range(20):
        graph.replay()
        assert_same_bits(captured, expected)
        assert_same_bits(pipeline(problem), expected)


@pytest.mark.gpu
def test_tokens_of_any_strides_are_read():
    pipeline = here(EXPERTS)
    args, kwargs = Shape(33, 2, 4, 256, 128).call("cuda")
    expected = pipeline(Problem.of(*args, **kwargs))
    wide = torch.zeros(33, 304, dtype=torch.bfloat16, device="cuda")
    for first in (0, 8, 3):
        view = wide[:, first : first + 256]
        view.copy_(args[0])
        assert_same_bits(pipeline(Problem.of(view, *args[1:], **kwargs)), expected)
