"""ep_dispatch and ep_combine between processes: every routing, errors instead of hangs, one graph."""

from __future__ import annotations

import functools
import os
import time

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols

import custom_ops
from custom_ops.expert_parallel import ExchangeError
from custom_ops.expert_parallel.agreement import CHANNELS
from tests.custom_ops.expert_parallel import layer_properties, properties
from tests.custom_ops.expert_parallel.processes import spawn

# Ranks, and how many random routings they go through.
ROUTINGS = {2: 4096, 4: 200, 8: 50}


def everything(group: str, rank: int, ranks: int) -> dict:
    """All that one group of processes is asked, so that it starts once: what each part returned."""
    backend = (
        "aot_eager" if ranks < 8 else None
    )  # eight tracers at once would take most of the time
    return {
        "named": properties.named(group, rank, ranks),
        "every code": properties.every_code(group, rank, ranks),
        "random": properties.random_routings(group, rank, ranks, 0, ROUTINGS[ranks]),
        "uneven": properties.uneven(group, rank, ranks),
        "mismatches": properties.mismatches(group, rank, ranks),
        "compiled": properties.compiled_layer(group, rank, ranks, backend),
    }


@pytest.fixture(scope="module")
def everything_of(tmp_path_factory):
    """What each rank found, by the number of ranks; the processes run once for each."""

    @functools.cache
    def of(ranks: int) -> list:
        return spawn(everything, ranks, tmp_path_factory.mktemp("ranks"), ranks)

    return of


@pytest.mark.parametrize("ranks", ROUTINGS)
def test_every_rank_finds_what_it_expects(everything_of, ranks):
    """Round trips, counts, ranks and experts without tokens, all to one rank, codes and scales, random routings."""
    for found in everything_of(ranks):
        assert isinstance(found, dict), found
        assert found["named"] == list(properties.named_cases(ranks))
        assert found["every code"] == 2 * ranks
        assert found["random"]["ep_dispatch reference"] == ROUTINGS[ranks]
        assert found["uneven"].startswith(
            f"ep_dispatch: num_experts is {ranks + 1}; accepted: a multiple of the {ranks} ranks of group"
        )


@pytest.mark.parametrize("ranks", ROUTINGS)
def test_one_graph_of_dispatch_experts_combine(everything_of, ranks):
    """Equal to all experts in one process: float32 within 1e-6, bfloat16 within its roundings or bit for bit."""
    for found in everything_of(ranks):
        assert isinstance(found, dict), found
        assert found["compiled"] == ["torch.float32", "torch.bfloat16"]


@pytest.mark.parametrize("ranks", ROUTINGS)
def test_a_rank_that_calls_something_else_is_named(everything_of, ranks):
    last = ranks - 1
    for rank, found in enumerate(everything_of(ranks)):
        assert isinstance(found, dict), found
        other, mine = (0, last) if rank == last else (last, rank)
        sizes = (8, 16) if rank == last else (16, 8)
        hidden, dtype, top_k, experts, op, combined = found["mismatches"]
        assert hidden.startswith(
            f"ep_dispatch: the last dimension of x is {sizes[0]} on rank {other} and {sizes[1]} on rank {mine}; "
            "accepted: the same on every rank"
        )
        assert "x.dtype is torch.bfloat16 on rank" in dtype or rank == last
        assert "the last dimension of topk_ids is" in top_k
        assert "num_experts is" in experts
        calls = ("ep_dispatch", "ep_combine") if rank == last else ("ep_combine", "ep_dispatch")
        assert f"rank {other} calls {calls[0]} where rank {mine} calls {calls[1]}" in op
        assert "ep_combine: y.dtype is torch." in combined
        assert all(f"on rank {other}" in m for m in (dtype, top_k, experts, combined))


