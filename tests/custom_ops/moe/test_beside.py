"""Sorting pairs and quantizing tokens at the same time, on a GPU: the same as one after the other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import custom_ops
from custom_ops.moe import experts_hopper_fp8, prepare
from custom_ops.moe.experts_hopper import op
from tests.custom_ops.helpers import assert_same_bits
from tests.custom_ops.moe.products import Products

pytestmark = pytest.mark.gpu


def beside(x: Tensor, ids: Tensor, block_size: int, experts: int, **kwargs: object) -> list[Tensor]:
    return list(op("moe_align_group_quant")(x, ids, block_size, experts, 128, **kwargs))


def apart(
    x: Tensor, ids: Tensor, block_size: int, experts: int, expert_map: Tensor | None = None
) -> list[Tensor]:
    index = custom_ops.moe_align_block_size(ids, block_size, experts, expert_map=expert_map)
    return [*custom_ops.group_quant(x, 128), *index]


def assert_alike(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        assert_same_bits(one, other)


def drawn(tokens: int, hidden: int, top_k: int, experts: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(tokens, hidden, device="cuda", generator=generator).bfloat16()
    scores = torch.rand(tokens, experts, device="cuda", generator=generator)
    return x, scores.topk(top_k, dim=1).indices


@settings(max_examples=60)
@given(
    tokens=st.sampled_from([0, 1, 3, 64, 513, 2048, 4100]),
    hidden=st.sampled_from([128, 2048, 7168]),
    experts=st.sampled_from([1, 8, 128, 256]),
    top_k=st.integers(1, 8),
    block_size=st.sampled_from([8, 64, 128]),
    here=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_same_as_one_after_the_other(tokens, hidden, experts, top_k, block_size, here, seed):
    x, ids = drawn(tokens, hidden, min(top_k, experts), experts, seed)
    places = torch.arange(experts, device="cuda", dtype=torch.int32)
    expert_map = None if here else torch.where(places % 2 == 0, places // 2, -1)
    local = experts if here else -(-experts // 2)
    ours = beside(x, ids, block_size, local, expert_map=expert_map)
    assert_alike(ours, apart(x, ids, block_size, local, expert_map))


@pytest.mark.parametrize("tokens", [256, 4096])
def test_nothing_is_read_or_written_too_early(tokens: int) -> None:
    """In a graph of many, each behind what makes its tokens and ids, in memory that others were just in."""
    x, ids = drawn(tokens, 2048, 8, 128, tokens)
    want = [apart(x * (i + 1), (ids + i) % 128, 128, 128) for i in range(12)]

    def run() -> list[list[Tensor]]:
        out = []
        for i in range(12):
            scaled, shifted = x * (i + 1), (ids + i) % 128
            out.append(beside(scaled, shifted, 128, 128))
            del scaled, shifted
            torch.full(
                (tokens, 64), float("nan"), device="cuda"
            )  # where the scratch of the sort was
        return out

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(20):
        for tensor in (t for tensors in captured for t in tensors):
            tensor.view(torch.uint8).fill_(7)
        graph.replay()
        for ours, theirs in zip(captured, want, strict=True):
            assert_alike(ours, theirs)
    for ours, theirs in zip(run(), want, strict=True):
        assert_alike(ours, theirs)


@pytest.mark.parametrize(("tokens", "disabled"), [(64, ""), (65, ""), (65, "cuda")])
def test_which_problems_are_prepared_so(
    tokens: int, disabled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", disabled)
    problem = Products.of(tokens, 8, 16, 256, 128, "uniform").problem()
    problem = dataclasses.replace(
        problem, hidden_states=torch.randn(tokens, 256, device="cuda").bfloat16(), hidden_scale=None
    )
    (experts,) = experts_hopper_fp8.EXPERTS
    assert prepare._beside_each_other(problem, experts) == (tokens > 64 and not disabled)
    codes, scale, metadata = prepare.INDEX_QUANTIZED.run(problem, experts)
    want = apart(problem.hidden_states, problem.topk_ids, 128, 16)
    assert_alike([codes, scale, *metadata.aligned[:3]], want)
