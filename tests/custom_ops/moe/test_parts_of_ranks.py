"""Parts for experts on several ranks, in the combination test of `test_parts`: what fits runs, all else is refused."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import custom_ops.expert_parallel.parts as of_ranks
from custom_ops.moe import choice, finalize, parts, prepare, reference
from custom_ops.moe.parts import join
from custom_ops.moe.problem import Problem
from tests.custom_ops.expert_parallel.processes import spawn
from tests.custom_ops.moe import plain_experts
from tests.custom_ops.moe.problems import ACCEPTED, Shape, assert_as_good, error, shapes

EVERY = (*choice.EXPERTS, *plain_experts.EXPERTS)
LEGAL = {p.name: p for p in parts.pipelines(of_ranks.PREPARES, EVERY, of_ranks.FINALIZES)}
ALL_PREPARES = (*prepare.PREPARES, *of_ranks.PREPARES)
ALL_FINALIZES = (*finalize.FINALIZES, *of_ranks.FINALIZES)
PLAIN = [name for name, p in LEGAL.items() if p.experts in plain_experts.EXPERTS]


@pytest.mark.parametrize("experts", EVERY, ids=lambda experts: experts.name)
def test_every_other_combination_is_refused_with_both_names(experts):
    """Tokens that are sent must come back, in the way that they went."""
    legal, refused = 0, 0
    for p, f in itertools.product(ALL_PREPARES, ALL_FINALIZES):
        if parts.misfit(p, experts, f) is None:
            legal += 1
            assert p.exchange == f.exchange
            continue
        refused += 1
        with pytest.raises(ValueError, match=f"Experts '{experts.name}'") as refusal:
            join(p, experts, f)
        assert f"'{p.name}'" in str(refusal.value) or f"'{f.name}'" in str(refusal.value)
        if p.exchange != f.exchange and parts.misfit(p, experts, f):
            fits = (p.activation_format, p.quantization) == (
                experts.activation_format,
                experts.quantization,
            ) and experts.output_format == f.activation_format
            if fits:
                assert f"'{p.name}'" in str(refusal.value)
                assert f"'{f.name}'" in str(refusal.value)
    assert legal >= 2
    assert refused


def test_declarations():
    for part in (*ALL_PREPARES, *ALL_FINALIZES):
        assert part.exchange in (None, "high_throughput", "low_latency")
        assert part.chunkable == (part.exchange is None)
    assert len({part.name for part in ALL_PREPARES}) == len(ALL_PREPARES)
    assert len({part.name for part in ALL_FINALIZES}) == len(ALL_FINALIZES)
    names = {part.name for part in (*of_ranks.PREPARES, *of_ranks.FINALIZES)}
    assert {"dispatch_permute", "unpermute_combine", "dispatch_batched", "combine_batched"} <= names
    legal = LEGAL.values()
    assert {p.prepare for p in legal} == set(of_ranks.PREPARES)
    assert {p.finalize for p in legal} == set(of_ranks.FINALIZES)


def test_no_pipeline_of_one_rank_exchanges_tokens():
    assert all(p.prepare.exchange is None for p in choice.pipelines().values())


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD.group_name
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", LEGAL)
def test_every_legal_combination_equals_the_reference(alone, name):
    pipeline = LEGAL[name]
    if reason := pipeline.experts.unavailable(torch.device("cpu")):
        pytest.skip(f"{pipeline.experts.name}: {reason}")
    ran, refused = 0, ""

    @settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        shapes(
            weights=pipeline.experts.weights,
            tokens=[1, 2, 7],
            experts=[1, 3, 8],
            hidden=[128, 256],
            intermediate=[128, 136],
            dtype=torch.bfloat16,
            routing=["uniform", "skewed", "empty experts"],
            elsewhere=False,
        )
    )
    def check(shape):
        nonlocal ran, refused
        problem = shape.problem("cpu")
        mine = of_ranks.problem_of(problem, alone, shape.experts, 33)
        reason = pipeline.unsupported(mine)
        if reason is None:
            ran += 1
            assert_as_good(pipeline(mine), problem)
        else:  # no reason of its own: it is that of the experts
            refused = reason
            assert reason == pipeline.experts.unsupported(problem)

    check()
    if not ran:
        pytest.skip(f"needs sizes that {pipeline.experts.name} takes: {refused}")


def share_of(problem: Problem, group: str, rank: int, ranks: int, tokens: slice) -> Any:
    """What a rank has of a problem: some of the tokens, and its experts."""
    count = problem.sizes.num_experts
    local = slice(rank * count // ranks, (rank + 1) * count // ranks)
    given = problem.of_tokens(tokens.start, tokens.stop)
    names = ("gate_up", "down", "gate_up_bias", "down_bias", "gate_up_scale", "down_scale")
    tensors = {name: getattr(problem, name) for name in names}
    mine = {name: None if t is None else t[local].contiguous() for name, t in tensors.items()}
    return of_ranks.problem_of(dataclasses.replace(given, **mine), group, count, 16)


def on_ranks(group: str, rank: int, ranks: int) -> dict[str, float]:
    """By pipeline, how far each is from all experts on one rank, the worst of two numbers of tokens."""
    found: dict[str, float] = {}
    for name in PLAIN:
        weights = LEGAL[name].experts.weights
        for first in (4, 0):  # tokens of rank 0; without any, those of the other go all to it
            shape = Shape(11, 2, 4, 128, 128, biased=True, weights=weights, seed=first)
            problem = shape.problem("cpu")
            if not first:
                problem.topk_ids.copy_(torch.tensor([[1, 0]]).expand(11, 2))
            mine = slice(0, first) if rank == 0 else slice(first, 11)
            share = share_of(problem, group, rank, ranks, mine)
            assert LEGAL[name].unsupported(share) is None
            out = LEGAL[name](share)
            args, kwargs = problem.arguments()
            wanted = reference.fused_moe(*args, **kwargs)[mine]
            assert out.shape == wanted.shape
            if len(wanted):
                found[name] = max(found.get(name, 0.0), error(out, wanted.double()))
    return found


def test_two_ranks_equal_one(tmp_path):
    """Also where a rank has no tokens, and where it gets none."""
    for rank, found in enumerate(spawn(on_ranks, 2, tmp_path, 2)):
        assert isinstance(found, dict), found
        assert list(found) == PLAIN
        for name, difference in found.items():
            accepted = ACCEPTED[torch.bfloat16, LEGAL[name].experts.weights]
            assert difference <= accepted, f"rank {rank}: {name}"


def test_a_problem_without_ranks_is_refused():
    problem = Shape(3, 2, 4, 128, 128).problem("cpu")
    for pipeline in LEGAL.values():
        if pipeline.experts.weights == "16_bit":
            assert "names none" in str(pipeline.unsupported(problem))
