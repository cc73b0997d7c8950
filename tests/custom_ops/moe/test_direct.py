"""The grouped products that sort nothing: the bits of those behind an index, whatever the pairs and the tiles."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from custom_ops.moe import choice
from custom_ops.moe.problem import Problem
from custom_ops.moe.reference import local_experts
from custom_ops.moe.tiles import Aligned, Choice, Tile
from tests.custom_ops.helpers import DEVICE, assert_same_bits
from tests.custom_ops.moe.problems import ROUTINGS, WEIGHTS, Shape, assert_as_good, shapes

triton_direct = pytest.importorskip("custom_ops.moe.triton_direct", reason="needs triton")
triton_experts = pytest.importorskip("custom_ops.moe.triton_experts", reason="needs triton")

PLAIN = Shape(tokens=9, top_k=2, experts=5, hidden=40, intermediate=136)


def tiles() -> st.SearchStrategy[Choice]:
    tile = st.builds(
        Tile,
        st.just(128),
        st.just(128),
        st.just(4),
        st.just(2),
        swap=st.booleans(),
        keep=st.booleans(),
    )
    return st.builds(Choice, st.just(0), st.sampled_from((16, 32)), tile, tile)


def with_codes(problem: Problem) -> tuple[torch.Tensor, torch.Tensor | None]:
    name = "triton_direct" + ("" if problem.weights == "16_bit" else f"_{problem.weights}")
    pipeline = choice.pipelines()[name]
    prepared = pipeline.prepare.run(problem, pipeline.experts)
    return prepared.x, prepared.scale


def direct(problem: Problem, chosen: Choice) -> torch.Tensor:
    x, x_scale = with_codes(problem)
    return triton_direct.experts(
        x,
        problem.gate_up,
        problem.down,
        problem.topk_ids,
        chosen,
        activation=problem.activation,
        x_scale=x_scale,
        gate_up_bias=problem.gate_up_bias,
        down_bias=problem.down_bias,
        gate_up_scale=problem.gate_up_scale,
        down_scale=problem.down_scale,
        expert_map=problem.expert_map,
        dtype=problem.dtype,
        **problem.quantization,
    )


def behind_an_index(problem: Problem, chosen: Choice) -> torch.Tensor:
    x, x_scale = with_codes(problem)
    sizes, block = problem.sizes, chosen.block_size
    index = torch.ops.custom_ops.moe_align_block_size(
        problem.topk_ids, block, sizes.num_experts, expert_map=problem.expert_map
    )
    aligned, quantize = Aligned(*index, block), x_scale is not None
    act = triton_experts.gate_up(
        x,
        problem.gate_up,
        aligned,
        sizes.top_k,
        activation=problem.activation,
        bias=problem.gate_up_bias,
        x_scale=x_scale,
        w_scale=problem.gate_up_scale,
        quantize=quantize,
        dtype=problem.dtype,
        tile=chosen.gate_up,
        **problem.quantization,
    )
    codes, scale = act if quantize else (act, None)
    return triton_experts.down(
        codes,
        problem.down,
        aligned,
        sizes.pairs,
        bias=problem.down_bias,
        act_scale=scale,
        w_scale=problem.down_scale,
        dtype=problem.dtype,
        tile=chosen.down,
    )


def here(problem: Problem) -> torch.Tensor:
    experts = local_experts(problem.topk_ids, problem.sizes.num_experts, problem.expert_map)
    return experts.flatten() >= 0


@given(shapes(tokens=[0, 1, 2, 7, 33], hidden=[8, 40, 200]), tiles())
def test_the_bits_of_the_products_behind_an_index(shape, chosen):
    problem = shape.problem()
    mine = here(problem)
    ours, theirs = direct(problem, chosen), behind_an_index(problem, chosen)
    assert ours.shape == theirs.shape
    assert_same_bits(ours[mine], theirs[mine])


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_more_pairs_of_an_expert_than_a_block_has(routing, weights):
    shape = dataclasses.replace(
        PLAIN, tokens=40, routing=routing, weights=weights, hidden=128, intermediate=128
    )
    problem = shape.problem()
    suffix = "" if weights == "16_bit" else f"_{weights}"
    pipeline = choice.pipelines()[f"triton_direct{suffix}"]
    assert pipeline.unsupported(problem) is None
    assert_as_good(pipeline(problem), problem)


def test_pairs_that_are_elsewhere_are_not_written():
    problem = dataclasses.replace(PLAIN, elsewhere=True, hidden=128).problem()
    mine = here(problem)
    assert bool(mine.any())
    assert not bool(mine.all())
    tile = Tile(128, 128, 4, 2)
    kept = direct(problem, Choice(0, 16, tile, tile))
    nobody = dataclasses.replace(problem, topk_ids=torch.full_like(problem.topk_ids, -1))
    pipeline = choice.pipelines()["triton_direct"]
    assert_same_bits(pipeline(nobody), torch.zeros_like(problem.hidden_states))
    assert bool(kept[mine].isfinite().all())


@pytest.mark.parametrize("pairs", [triton_direct.MOST_PAIRS, triton_direct.MOST_PAIRS + 2])
def test_how_many_pairs_it_takes(pairs):
    problem = dataclasses.replace(PLAIN, tokens=pairs // 2).problem("cpu")
    reason = choice.pipelines()["triton_direct"].unsupported(problem)
    if pairs <= triton_direct.MOST_PAIRS:
        assert reason is None
        return
    assert reason == "each program reads all ids, of at most 512 pairs, here are 514"
    tile = Tile(128, 128, 4, 2)
    with pytest.raises(ValueError, match="topk_ids has 514 pairs; accepted: 512 or fewer"):
        direct(problem, Choice(0, 16, tile, tile))


def test_codes_want_tiles_of_whole_groups():
    shape = dataclasses.replace(PLAIN, weights="fp8_block", hidden=128, intermediate=128)
    tile = Tile(64, 128, 4, 2)
    with pytest.raises(ValueError, match=r"tile\.n is 64; accepted with codes: multiples of 128"):
        direct(shape.problem(DEVICE), Choice(0, 16, tile, tile))
