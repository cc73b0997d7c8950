"""ep_dispatch_low_latency and ep_combine_low_latency between processes, on torch.distributed."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import custom_ops
from custom_ops.expert_parallel import (
    ExchangeError,
    ep_combine_low_latency,
    ep_dispatch_low_latency,
)
from tests.custom_ops.expert_parallel import low_latency_properties as properties
from tests.custom_ops.expert_parallel.processes import spawn

# Ranks, and how many random routings they go through.
ROUTINGS = {2: 200, 4: 50}


def everything(group: str, rank: int, ranks: int) -> dict:
    """All that one group of processes is asked, so that it starts once: what each part returned."""
    return {
        "mismatches": properties.mismatches(group, rank, ranks),
        "named": properties.named(group, rank, ranks),
        "random": properties.random_routings(group, rank, ranks, ROUTINGS[ranks], (128, 384)),
        "compiled": compiled_layer(group, rank, ranks),
    }


def compiled_layer(group: str, rank: int, ranks: int) -> int:
    """dispatch -> something for each expert -> combine, in one graph for several numbers of tokens."""

    def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        recv_x, _, _, sources, ranges = ep_dispatch_low_latency(x, ids, 2 * ranks, 8, group)
        y = recv_x * (1 + torch.arange(2).view(2, 1, 1) + 2 * rank)
        return ep_combine_low_latency(y, ids, weights, sources, ranges, group)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (2 + rank, 7, 3):
            x = torch.arange(tokens * 16).view(tokens, 16).bfloat16() % 8
            ids = torch.stack([torch.arange(tokens) % (2 * ranks), torch.full((tokens,), -1)], 1)
            weights = torch.full((tokens, 2), 0.5)
            for t in (x, ids, weights):
                torch._dynamo.mark_dynamic(t, 0)
            assert torch.equal(compiled(x, ids, weights), x * (1 + ids[:, :1]) * 0.5)
    return 3


@pytest.fixture(scope="module")
def everything_of(tmp_path_factory):
    """What each rank found, by the number of ranks; the processes run once for each."""

    @functools.cache
    def of(ranks: int) -> list:
        return spawn(everything, ranks, tmp_path_factory.mktemp("ranks"), ranks)

    return of


@pytest.mark.parametrize("ranks", ROUTINGS)
def test_every_rank_finds_what_it_expects(everything_of, ranks):
    """Rows, codes, scales, counts and handles; ranks and experts without tokens; sums bit for bit."""
    for found in everything_of(ranks):
        assert isinstance(found, dict), found
        assert found["named"] == list(properties.named_cases(ranks))
        for op in ("ep_dispatch_low_latency", "ep_combine_low_latency"):
            assert found["random"][f"{op} reference"] == ROUTINGS[ranks]
        assert found["compiled"] == 3


@pytest.mark.parametrize("ranks", ROUTINGS)
def test_a_rank_that_calls_something_else_is_named(everything_of, ranks):
    last = ranks - 1
    for rank, found in enumerate(everything_of(ranks)):
        assert isinstance(found, dict), found
        other, mine = (0, last) if rank == last else (last, rank)
        op = "ep_dispatch_low_latency"
        hidden, tokens, experts, calls = found["mismatches"]
        for message, name in ((hidden, "the last dimension of x"), (tokens, "max_tokens")):
            assert message.startswith(f"{op}: {name} is ")
        assert experts.startswith(f"{op}: num_experts is ")
        for message in (hidden, tokens, experts):
            assert f" on rank {other} and " in message
            assert f" on rank {mine}; accepted: the same on every rank" in message
        assert f"rank {other} calls ep_" in calls


def left_alone(group: str, rank: int, ranks: int, op: str) -> str | None:
    """One round, then the last rank dies; the message that the others get."""
    x, ids = torch.ones(2, 8).bfloat16(), torch.arange(ranks).expand(2, ranks)
    weights = torch.ones(2, ranks)
    out = ep_dispatch_low_latency(x, ids, ranks, 2, group)
    ep_combine_low_latency(out[0], ids, weights, *out[3:], group)
    if rank == ranks - 1:
        os._exit(0)
    again = {
        "ep_dispatch_low_latency": lambda: ep_dispatch_low_latency(x, ids, ranks, 2, group),
        "ep_combine_low_latency": lambda: ep_combine_low_latency(
            out[0], ids, weights, *out[3:], group
        ),
    }
    with pytest.raises(ExchangeError) as caught:
        again[op]()
    return str(caught.value)


@pytest.mark.parametrize("op", ["ep_dispatch_low_latency", "ep_combine_low_latency"])
def test_a_peer_that_died_is_named(tmp_path, op):
    alive, dead = spawn(left_alone, 2, tmp_path, 2, op, timeout_s=3.0)
    assert dead == "died"
    assert alive.startswith(f"{op}: rank 0 of 2 (group ")
    assert "got no answer from ranks [1]: " in alive


@pytest.fixture
def alone(tmp_path):
    """The name of a group of this process only."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD.group_name
    torch.distributed.destroy_process_group()


