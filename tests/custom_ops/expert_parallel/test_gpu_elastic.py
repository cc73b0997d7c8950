"""The ElasticBuffer of DeepEP 2 between two GPUs of one host: dispatch and combine against the tokens one by one."""

from __future__ import annotations

import os
import time
import traceback
from dataclasses import replace

import pytest
import torch

import custom_ops
from custom_ops.expert_parallel import buffers, deep_ep_elastic
from tests.custom_ops.expert_parallel import properties
from tests.custom_ops.expert_parallel.processes import spawn
from tests.custom_ops.expert_parallel.test_gpu import capture

RANKS = 2
DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs"),
    pytest.mark.skipif(not deep_ep_elastic._has_elastic(), reason="needs deep_ep 2 (DeepEP)"),
]

# DeepEP 2 compiles kernels for each of these sizes, some ten seconds: few of them.
BASE = properties.Case(
    (131, 256), 64, 8, 7168, 0, 64, max_tokens=256, distinct=True, groups=0, seed=1
)
CASES = {
    "every expert": BASE,
    "no tokens on rank 0": replace(BASE, tokens=(0, 7), seed=2),
    "tokens on rank 0 only": replace(BASE, tokens=(9, 0), seed=3),
    "no tokens anywhere": replace(BASE, tokens=(0, 0), seed=4),
    "some experts nobody's": replace(BASE, tokens=(40, 33), lowest=-64, seed=5),
    "nobody's experts": replace(BASE, tokens=(5, 6), lowest=-1, highest=0, seed=6),
    "as many as there may be": replace(BASE, tokens=(256, 256), seed=7),
    "ids of 32 bits, weights of 16": replace(
        BASE, ids_dtype=torch.int32, weights_dtype=torch.bfloat16, seed=8
    ),
    "codes and scales": replace(BASE, dtype=properties.FP8, groups=56, seed=9),
}


def everything(group: str, rank: int) -> dict[str, object]:
    """What ran for each case, or its traceback, and replays of a CUDA graph."""
    os.environ["CUSTOM_OPS_DISABLE"] = "deep_ep,deep_ep_low_latency"
    found: dict[str, object] = {}
    for name, case in CASES.items():
        start = time.perf_counter()
        try:
            found[name] = properties.check(case, group, rank, DEVICE, elastic=True)
        except Exception:
            found[name] = traceback.format_exc()
        said = str(found[name])[-700:]
        print(f"rank {rank}: {name}: {time.perf_counter() - start:.1f} s, {said}", flush=True)
    try:
        found["graph"] = captured(group, rank)
    except Exception:
        found["graph"] = traceback.format_exc()
    print(f"rank {rank}: graph: {str(found['graph'])[-700:]}", flush=True)
    found["buffers"] = len(buffers._buffers)
    torch.cuda.synchronize()
    buffers.release()
    return found


def captured(group: str, rank: int) -> int:
    """A graph of dispatch and combine, replayed with other tokens: equal to calls one by one."""
    x = torch.zeros(40, BASE.hidden, dtype=torch.bfloat16, device=DEVICE)
    ids = torch.arange(BASE.top_k, device=DEVICE).repeat(40, 1)
    weights = torch.ones(40, BASE.top_k, device=DEVICE)
    most = {"max_tokens": BASE.max_tokens}

    def layer() -> torch.Tensor:
        out = custom_ops.ep_dispatch(x, None, ids, weights, BASE.experts, group, **most)
        return custom_ops.ep_combine(out[0] * (2.0 + rank), *out[5:], group, **most)

    graph, out = capture(layer)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(20):
        x.copy_(torch.randn(x.shape, generator=generator))
        ids.copy_(torch.rand(40, BASE.experts, generator=generator).argsort(1)[:, : BASE.top_k])
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, layer())
    return 20


def test_elastic_buffer(tmp_path):
    """Rows, codes, scales, ids, weights, counts and sums: bit for bit those of the tokens one by one."""
    for found in spawn(everything, RANKS, tmp_path, timeout_s=60.0, backend="nccl"):
        assert isinstance(found, dict), found
        for name in CASES:
            wanted = {"ep_dispatch deep_ep_elastic"}
            wanted |= {
                "ep_combine reference"
                if name == "codes and scales"
                else "ep_combine deep_ep_elastic"
            }
            assert found[name] == wanted, (name, found[name])
        assert found["graph"] == 20, found["graph"]
        assert found["buffers"] == 1
