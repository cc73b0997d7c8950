"""Experts in CUDA C++ for Hopper in FP8: what they refuse and why, anywhere; the bits of Triton's, on such a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from custom_ops.moe import choice, experts_hopper_fp8
from custom_ops.moe.problem import Problem
from tests.custom_ops.helpers import assert_same_bits
from tests.custom_ops.moe.pipelines import REFUSED, here, pipeline_of
from tests.custom_ops.moe.problems import ROUTINGS, Shape, assert_as_good, shapes
from tests.custom_ops.moe.products import MODELS, Products

PLAIN = Shape(tokens=5, top_k=2, experts=4, hidden=256, intermediate=128, weights="fp8_block")
(EXPERTS,) = experts_hopper_fp8.EXPERTS


def triton(problem: Problem) -> Tensor:
    """By the same blocks: a block of 64 pairs that is half full is multiplied by other instructions, bits apart."""
    pipeline = choice.pipelines()["triton_fp8_block"]
    experts = dataclasses.replace(pipeline.experts, align=lambda problem: experts_hopper_fp8.ROWS)
    return dataclasses.replace(pipeline, experts=experts)(problem)


def assert_alike(ours: Tensor, theirs: Tensor) -> None:
    """The same bits, but that there are many NaN."""
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert_same_bits(ours.nan_to_num(), theirs.nan_to_num())


# --- anywhere ----------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(shapes(tokens=[1, 7], hidden=[128, 200], intermediate=[128, 136]))
def test_what_is_taken_is_what_the_kernels_compute(shape):
    reason = pipeline_of(EXPERTS).unsupported(shape.problem("cpu"))
    taken = (
        shape.weights == "fp8_block"
        and shape.dtype == torch.bfloat16
        and shape.activation == "silu_mul"
        and not (shape.interleaved or shape.biased or shape.transposed or shape.apart)
        and shape.hidden % 128 == shape.intermediate % 128 == 0
    )
    assert (reason is None) == taken, reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": torch.float16}, "writes torch.bfloat16, the result is torch.float16"),
        *REFUSED,
        ({"apart": True}, "reads gate and up as one weight, here are two"),
    ],
)
def test_what_is_refused_says_why(change, said):
    shape = dataclasses.replace(PLAIN, **change)
    assert said in str(pipeline_of(EXPERTS).unsupported(shape.problem("cpu")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"code_mode": "reciprocal"}, "quantizes by division, not by divide and reciprocal"),
        ({"min_amax": 0.0}, "needs min_amax of 2^-60 to 2^60, it is 0"),
    ],
)
def test_other_ways_to_quantize_are_refused(change, said):
    problem = dataclasses.replace(PLAIN.problem("cpu"), **change)
    assert pipeline_of(EXPERTS).unsupported(problem) == said


def test_a_table_must_ask_for_it(monkeypatch):
    problem = PLAIN.problem("cpu")
    for times, chosen in (({}, False), ({EXPERTS.name: 1.0, "triton_fp8_block": 2.0}, True)):
        monkeypatch.setattr(choice, "measured", lambda problem, times=times: times)
        pipeline, _ = choice.decide(problem, choice.FAMILIES)
        assert pipeline is not None
        assert (pipeline.experts.name == EXPERTS.name) == chosen


# --- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_bits_of_triton(data):
    pipeline = here(EXPERTS)
    shape = data.draw(
        shapes(
            weights="fp8_block",
            tokens=[1, 8, 63, 64, 65, 130, 300],
            top_k=[1, 2, 3],
            experts=[1, 2, 5, 33, 64],
            hidden=[128, 256, 384, 1024],
            intermediate=[128, 256, 640],
            activation="silu_mul",
            interleaved=False,
            biased=False,
            transposed=False,
            apart=False,
            dtype=torch.bfloat16,
            routing=list(ROUTINGS),
        )
    )
    problem = shape.problem("cuda")
    assert pipeline.unsupported(problem) is None
    out = pipeline(problem)
    assert_same_bits(out, triton(problem))
    assert_as_good(out, problem)


@pytest.mark.gpu
@pytest.mark.parametrize("routing", [r for r in ROUTINGS if r != "repeated"])
@pytest.mark.parametrize("tokens", [1, 129, 512, 4096, 9000])
@pytest.mark.parametrize("model", MODELS)
def test_sizes_of_models(model, tokens, routing):
    """Three times: which multiprocessor has which tile is another thing each time."""
    pipeline = here(EXPERTS)
    problem = Products.of(tokens, *MODELS[model], routing).problem()
    expected = triton(problem)
    for _ in range(3):
        assert_same_bits(pipeline(problem), expected)


@pytest.mark.gpu
def test_a_token_does_not_depend_on_how_many_there_are():
    """Blocks with every number of pairs, halves that are shared and halves that are not: bit for bit."""
    pipeline = here(EXPERTS)
    problem = Shape(400, 1, 1, 256, 256, weights="fp8_block").problem("cuda")
    whole = pipeline(problem)
    assert_as_good(whole, problem)
    for tokens in range(1, 400):
        assert_same_bits(pipeline(problem.of_tokens(0, tokens)), whole[:tokens])


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1e4, 1e30, float("inf"), float("nan")])
def test_sums_without_end_stay_with_their_token(factor):
    """Activations beyond bfloat16 and scales without end: what eager makes of them, in their rows alone."""
    pipeline = here(EXPERTS)
    shape = Shape(137, 2, 3, 256, 256, weights="fp8_block")
    args, kwargs = shape.call("cuda")
    clean = pipeline(Problem.of(*args, **kwargs))
    args[0][0] *= factor
    args[0][9, 3] = factor
    problem = Problem.of(*args, **kwargs)
    out = pipeline(problem)
    assert_alike(out, triton(problem))
    kept = [token for token in range(137) if token not in (0, 9)]
    assert_same_bits(out[kept], clean[kept])


@pytest.mark.gpu
def test_silu_of_all_gates():
    """A row of 1 and -1 times its scale, through an identity: of all 65536 bfloat16, Triton's exact steps."""
    pipeline = here(EXPERTS)
    width = 128
    scale = torch.arange(1 << 15, dtype=torch.int32, device="cuda").to(torch.int16)
    scale = scale.view(torch.bfloat16).float().unsqueeze(1)
    signs = torch.tensor([1.0, -1.0], device="cuda").repeat(width // 2)
    one = torch.eye(width, device="cuda").to(torch.float8_e4m3fn)
    problem = Problem.of(
        signs.expand(len(scale), width).to(torch.float8_e4m3fn),
        torch.cat([one, one]).unsqueeze(0),
        one.unsqueeze(0),
        torch.ones(len(scale), 1, device="cuda"),
        torch.zeros(len(scale), 1, dtype=torch.int64, device="cuda"),
        hidden_scale=scale,
        gate_up_scale=torch.ones(1, 2, 1, device="cuda"),
        down_scale=torch.ones(1, 1, 1, device="cuda"),
    )
    assert_alike(pipeline(problem), triton(problem))


@pytest.mark.gpu
def test_experts_that_are_all_elsewhere_have_no_tile():
    pipeline = here(EXPERTS)
    problem = Shape(40, 1, 4, 256, 128, weights="fp8_block", elsewhere=True).problem("cuda")
    problem.topk_ids.fill_(1)  # every other one is elsewhere
    assert not pipeline(problem).any()


@pytest.mark.gpu
def test_a_graph_hands_out_all_tiles_at_each_replay():
    pipeline = here(EXPERTS)
    problem = Shape(2048, 8, 128, 512, 384, weights="fp8_block", routing="skewed").problem("cuda")
    expected = pipeline(problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pipeline(problem)
    for _ in range(20):
        captured.zero_()
        graph.replay()
        assert_same_bits(captured, expected)
        assert_same_bits(pipeline(problem), expected)


@pytest.mark.gpu
def test_tokens_of_any_strides_are_read():
    pipeline = here(EXPERTS)
    args, kwargs = Shape(33, 2, 4, 256, 128, weights="fp8_block").call("cuda")
    expected = pipeline(Problem.of(*args, **kwargs))
    wide = torch.zeros(33, 304, dtype=torch.bfloat16, device="cuda")
    for first in (0, 8, 3):
        view = wide[:, first : first + 256]
        view.copy_(args[0])
        assert_same_bits(pipeline(Problem.of(view, *args[1:], **kwargs)), expected)