def arguments(group: str, hidden: int = 256) -> tuple:
    ids = torch.tensor([[0, 3], [2, 1], [-1, 1]])
    return torch.randn(3, hidden).bfloat16(), ids, 4, 4, group


@pytest.mark.parametrize("fp8", [False, True])
def test_opcheck(alone, fp8):
    """Without the checks that compare values: rows past an expert's count are whatever memory held."""
    args = arguments(alone)
    dispatch = torch.ops.custom_ops.ep_dispatch_low_latency.default
    torch.library.opcheck(dispatch, args, {"fp8": fp8})
    recv_x, _, _, *handle = ep_dispatch_low_latency(*args, fp8=fp8)
    combine = recv_x.bfloat16(), args[1], torch.rand(3, 2), *handle, alone
    torch.library.opcheck(torch.ops.custom_ops.ep_combine_low_latency.default, combine)


@pytest.mark.parametrize("fp8", [False, True])
def test_fakes_have_the_shapes_and_strides_of_kernels(alone, fp8):
    args = arguments(alone)
    real = ep_dispatch_low_latency(*args, fp8=fp8)
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env) as mode:
        fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        faked = ep_dispatch_low_latency(*fake, fp8=fp8)
    assert not env.guards
    for r, f in zip(real, faked, strict=True):
        assert (r.dtype, r.shape, r.stride(), r.device) == (f.dtype, f.shape, f.stride(), f.device)


def test_they_may_stand_in_a_cuda_graph():
    for op in ("ep_dispatch_low_latency", "ep_combine_low_latency"):
        assert torch.Tag.cudagraph_unsafe not in custom_ops.ops()[op].overload.tags


def bad_calls(group: str) -> dict:
    x, ids, *_ = arguments(group)
    w, y = torch.rand(3, 2), torch.zeros(4, 4, 8).bfloat16()
    sources, ranges = torch.zeros(4, 4).int(), torch.zeros(4, 1).long()
    dispatch, combine = ep_dispatch_low_latency, ep_combine_low_latency
    wrong = (y, ids, w, sources, ranges.int(), group)
    return {
        "dtype": (dispatch, (x.float(), ids, 4, 4, group), "x.dtype is torch.float32; accepted"),
        "tokens": (dispatch, (x, ids[:2], 4, 4, group), r"topk_ids.shape is \(2, 2\); accepted"),
        "too many": (dispatch, (x, ids, 4, 2, group), "x has 3 tokens; accepted: at most max_tok"),
        "group": (dispatch, (x, ids, 4, 4, "nobody"), "group is 'nobody'; accepted: the group_na"),
        "y": (combine, (y.float(), ids, w, sources, ranges, group), "y.dtype is torch.float32; a"),
        "dims": (combine, (y[0], ids, w, sources, ranges, group), "y has 2 dimensions; accepted"),
        "sources": (combine, (y, ids, w, sources[:2], ranges, group), r"sources.shape is \(2, 4\)"),
        "ranges": (combine, wrong, "ranges.dtype is torch.int32; accepted: torch.int64"),
        "weights": (combine, (y, ids, w[:2], sources, ranges, group), r"weights.shape is \(2, 2\)"),
    }


@pytest.mark.parametrize("case", bad_calls(""))
def test_errors_name_the_argument(alone, case):
    op, args, message = bad_calls(alone)[case]
    with pytest.raises(ValueError, match=f"{op.__name__}: .*{message}"):
        op(*args)


def test_fp8_needs_whole_groups(alone):
    with pytest.raises(ValueError, match=r"x is 200; accepted with fp8: a multiple of 128"):
        ep_dispatch_low_latency(*arguments(alone, 200), fp8=True)
