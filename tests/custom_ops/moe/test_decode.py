"""The kernels for few pairs: against the reference and float64, for any strips, and what they are chosen for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from custom_ops.moe import reference
from custom_ops.moe.tiles import Strip
from tests.custom_ops.helpers import DEVICE, assert_same_bits
from tests.custom_ops.moe.problems import ROUTINGS, WEIGHTS, Shape, assert_as_good, shapes
from tests.custom_ops.moe.test_triton_experts import REAL

triton_decode = pytest.importorskip("custom_ops.moe.triton_decode", reason="needs triton")

WIDE = Strip(32, 256, 4)  # few programs, for the interpreter
PLAIN = Shape(tokens=2, top_k=2, experts=5, hidden=40, intermediate=136)


def drawn_strips() -> st.SearchStrategy[tuple[Strip, Strip]]:
    def strip(choices):
        return st.builds(
            Strip,
            st.sampled_from((16, 32)),
            st.sampled_from((128, 256)),
            st.just(4),
            st.just(1),
            st.booleans(),
            choices,
        )

    return st.tuples(strip(st.just(0)), strip(st.sampled_from((0, 1, 2))))


def run(problem, strips=None):
    return triton_decode.moe_decode(
        problem.hidden_states,
        problem.gate_up,
        problem.down,
        problem.topk_weights,
        problem.topk_ids,
        activation=problem.activation,
        gate_up_bias=problem.gate_up_bias,
        down_bias=problem.down_bias,
        gate_up_scale=problem.gate_up_scale,
        down_scale=problem.down_scale,
        expert_map=problem.expert_map,
        strips=strips,
        **problem.quantization,
    )


@given(shapes(tokens=[0, 1, 2], top_k=[1, 2, 3], hidden=[8, 40, 200]), drawn_strips())
def test_any_strips_are_as_good_as_the_reference(shape, strips):
    problem = shape.problem()
    assert_as_good(run(problem, strips), problem)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_tables_strips_serve_any_routing(weights, routing):
    shape = dataclasses.replace(PLAIN, intermediate=24, weights=weights, routing=routing)
    problem = shape.problem()
    assert_as_good(run(problem), problem)


@pytest.mark.parametrize("choices", [0, 1, 2])
def test_experts_are_added_in_order_however_many_at_once(choices):
    problem = dataclasses.replace(PLAIN, top_k=5).problem()
    expected = run(problem, (WIDE, WIDE))
    strips = (WIDE, dataclasses.replace(WIDE, choices=choices))
    assert_same_bits(run(problem, strips), expected)


def test_a_token_has_the_same_bits_in_any_batch():
    problem = PLAIN.problem()
    expected = run(problem, (WIDE, WIDE))
    for token in range(PLAIN.tokens):
        alone = dataclasses.replace(
            problem,
            hidden_states=problem.hidden_states[token : token + 1],
            topk_weights=problem.topk_weights[token : token + 1],
            topk_ids=problem.topk_ids[token : token + 1],
        )
        assert_same_bits(run(alone, (WIDE, WIDE)), expected[token : token + 1])


def test_an_expert_elsewhere_adds_nothing_even_where_a_weight_is_nan():
    problem = dataclasses.replace(PLAIN, elsewhere=True, tokens=4).problem()
    here = reference.local_experts(problem.topk_ids, 5, problem.expert_map) >= 0
    assert not here.all()
    weights = torch.where(here, problem.topk_weights, torch.nan)
    changed = dataclasses.replace(problem, topk_weights=weights)
    assert_same_bits(run(changed, (WIDE, WIDE)), run(problem, (WIDE, WIDE)))


def test_no_experts_here():
    problem = PLAIN.problem()
    empty = dataclasses.replace(
        problem,
        gate_up=problem.gate_up[:0],
        down=problem.down[:0],
        expert_map=torch.full((5,), -1, dtype=torch.int32, device=DEVICE),
    )
    assert not run(empty).any()


def test_it_is_for_few_pairs():
    gate_up = torch.empty(128, 1536, 2048, dtype=torch.bfloat16, device="meta")
    down = torch.empty(128, 2048, 768, dtype=torch.bfloat16, device="meta")
    assert triton_decode.fits(1, 8, gate_up, down)
    assert not triton_decode.fits(512, 8, gate_up, down)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("weights", ["16_bit", "fp8_block"])
@pytest.mark.parametrize("name", REAL)
def test_real_sizes_against_the_reference(name, weights, tokens):
    problem = dataclasses.replace(REAL[name], tokens=tokens, weights=weights).problem("cuda")
    args, kwargs = problem.arguments()
    expected = reference.fused_moe(*args, **kwargs)
    difference = (run(problem).double() - expected.double()).norm() / expected.double().norm()
    assert float(difference) <= (2e-2 if weights == "fp8_block" else 4e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", WEIGHTS)
def test_captured_in_a_cuda_graph_without_synchronization(weights):
    problem = dataclasses.replace(PLAIN, weights=weights).problem()
    expected = run(problem)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run(problem)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    assert_same_bits(out, expected)