def left_alone(group: str, rank: int, ranks: int, op: str, how: str) -> tuple[str, float] | None:
    """One round, then the last rank dies or stays away; the message that the others get, and after how long."""
    x, ids = torch.ones(3, 8), torch.arange(ranks).expand(3, ranks)
    args = (x, None, ids, torch.ones(3, ranks), ranks, group)
    out = custom_ops.ep_dispatch(*args)
    case = layer_properties.Case((3,) * ranks)
    drawn, words = layer_properties.draw(case, rank, "cpu")
    gather = functools.partial(
        custom_ops.ep_fused_moe, *drawn, group, exchange="gather", max_tokens=4, **words
    )
    gather()
    if rank == ranks - 1:
        if how == "died":
            os._exit(0)
        time.sleep(6)
        return None
    started = time.monotonic()
    again = {
        "ep_dispatch": lambda: custom_ops.ep_dispatch(*args),
        "ep_combine": lambda: custom_ops.ep_combine(out[0], *out[5:], group),
        "ep_fused_moe": gather,
    }
    with pytest.raises(ExchangeError) as caught:
        again[op]()
    return str(caught.value), time.monotonic() - started


@pytest.mark.parametrize(
    ("ranks", "op", "how"),
    [
        (2, "ep_dispatch", "died"),
        (3, "ep_combine", "died"),
        (2, "ep_dispatch", "stayed away"),
        (2, "ep_fused_moe", "died"),
        (2, "ep_fused_moe", "stayed away"),
    ],
)
def test_a_peer_that_does_not_answer_is_named(tmp_path, ranks, op, how):
    """Within the time-out of the group and the grace after it, never a hang."""
    *found, last = spawn(left_alone, ranks, tmp_path, ranks, op, how, timeout_s=3.0)
    assert last == ("died" if how == "died" else None)
    for rank, (message, seconds) in enumerate(found):
        assert message.startswith(f"{op}: rank {rank} of {ranks} (group ")
        assert f"got no answer from ranks [{ranks - 1}]: " in message
        assert seconds < 10


