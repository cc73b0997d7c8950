"""Dispatch and combine between two GPUs of one host: NCCL, and DeepEP where it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from typing import Any

import pytest
import torch

import custom_ops
from custom_ops import platform
from custom_ops.expert_parallel import buffers, ep_combine_low_latency, ep_dispatch_low_latency
from tests.custom_ops.expert_parallel import low_latency_properties, properties
from tests.custom_ops.expert_parallel.processes import spawn

RANKS = 2
DEVICE = "cuda"
HAS_DEEP_EP = platform.has_package("deep_ep")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs"),
]
needs_deep_ep = pytest.mark.skipif(not HAS_DEEP_EP, reason="needs deep_ep (DeepEP)")


def high_throughput(group: str, rank: int) -> dict:
    found = {
        "named": properties.named(group, rank, RANKS, DEVICE),
        "every code": properties.every_code(group, rank, RANKS, DEVICE),
        "random": properties.random_routings(
            group, rank, RANKS, 0, 100, DEVICE, most_tokens=40, hiddens=(16, 32, 256, 512)
        ),
        "graph": captured_high_throughput(group, rank),
        "behind a graph": counted_behind_a_graph(group, rank),
    }
    for dtype, groups in ((torch.bfloat16, 0), (properties.FP8, 56)):
        case = properties.Case((300, 131), 64, 8, 7168, 0, 64, dtype=dtype, groups=groups)
        found[str(dtype)] = len(properties.check(case, group, rank, DEVICE))
    return found


def low_latency(group: str, rank: int) -> dict:
    return {
        "named": low_latency_properties.named(group, rank, RANKS, DEVICE, hidden=2048),
        "graph": captured(group, rank, hidden=2048),
    }


def nccl(group: str, rank: int) -> dict:
    os.environ["CUSTOM_OPS_DISABLE"] = "deep_ep,deep_ep_low_latency"
    try:
        return {
            "named": properties.named(group, rank, RANKS, DEVICE),
            "every code": properties.every_code(group, rank, RANKS, DEVICE),
            "random": properties.random_routings(group, rank, RANKS, 0, 30, DEVICE),
            "low latency": low_latency_properties.named(group, rank, RANKS, DEVICE),
            "graph": captured(group, rank, hidden=256),
        }
    finally:
        del os.environ["CUSTOM_OPS_DISABLE"]


def several_buffers(group: str, rank: int) -> dict:
    """Low-latency buffers of several sizes in one process, and the end of all buffers."""
    args = group, rank, RANKS, 10, (2048, 7168), DEVICE
    found = {"random": low_latency_properties.random_routings(*args)}
    buffers.release()
    return found


PARTS = {
    "high_throughput": high_throughput,
    "low_latency": low_latency,
    "nccl": nccl,
    "several_buffers": several_buffers,
}


def everything(group: str, rank: int) -> dict:
    """Every part in one process, as processes take long to start; what each found, or its traceback."""
    found: dict[str, Any] = {}
    for name, part in PARTS.items():
        if name != "nccl" and not HAS_DEEP_EP:
            continue
        start = time.perf_counter()
        try:
            found[name] = part(group, rank)
        except Exception:
            found[name] = traceback.format_exc()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(f"rank {rank}: {name}: {seconds:.1f} s, {str(found[name])[-600:]}", flush=True)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    return spawn(everything, RANKS, folder, timeout_s=30.0, backend="nccl")


def of(found: list, part: str) -> list[dict]:
    for each in found:
        assert isinstance(each, dict), each
        assert isinstance(each[part], dict), each[part]
    return [each[part] for each in found]


def test_nccl(found):
    for each in of(found, "nccl"):
        assert each["random"]["ep_dispatch reference"] == 30
        assert each["graph"] == "reference"


@needs_deep_ep
def test_deep_ep(found):
    """Rows, codes, scales, ids, weights, counts, handles and sums: bit for bit those of the reference."""
    for each in of(found, "high_throughput"):
        assert each["random"]["ep_dispatch deep_ep"] > 40
        assert each["random"]["ep_combine deep_ep"] > 5
        # A row of 16 codes of 8 bits is too short for DeepEP.
        assert each["random"]["ep_dispatch reference"] > 0
        assert each["graph"] == 20
        assert each["behind a graph"] == 10


@needs_deep_ep
def test_deep_ep_low_latency(found):
    for each in of(found, "low_latency"):
        assert each["graph"] == "deep_ep_low_latency"


@needs_deep_ep
def test_deep_ep_low_latency_of_several_sizes(found):
    for each in of(found, "several_buffers"):
        assert each["random"]["ep_dispatch_low_latency deep_ep_low_latency"] == 10
        assert each["random"]["ep_combine_low_latency deep_ep_low_latency"] == 10


def captured_high_throughput(group: str, rank: int) -> int:
    """With room for the most tokens nobody waits for the host, and the ops may be captured."""
    x = torch.zeros(8, 256, dtype=torch.bfloat16, device=DEVICE)
    ids = torch.zeros(8, 2, dtype=torch.int64, device=DEVICE)
    weights = torch.ones(8, 2, device=DEVICE)

    def layer() -> torch.Tensor:
        out = custom_ops.ep_dispatch(x, None, ids, weights, 4, group, max_tokens=8)
        return custom_ops.ep_combine(out[0] * (2.0 + rank), *out[5:], group)

    graph, out = capture(layer)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(20):
        x.copy_(torch.randn(8, 256, generator=generator))
        ids.copy_(torch.randint(-1, 4, (8, 2), generator=generator))
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, layer())
    return 20


def counted_behind_a_graph(group: str, rank: int) -> int:
    """The host waits for a number of rows while dispatches that it does not wait for are still on their way."""
    few, many = (
        (
            torch.full((count, 256), rank + 1, dtype=torch.bfloat16, device=DEVICE),
            None,
            torch.arange(2 * count, device=DEVICE).view(count, 2) % 4,
            torch.ones(count, 2, device=DEVICE),
            4,
            group,
        )
        for count in (1, 3000)
    )
    graph, _ = capture(lambda: custom_ops.ep_dispatch(*few, max_tokens=1)[0])
    expected = custom_ops.ep_dispatch(*many)
    assert len(expected[0]) == 2 * 1500
    for _ in range(10):
        torch.cuda.synchronize()
        for _ in range(30):
            graph.replay()
        found = custom_ops.ep_dispatch(*many)
        for a, b in zip(found[:5], expected[:5], strict=True):
            assert torch.equal(a, b)
    return 10


def captured(group: str, rank: int, hidden: int) -> str:
    """The same graph replayed with other tokens and other routings: equal to calls one by one."""
    case = low_latency_properties.named_cases(RANKS, hidden)["every expert"]
    most, tokens = case.max_tokens, 3
    x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device=DEVICE)
    ids = torch.zeros(tokens, 2, dtype=torch.int64, device=DEVICE)
    ids[:, 1] = 1
    weights = torch.ones(tokens, 2, device=DEVICE)

    def layer() -> torch.Tensor:
        recv_x, _, _, *handle = ep_dispatch_low_latency(x, ids, case.experts, most, group)
        y = recv_x * (2.0 + rank)
        return ep_combine_low_latency(y, ids, weights, *handle, group)

    graph, out = capture(layer)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(20):
        x.copy_(torch.randn(tokens, hidden, generator=generator))
        ids.copy_(torch.rand(tokens, case.experts, generator=generator).argsort(1)[:, :2])
        weights.copy_(torch.rand(tokens, 2, generator=generator))
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, layer())
    choice = custom_ops.explain("ep_dispatch_low_latency", x, ids, case.experts, most, group)
    assert choice.implementation is not None
    return choice.implementation.name


def capture(layer: Any) -> tuple[Any, torch.Tensor]:
    """A CUDA graph of a layer, which all ranks capture together, and what it writes."""
    layer()
    torch.cuda.synchronize()
    torch.distributed.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer()
    return graph, out


LEFT_ALONE = """
import datetime, os, sys, time
import torch
rank, store = int(sys.argv[1]), sys.argv[2]
torch.cuda.set_device(rank)
timeout = datetime.timedelta(seconds=4)
torch.distributed.init_process_group(
    "nccl", init_method="file://" + store, rank=rank, world_size=2
)
from custom_ops.expert_parallel import ep_dispatch_low_latency
group = torch.distributed.new_group([0, 1], timeout=timeout).group_name
x = torch.ones(4, 2048, dtype=torch.bfloat16, device="cuda")
ids = torch.tensor([[0], [1], [2], [3]], device="cuda")
torch.distributed.barrier()
ep_dispatch_low_latency(x, ids, 4, 4, group)
torch.cuda.synchronize()
if rank == 1:
    time.sleep(30)
    os._exit(0)
ep_dispatch_low_latency(x, ids, 4, 4, group)
torch.cuda.synchronize()
"""


@needs_deep_ep
def test_a_peer_that_stays_away_from_a_low_latency_op_is_named(tmp_path):
    """The kernel would wait for ever; the process ends, and says why."""
    command = [sys.executable, "-c", LEFT_ALONE]
    left = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        _, said = left[0].communicate(timeout=50)
        assert "ep_dispatch_low_latency: rank 0 of 2 (group " in said
        assert "got no answer from ranks [1]: nothing for 4.0 s" in said
        assert left[0].returncode == 70
    finally:
        for process in left:
            process.kill()
