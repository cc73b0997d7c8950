"""ep_fused_moe: one rank, two and four gloo processes, and GPUs; the schedule of two halves."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import custom_ops
from custom_ops.expert_parallel import exchanges
from tests.custom_ops.expert_parallel import layer_properties
from tests.custom_ops.expert_parallel.layer_properties import Case, draw
from tests.custom_ops.expert_parallel.processes import spawn

ONE_GROUP = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CASES = 40


@pytest.fixture
def alone(tmp_path):
    """The name of a group of one rank."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD.group_name
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def no_triton(monkeypatch):
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "triton")  # its interpreter takes seconds for an op


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_equal_to_the_three_ops(tmp_path, ranks):
    """Bit for bit, whatever the exchange and with or without two halves; random and named cases."""
    for found in spawn(
        layer_properties.everything, ranks, tmp_path, ranks, CASES // ranks, timeout_s=60
    ):
        assert isinstance(found, dict), found
        assert found["random"] == CASES // ranks
        assert len(found["named"]) == 5
        if ranks == 2:
            assert "ep_fused_moe: the last dimension of x is" in found["disagreeing"]


@ONE_GROUP
@given(
    tokens=st.integers(0, 9),
    experts=st.integers(1, 4),
    max_tokens=st.sampled_from([0, 9]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_one_rank(alone, tokens, experts, max_tokens, dtype, seed):
    case = Case((tokens,), experts, 1, max_tokens=max_tokens, dtype=dtype, seed=seed)
    layer_properties.check(case, alone, 0)


@ONE_GROUP
@given(tokens=st.integers(0, 65), scaled=st.booleans())
def test_halves_are_the_whole(tokens, scaled):
    """Together, in order; the first is never the smaller, and both may be empty."""
    x = torch.arange(tokens * 3).view(tokens, 3)
    scale = x.float() if scaled else None
    first, rest = exchanges.Tokens(x, scale, x, x).halves()
    assert 0 <= len(first.x) - len(rest.x) <= 1
    for whole, a, b in zip((x, scale, x, x), first, rest, strict=True):
        if whole is None:
            assert a is None
            assert b is None
        else:
            assert torch.equal(torch.cat([a, b]), whole)


@pytest.mark.parametrize("fp8", [False, True])
def test_opcheck(alone, fp8):
    sizes = {"hidden": 256, "inner": 128, "dtype": layer_properties.FP8} if fp8 else {}
    args, how = draw(Case((5,), **sizes), 0, "cpu")
    # test_schema changes its inputs by products, which codes of 8 bits have not
    rest = {"test_utils": ("test_faketensor",)} if fp8 else {}
    with torch.no_grad():
        torch.library.opcheck(
            torch.ops.custom_ops.ep_fused_moe.default,
            (*args, alone),
            {**how, "split_from": 2},
            **rest,
        )


def test_what_runs_is_said(alone):
    args, words = draw(Case((5,)), 0, "cpu")
    for name, how in {
        "reference": {},
        "two_batches": {"split_from": 3},
        "gather": {"exchange": "gather", "split_from": 3},
    }.items():
        choice = custom_ops.explain("ep_fused_moe", *args, alone, **words, **how)
        assert choice.implementation is not None
        assert choice.implementation.name == name
    assert "split_from is 0" in str(custom_ops.explain("ep_fused_moe", *args, alone, **words))


def test_left_out_by_name(alone, monkeypatch):
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "triton,two_batches,gather")
    args, how = draw(Case((5,)), 0, "cpu")
    given = {"exchange": "gather", "split_from": 1, **how}
    choice = custom_ops.explain("ep_fused_moe", *args, alone, **given)
    assert choice.implementation.name == "reference"
    expected = layer_properties.three_ops(args, alone, 0, how)
    assert torch.equal(custom_ops.ep_fused_moe(*args, alone, **given), expected)


WRONG = {
    "exchange is 'broadcast'; accepted: dispatch, gather": {"exchange": "broadcast"},
    "split_from is -1; accepted: 0 or more": {"split_from": -1},
    "x has 5 tokens; accepted: at most max_tokens, 4": {"max_tokens": 4},
}


@pytest.mark.parametrize("said", WRONG)
def test_bad_keywords(alone, said):
    args, how = draw(Case((5,)), 0, "cpu")
    with pytest.raises(ValueError, match=said):
        custom_ops.ep_fused_moe(*args, alone, **how, **WRONG[said])


def test_weights_of_other_ranks_too(alone):
    (x, scale, ids, weights, gate_up, down, _), how = draw(Case((5,)), 0, "cpu")
    with pytest.raises(ValueError, match="gate_up has 2 experts; accepted: 4, those of a rank"):
        custom_ops.ep_fused_moe(x, scale, ids, weights, gate_up, down, 4, alone, **how)


def on_gpus(group: str, rank: int) -> list[str]:
    """Sizes that DeepEP takes, in 16 bits and in codes, with and without room for the worst case."""
    for seed, (tokens, most) in enumerate(
        (((37, 50), 0), ((37, 50), 64), ((0, 9), 0), ((0, 9), 16))
    ):
        for dtype in (torch.bfloat16, layer_properties.FP8):
            case = Case(tokens, 4, 2, 512, 128, most, dtype, seed)
            for _ in range(3):  # one after the other: memory of one is the next one's
                layer_properties.check(case, group, rank, "cuda")
    torch.cuda.synchronize()
    args, how = draw(Case((64, 64), 4, 2, 512, 128), rank, "cuda")
    given = {"max_tokens": 64, "split_from": 1, **how}
    expected = custom_ops.ep_fused_moe(*args, group, **given)
    torch.cuda.synchronize()
    torch.distributed.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # both streams of it
        out = custom_ops.ep_fused_moe(*args, group, **given)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)
    return ["eager", "graph", *([] if any_wrong(group, rank) else ["steps"])]


def any_wrong(group: str, rank: int) -> bool:
    """Of 150 layers of random sizes in a row, with the memory that each leaves to the next."""
    case = Case((600, 600), 4, 2, 2048, 512)
    (x, _, ids, weights, *rest), how = draw(case, rank, "cuda")
    wrong = torch.zeros((), dtype=torch.bool, device="cuda")
    numbers = random.Random(rank)
    for step in range(150):
        count = numbers.choice((0, 1, 600, numbers.randint(0, 600)))
        args = x[:count], None, ids[:count], weights[:count], *rest, group
        most = 600 if step % 2 else 0
        exchange = "gather" if step % 3 == 0 else "dispatch"
        whole = custom_ops.ep_fused_moe(*args, max_tokens=most, **how)
        halves = custom_ops.ep_fused_moe(
            *args, max_tokens=most, split_from=1, exchange=exchange, **how
        )
        wrong |= (whole != halves).any()
    return bool(wrong)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_two_gpus(tmp_path):
    """Over DeepEP where it is installed, else over NCCL."""
    for found in spawn(on_gpus, 2, tmp_path, timeout_s=120, backend="nccl"):
        assert found == ["eager", "graph", "steps"], found
