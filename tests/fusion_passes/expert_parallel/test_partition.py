"""What CUDA graphs hold: all but dispatch and combine in high throughput, all of it in low latency."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch._inductor import cudagraph_trees

import custom_ops
import fusion_passes
from fusion_passes import torch_internals
from tests.fusion_passes.expert_parallel.graphs import fp8_experts, layer, tokens
from tests.models import moe_zoo

LAYERS = 2


def test_what_may_be_captured():
    ops = custom_ops.ops()
    unsafe = {name for name in ops if torch.Tag.cudagraph_unsafe in ops[name].overload.tags}
    assert unsafe == {"ep_dispatch", "ep_combine", "ep_fused_moe"}


def options_of(fn, args, monkeypatch, **given) -> dict:
    """The options that Inductor gets for a compilation."""
    found = []

    def record(gm, example_inputs, options):
        found.append(options)
        return gm.forward

    monkeypatch.setattr(torch_internals, "compile_with_inductor", record)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fn, backend="fusion_passes", fullgraph=True, options=given)(*args)
    torch._dynamo.reset()
    (options,) = found
    return options


def test_a_graph_with_a_dispatch_is_partitioned(alone, monkeypatch):
    fn, args = layer(alone, 4, fp8_experts()), tokens(5)
    with torch._inductor.config.patch(graph_partition=False):
        assert options_of(fn, args, monkeypatch)["graph_partition"] is True


def test_whoever_says_otherwise_is_heard(alone, monkeypatch):
    fn, args = layer(alone, 4, fp8_experts()), tokens(5)
    assert options_of(fn, args, monkeypatch, graph_partition=False)["graph_partition"] is False


def test_other_graphs_are_left_alone(monkeypatch):
    assert "graph_partition" not in options_of(torch.relu, (torch.ones(3),), monkeypatch)


def test_low_latency_is_left_alone(alone, monkeypatch):
    """Nothing in it is outside of a CUDA graph."""
    pytest.importorskip("transformers", reason="needs the extra 'models'")
    model = copy.deepcopy(moe_zoo.build("qwen3_moe", layers=1))
    fusion_passes.parallelize_experts_(model, alone, mode="low_latency", max_tokens=8)
    _, experts = next(fusion_passes.expert_parallel.sharding._experts_of(model))
    args = tokens(5, 128, moe_zoo.EXPERTS, moe_zoo.TOP_K)
    assert "graph_partition" not in options_of(experts, args, monkeypatch)


@pytest.fixture
def alone_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv("CUSTOM_OPS_DISABLE")
    store = f"file://{tmp_path / 'store'}"
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", init_method=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD.group_name
    # NCCL does not let go of a communicator that a CUDA graph was captured with.
    torch._dynamo.reset()
    cudagraph_trees.reset_cudagraph_trees()
    gc.collect()
    torch.cuda.synchronize()
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("mode", "max_tokens", "pieces"),
    [("high_throughput", 0, 2 * LAYERS + 1), ("low_latency", 32, 1)],
)
def test_captured_pieces(alone_on_a_gpu, monkeypatch, mode, max_tokens, pieces):
    """By replays of CUDA graphs in one call. Between two ops that stay outside there is one piece."""
    pytest.importorskip("transformers", reason="needs the extra 'models'")
    model = copy.deepcopy(moe_zoo.build("qwen3_moe", layers=LAYERS)).cuda()
    fusion_passes.parallelize_experts_(model, alone_on_a_gpu, mode=mode, max_tokens=max_tokens)
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(1), replay(self))[1]
    )
    torch._dynamo.reset()
    ids = moe_zoo.tokens(16).cuda()
    compiled = torch.compile(model, backend="fusion_passes", mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(ids, use_cache=False).logits.clone()
        replays.clear()
        torch.compiler.cudagraph_mark_step_begin()
        found = compiled(ids, use_cache=False).logits.clone()
    assert len(replays) == pieces
    assert float((found - expected).norm() / expected.norm()) <= 5e-2