@pytest.fixture
def alone(tmp_path):
    """The name of a group of this process only."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD.group_name
    torch.distributed.destroy_process_group()


def arguments(group: str, dtype: torch.dtype = torch.bfloat16, scales: int = 0) -> tuple:
    ids = torch.tensor([[0, 3], [2, 2], [-1, 1]])
    scale = torch.rand(scales, 3).t() if scales else None
    return torch.randn(3, 16).to(dtype), scale, ids, torch.rand(3, 2), 4, group


@pytest.mark.parametrize("scales", [0, 2])
def test_opcheck(alone, scales):
    args = arguments(alone, scales=scales)
    torch.library.opcheck(torch.ops.custom_ops.ep_dispatch.default, args)
    torch.library.opcheck(torch.ops.custom_ops.ep_dispatch.default, args, {"max_tokens": 5})
    out = custom_ops.ep_dispatch(*args)
    torch.library.opcheck(torch.ops.custom_ops.ep_combine.default, (out[0], *out[5:], alone))


@pytest.mark.parametrize("scales", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_fakes_have_the_shapes_and_strides_of_kernels(alone, dtype, scales):
    """The number of received rows is the only size that is not known, and no guard is added."""
    args = arguments(alone, dtype, scales)
    real = custom_ops.ep_dispatch(*args)
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env) as mode:
        faked = custom_ops.ep_dispatch(
            *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args)
        )
        combined = custom_ops.ep_combine(faked[0].bfloat16(), *faked[5:], alone)
    rows = faked[0].shape[0]
    assert free_unbacked_symbols(rows)
    assert not env.guards
    wanted = [(rows, 16), (rows, 2) if scales else (0,), (rows, 2), (rows, 2), (4,)]
    wanted += [(3, 1), (rows,), (1, 1), (1, CHANNELS)]
    for r, f, shape in zip(real, faked, wanted, strict=True):
        assert f.shape == shape
        assert (r.dtype, r.device, r.dim()) == (f.dtype, f.device, f.dim())
        assert r.is_contiguous()
        assert f.stride()[-1:] == (1,)
        assert [n for n in r.shape if n != 3] == [n for n in shape if n is not rows and n != 3]
    assert combined.shape == (3, 16)


@pytest.mark.parametrize("scales", [0, 2])
def test_room_for_the_most_tokens_makes_every_size_known(alone, scales):
    args = arguments(alone, torch.float8_e4m3fn, scales)
    real = custom_ops.ep_dispatch(*args, max_tokens=5)
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env) as mode:
        fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        faked = custom_ops.ep_dispatch(*fake, max_tokens=5)
    assert not env.guards
    assert len(real[0]) == 5
    for r, f in zip(real, faked, strict=True):
        assert (r.dtype, r.shape, r.stride(), r.device) == (f.dtype, f.shape, f.stride(), f.device)


def test_the_graph_is_partitioned_around_them():
    for op in ("ep_dispatch", "ep_combine"):
        assert torch.Tag.cudagraph_unsafe in custom_ops.ops()[op].overload.tags


def test_explain(alone):
    choice = custom_ops.explain("ep_dispatch", *arguments(alone))
    assert choice.implementation.name == "reference"


def test_the_rows_of_another_dispatch_are_refused(alone):
    y, *_, sent, sources, ranks, channels = custom_ops.ep_dispatch(*arguments(alone))
    match = r"ep_combine: y has 2 rows; accepted: 3, as were received"
    with pytest.raises(ValueError, match=match):
        custom_ops.ep_combine(y[:2], sent, sources, ranks, channels, alone)
    with pytest.raises(ValueError, match=match):
        custom_ops.ep_combine(y[:2], sent, sources[:2], ranks, channels, alone)


def bad_calls(group: str) -> dict:
    x, _, ids, w, *_ = arguments(group)
    scale, dispatch, combine = torch.rand(3, 2), custom_ops.ep_dispatch, custom_ops.ep_combine
    most = functools.wraps(dispatch)(functools.partial(dispatch, max_tokens=2))
    sizes = {"sent": (3, 1), "sources": (3,), "ranks": (1, 1), "channels": (1, CHANNELS)}
    handle = {name: torch.zeros(size, dtype=torch.int32) for name, size in sizes.items()}
    two_ranks = handle | {"ranks": torch.zeros(2, 1, dtype=torch.int32)}
    long = handle | {"sent": handle["sent"].long()}
    return {
        "dtype": (dispatch, (x.double(), None, ids, w, 4, group), "x.dtype is torch.float64; acc"),
        "dims": (dispatch, (x[0], None, ids, w, 4, group), "x has 1 dimensions; accepted: 2"),
        "tokens": (dispatch, (x, None, ids[:2], w, 4, group), r"topk_ids.shape is \(2, 2\); acc"),
        "weights": (
            dispatch,
            (x, None, ids, w.double(), 4, group),
            "topk_weights.dtype is torch.f",
        ),
        "pairs": (dispatch, (x, None, ids, w[:, :1], 4, group), r"weights.shape is \(3, 1\); acc"),
        "scale": (dispatch, (x, scale[:2], ids, w, 4, group), r"scale.shape is \(2, 2\); accepted"),
        "scale dtype": (dispatch, (x, scale.half(), ids, w, 4, group), "scale.dtype is torch.floa"),
        "experts": (dispatch, (x, None, ids, w, 0, group), "num_experts is 0; accepted: 1 or more"),
        "max_tokens": (most, (x, None, ids, w, 4, group), "x has 3 tokens; accepted: at most max"),
        "group": (dispatch, (x, None, ids, w, 4, "nobody"), "group is 'nobody'; accepted: the gr"),
        "y": (combine, (x.to(torch.int8), *handle.values(), group), "y.dtype is torch.int8; accep"),
        "ranks": (combine, (x, *two_ranks.values(), group), r"ranks.shape is \(2, 1\); accepted"),
        "sent": (combine, (x, *long.values(), group), "sent.dtype is torch.int64; accepted"),
    }


@pytest.mark.parametrize("case", bad_calls(""))
def test_errors_name_the_argument(alone, case):
    op, args, message = bad_calls(alone)[case]
    with pytest.raises(ValueError, match=f"{op.__name__}: .*{message}"):
        op(*args)


def test_no_derivative(alone):
    x, *rest = arguments(alone)
    with pytest.raises(RuntimeError, match="ep_dispatch: x requires grad"):
        custom_ops.ep_dispatch(x.requires_grad_(), *rest)
