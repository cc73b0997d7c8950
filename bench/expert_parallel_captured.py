"""How much of a compiled step runs in CUDA graphs: what the profiler sees launched, in graphs and one by one."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import custom_ops
from bench.expert_parallel_world import World, launched, row
from bench.results import Row
from custom_ops.expert_parallel import ep_combine_low_latency, ep_dispatch_low_latency

LAYERS = 2
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
GRAPHS = "cudaGraphLaunch"


def step_of(world: World, layer: Any, mode: str) -> Callable[[Tensor, Tensor], Tensor]:
    """A few layers of norm, router, experts and residual, in plain PyTorch but for what moves tokens."""
    sizes = world.sizes

    def move(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if mode == "high_throughput":
            return layer.dispatched(x, ids, weights, max_tokens=sizes.low_latency_tokens)
        return layer.low_latency(x, ids, weights)

    def step(x: Tensor, router: Tensor) -> Tensor:
        for _ in range(LAYERS):
            rows = torch.nn.functional.rms_norm(x, (sizes.hidden,))
            scores = torch.softmax((rows @ router).float(), -1)
            weights, ids = scores.topk(sizes.top_k, dim=-1)
            x = x + move(rows, ids, weights / weights.sum(-1, keepdim=True))
        return x

    return step


def alone_of(world: World, x: Tensor, ids: Tensor, weights: Tensor, mode: str) -> Any:
    """What the dispatches and combines of a step launch."""
    rest, most = (world.sizes.experts, world.group), world.sizes.low_latency_tokens
    if mode == "high_throughput":
        out = custom_ops.ep_dispatch(x, None, ids, weights, *rest, max_tokens=most)
        return custom_ops.ep_combine(out[0], *out[5:], world.group)
    low = ep_dispatch_low_latency(x, ids, rest[0], len(x), world.group)
    return ep_combine_low_latency(low[0], ids, weights, *low[3:], world.group)


def launches(call: Callable[[], Any]) -> Counter[str]:
    """How many kernels and graphs the host launches in a call; and by "outside: <name>", which kernels and copies."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found: Counter[str] = Counter()
    launched_by = {}
    for event in events:
        if event.get("cat") in ("cuda_runtime", "cuda_driver"):
            launched_by[event["args"].get("correlation")] = event["name"]
            found["kernels"] += event["name"] in LAUNCHES
            found["graphs"] += event["name"] == GRAPHS
    for event in events:
        on_gpu = event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
        if on_gpu and launched_by.get(event["args"].get("correlation")) != GRAPHS:
            found[f"outside: {event['name'][:400]}"] += 1
    return found


def is_copy(name: str) -> bool:
    """Whether a kernel or a transfer outside of graphs puts something where a graph reads it, and computes nothing."""
    return any(sign in name for sign in ("Memcpy", "copy", "Copy", "Memset"))


def count(world: World, layer: Any, mode: str, tokens: int) -> Row:
    """The row of one mode. In `fired`: graphs launched, kernels outside of them, those of the ops by themselves, and by
    name what else there is outside. That may be copies, of what an op has made into where the next graph reads it.
    """

    x, ids, weights = world.draw(tokens)
    router = torch.randn(world.sizes.hidden, world.sizes.experts, device=world.device).bfloat16()
    for tensor in (x, router, layer.gate_up, layer.down):
        torch._dynamo.mark_static_address(tensor)  # or a graph would begin by copying them
    step = step_of(world, layer, mode)
    compiled = torch.compile(step, backend="fusion_passes", mode="reduce-overhead", fullgraph=True)

    def run() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x, router)

    for _ in range(4):
        out = run().clone()
    # not eager: one rounding that Inductor leaves out sends a token to another expert, which says nothing of graphs
    wanted = torch.compile(step, backend="fusion_passes", fullgraph=True)(x, router)
    world.together()
    whole = launches(run)
    world.together()
    each = launches(lambda: alone_of(world, x, ids, weights, mode))
    world.together()
    times = launched(world, {"ours": run, "eager": lambda: step(x, router)})
    made = row(world, f"ep_captured_{mode}", tokens, times)
    of_ops = each["kernels"] * LAYERS if mode == "high_throughput" else 0
    made.fired = {
        "graphs": whole["graphs"],
        "kernels_outside": whole["kernels"],
        "kernels_of_dispatch_and_combine": of_ops,
    }
    names = {name for name in whole if name.startswith("outside: ")}
    for name in sorted(names):
        if extra := whole[name] - each[name] * (LAYERS if mode == "high_throughput" else 0):
            made.fired[name] = extra
    others = {n: made.fired[n] for n in names & made.fired.keys() if not is_copy(n)}
    if others or not whole["graphs"]:
        made.errors["ours"] = f"not all else is in graphs: {others}"
    limit = 2**-5 * wanted.float().abs().amax()
    if not ((out.float() - wanted.float()).abs() <= limit).all():
        made.errors["result"] = "differs from the same code without graphs"
    return made
