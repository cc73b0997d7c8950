"""What DeepEP's methods take, and that our calls fit: names, order and defaults, as its 1.2.1 and 2.1.0 have them.

The stand-in has these signatures in full, so every test on it binds our calls to them.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch

from custom_ops import platform
from custom_ops.expert_parallel import buffers, deep_ep_elastic
from tests.custom_ops.expert_parallel import deep_ep_stand_in

WAITING = "previous_event=None async_finish=False allocate_on_comm_stream=False"
STREAMS = (
    "previous_event=None previous_event_before_epilogue=None async_with_compute_stream=False"
    " allocate_on_comm_stream=False"
)
BUFFER = {
    "__init__": "group num_nvl_bytes=0 num_rdma_bytes=0 low_latency_mode=False num_qps_per_rank=24"
    " allow_nvlink_for_low_latency_mode=True allow_mnnvl=False explicitly_destroy=False",
    "get_dispatch_layout": f"topk_idx num_experts {WAITING}",
    "dispatch": "x handle=None num_tokens_per_rank=None num_tokens_per_rdma_rank=None is_token_in_rank=None"
    " num_tokens_per_expert=None topk_idx=None topk_weights=None expert_alignment=1 num_worst_tokens=0"
    f" config=None {WAITING}",
    "combine": f"x handle topk_weights=None bias=None config=None {WAITING}",
    "low_latency_dispatch": "x topk_idx num_max_dispatch_tokens_per_rank num_experts"
    " cumulative_local_expert_recv_stats=None dispatch_wait_recv_cost_stats=None use_fp8=True round_scale=False"
    " use_ue8m0=False async_finish=False return_recv_hook=False",
    "low_latency_combine": "x topk_idx topk_weights handle",
    "get_low_latency_rdma_size_hint": "num_max_dispatch_tokens_per_rank hidden num_ranks num_experts",
    "destroy": "",
}
ELASTIC = {
    "__init__": "group num_bytes=None num_cpu_bytes=0 num_max_tokens_per_rank=0 hidden=0 num_topk=0"
    " use_fp8_dispatch=False deterministic=False allow_hybrid_mode=True allow_multiple_reduction=True"
    " prefer_overlap_with_compute=True sl_idx=3 num_allocated_qps=0 num_cpu_timeout_secs=300"
    " num_gpu_timeout_secs=100 explicitly_destroy=False",
    "dispatch": "x topk_idx=None topk_weights=None cumulative_local_expert_recv_stats=None num_experts=None"
    " num_max_tokens_per_rank=None expert_alignment=None num_sms=0 num_qps=0 previous_event=None"
    " previous_event_before_epilogue=None async_with_compute_stream=False allocate_on_comm_stream=False handle=None"
    " do_handle_copy=True do_cpu_sync=None do_expand=False do_zero_padding=False use_tma_aligned_col_major_sf=False",
    "combine": f"x handle topk_weights=None bias=None num_sms=0 num_qps=0 {STREAMS}",
    "destroy": "",
}
HANDLE = {
    "__init__": "do_expand num_experts expert_alignment num_max_tokens_per_rank num_sms topk_idx num_recv_tokens"
    " num_expanded_tokens num_recv_tokens_per_expert_list psum_num_recv_tokens_per_scaleup_rank"
    " psum_num_recv_tokens_per_expert num_unaligned_recv_tokens_per_expert recv_src_metadata dst_buffer_slot_idx"
    " token_metadata_at_forward channel_linked_list",
}
CONFIG = "num_sms=20 send=6 recv=256 rdma_send=6 rdma_recv=256"
CLASSES = {"Buffer": BUFFER, "ElasticBuffer": ELASTIC, "EPHandle": HANDLE}
METHODS = [(name, method) for name, methods in CLASSES.items() for method in methods]
# A name that only one of the two versions has, or that the stand-in leaves to **more.
OPTIONAL = {"self", "comm", "enable_shrink", "more", "use_logfmt", "zero_copy", "async_finish"}
OPTIONAL |= {"return_recv_hook", "out", "combine_wait_recv_cost_stats"}


def parameters(function: Any) -> list[str]:
    """Names and defaults in order; without those that are optional here and in no table."""
    return [
        p.name if p.default is inspect.Parameter.empty else f"{p.name}={p.default}"
        for p in inspect.signature(function).parameters.values()
    ]


def assert_fits(function: Any, wanted: str) -> None:
    """What is wanted, in that order; nothing else but what is optional, and what has to be given is wanted."""
    found, names = parameters(function), wanted.split()
    assert [p for p in found if p in names] == names
    assert {p.split("=")[0] for p in found if p not in names} <= OPTIONAL


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_the_stand_in_takes_what_deep_ep_takes(name, method):
    if (name, method) == ("Buffer", "get_low_latency_rdma_size_hint"):
        found = parameters(deep_ep_stand_in.Buffer.get_low_latency_rdma_size_hint)
        assert len(found) == len(BUFFER[method].split())  # called by position
        return
    assert_fits(getattr(getattr(deep_ep_stand_in, name), method), CLASSES[name][method])


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_deep_ep_takes_what_is_written_here(name, method):
    if not platform.has_package("deep_ep"):
        pytest.skip("needs deep_ep (DeepEP)")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, without which deep_ep is not imported")
    owner = getattr(importlib.import_module("deep_ep"), name, None)
    if owner is None:
        pytest.skip(f"needs a deep_ep with {name}")
    assert_fits(getattr(owner, method), CLASSES[name][method])


class Recorded:
    """A package whose classes note how they are made and called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple, dict]] = []

    def __getattr__(self, name: str) -> Any:
        def make(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return object()

        return make


def bound(wanted: str, args: tuple, kwargs: dict) -> dict[str, Any]:
    """What each parameter of a method gets by a call. Raises TypeError for one that does not fit."""
    empty = inspect.Parameter.empty
    made = inspect.Signature(
        [
            inspect.Parameter(
                part.split("=")[0],
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=part.split("=")[1] if "=" in part else empty,
            )
            for part in wanted.split()
        ]
    )
    return dict(made.bind(*args, **kwargs).arguments)


@pytest.fixture
def recorded(monkeypatch):
    package = Recorded()
    monkeypatch.setattr(buffers, "package", lambda: package)
    monkeypatch.setattr(buffers, "_buffers", {})
    monkeypatch.setattr(buffers.atexit, "register", lambda function: None)
    monkeypatch.setattr(buffers.groups, "resolve", lambda op, group: "the group")
    monkeypatch.setattr(buffers.groups, "number", lambda op, group: 0)
    return package


def test_the_elastic_buffer_that_is_made(recorded):
    """In order, or rows would come in any; without a hierarchy, as there is one host."""
    buffers.elastic("ep_dispatch", "0", 128, 7168, 8)
    ((name, args, kwargs),) = recorded.calls
    assert name == "ElasticBuffer"
    assert bound(ELASTIC["__init__"], args, kwargs) == {
        "group": "the group",
        "num_max_tokens_per_rank": 128,
        "hidden": 7168,
        "num_topk": 8,
        "deterministic": True,
        "allow_hybrid_mode": False,
        "explicitly_destroy": True,
    }


def test_an_elastic_buffer_serves_what_is_smaller(recorded):
    wide = buffers.elastic("ep_dispatch", "0", 128, 7168, 8)
    assert buffers.elastic("ep_combine", "0", 128, 7168, 2) is wide
    assert buffers.elastic("ep_combine", "0", 128, 2048, 8) is wide
    for other in ((256, 7168, 8), (64, 7168, 8), (128, 8192, 8), (128, 7168, 9)):
        assert buffers.elastic("ep_dispatch", "0", *other) is not wide
    with buffers.batch(1):
        assert buffers.elastic("ep_dispatch", "0", 128, 7168, 8) is not wide
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(buffers.groups, "number", lambda op, group: 1)
        with pytest.warns(UserWarning, match="buffers of an earlier group '0' keep their memory"):
            assert buffers.elastic("ep_dispatch", "0", 128, 7168, 8) is not wide


class Dispatched(Exception):
    pass


def test_the_dispatch_that_is_called(recorded, monkeypatch):
    """Nobody waits for the host, tokens are not expanded, and the SMs are those that the handle is told."""
    seen = []

    class Buffer:
        def dispatch(self, *args: Any, **kwargs: Any) -> None:
            seen.append((args, kwargs))
            raise Dispatched

    monkeypatch.setattr(buffers, "elastic", lambda *args: Buffer())
    monkeypatch.setattr(deep_ep_elastic, "agree_once", lambda *args: None)
    one = type("Group", (), {"rank": lambda self: 0, "size": lambda self: 2})()
    monkeypatch.setattr(deep_ep_elastic.groups, "resolve", lambda op, group: one)
    x, ids = torch.zeros(3, 256).bfloat16(), torch.tensor([[0, 9], [1, -7], [2, 3]])
    with pytest.raises(Dispatched):
        deep_ep_elastic.ep_dispatch(
            x, None, ids.int(), torch.ones(3, 2).bfloat16(), 4, "0", max_tokens=8
        )
    ((args, kwargs),) = seen
    given = bound(ELASTIC["dispatch"], args, kwargs)
    assert given.pop("x") is x
    assert given.pop("topk_idx").tolist() == [[0, -1], [1, -1], [2, 3]]
    assert given.pop("topk_weights").dtype == torch.float32
    assert given == {
        "num_experts": 4,
        "num_max_tokens_per_rank": 8,
        "num_sms": buffers.SMS,
        "do_cpu_sync": False,
    }
