"""Many dispatches and combines of random sizes in one process: no wrong result, no hang, no memory that stays away."""

from __future__ import annotations

import random
import time

import torch
from torch import Tensor

import custom_ops
from bench.expert_parallel_layers import Layer
from bench.expert_parallel_world import World
from bench.results import Row
from custom_ops.expert_parallel import ep_combine_low_latency, ep_dispatch_low_latency

WANTED = 10_000
BLOCK = 100  # steps between two looks at the clock
SAID = 1000
LEAK_BYTES = 4 << 20


def run(world: World) -> Row:
    """Steps until the seconds are over or 10,000 are done.

    `grown`: bytes that are in use at the end and were not early on, when every buffer was there. What the allocator
    keeps for later is not in use.
    """
    sizes, start = world.sizes, time.perf_counter()
    numbers, common = random.Random(world.rank), random.Random(0)
    layer = Layer.of(world, sizes.step_hidden, sizes.step_hidden // 8)
    done = early = late = 0
    wrong = torch.zeros((), dtype=torch.int64, device=world.device)  # nobody waits for it
    block_of = BLOCK if world.cuda else 4
    wanted = WANTED if world.cuda else 8
    while done < wanted and _goes_on(world, start):
        for _ in range(block_of):
            wrong += _high_throughput(world, numbers)
            if done % 4 == 0:
                wrong += _low_latency(world, numbers)
            if done % 20 == 0:
                wrong += _whole(layer, numbers, common)
            done += 1
        late = _in_use(world)
        if world.rank == 0 and done % SAID == 0:
            print(f"{done} steps, {time.perf_counter() - start:.1f} s", flush=True)
        early = late if done <= 5 * block_of else early
    seconds = time.perf_counter() - start
    made = Row(
        "ep_steps",
        {"steps": done, "ranks": world.ranks, "hidden": sizes.step_hidden},
        warm_us={"ours": 1e6 * seconds / max(1, done)},
    )
    total = world.slowest({"wrong": float(wrong), "grown": float(late - early)})
    made.ratios = {"wrong": total["wrong"], "grown_mib": total["grown"] / 2**20}
    if total["wrong"]:
        made.errors["ours"] = f"{int(total['wrong'])} of {done} steps gave a wrong result"
    if total["grown"] > LEAK_BYTES:
        made.errors["memory"] = f"{total['grown'] / 2**20:.1f} MiB more in use than early on"
    return made


def _goes_on(world: World, start: float) -> bool:
    """Whether rank 0 has time left."""
    left = torch.tensor(
        [time.perf_counter() - start < world.plan.steps_seconds], dtype=torch.int32
    ).to(world.device)
    torch.distributed.broadcast(left, 0)
    return bool(left.item())


def _in_use(world: World) -> int:
    """Bytes of tensors, and all that is on the device and not PyTorch's."""
    if not world.cuda:
        return 0
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return torch.cuda.memory_allocated() + total - free - torch.cuda.memory_reserved()


def _high_throughput(world: World, numbers: random.Random) -> Tensor:
    """Whether the sums or the counts are wrong."""
    sizes = world.sizes
    tokens = numbers.choice((0, 1, numbers.randint(0, sizes.step_tokens)))
    top_k = sizes.top_k
    x = torch.randint(-8, 8, (tokens, sizes.step_hidden), device=world.device).bfloat16()
    most = numbers.choice((sizes.experts, world.local))
    ids = torch.randint(0, most, (tokens, top_k), device=world.device)
    weights = torch.rand(tokens, top_k, device=world.device)
    out = custom_ops.ep_dispatch(x, None, ids, weights, sizes.experts, world.group)
    back = custom_ops.ep_combine(out[0], *out[5:], world.group)
    owners = torch.nn.functional.one_hot(ids // world.local, world.ranks).amax(1)
    copies = owners.sum(1, keepdim=True) if tokens else owners.new_zeros((0, 1))
    return (back != x * copies).any() | ((out[2] >= 0).sum() != out[4].sum())


def _whole(layer: Layer, numbers: random.Random, common: random.Random) -> Tensor:
    """Whether a mixture of experts gives something else when it is gathered or goes in halves, or what is not finite.

    common: what all ranks draw alike. The experts take rows of two numbers, as each may need kernels of its own.
    """
    world, sizes = layer.world, layer.world.sizes
    exchange, split = common.choice(("dispatch", "gather")), common.choice((0, 1))
    most = sizes.step_tokens
    tokens = numbers.choice((0, 1, most, numbers.randint(0, most)))
    x = torch.randn(tokens, sizes.step_hidden, device=world.device).bfloat16()
    ids = torch.rand(tokens, sizes.experts, device=world.device).argsort(1)[:, : sizes.top_k]
    weights = torch.rand(tokens, sizes.top_k, device=world.device)
    wanted = layer.whole(x, ids, weights, max_tokens=most).float()
    found = layer.whole(x, ids, weights, exchange=exchange, split_from=split, max_tokens=most)
    limit = 2**-6 * wanted.norm(dim=1, keepdim=True, p=torch.inf)
    return ((found.float() - wanted).abs() > limit).any() | ~found.isfinite().all()


def _low_latency(world: World, numbers: random.Random) -> Tensor:
    """Whether the sums are wrong."""
    sizes = world.sizes
    most = sizes.low_latency_tokens
    tokens = numbers.choice((0, 1, most, numbers.randint(0, most)))
    x = torch.randint(-8, 8, (tokens, sizes.step_hidden), device=world.device).bfloat16()
    ids = torch.rand(tokens, sizes.experts, device=world.device).argsort(1)[:, : sizes.top_k]
    weights = torch.ones(tokens, sizes.top_k, device=world.device)
    rest = sizes.experts, most, world.group
    out = ep_dispatch_low_latency(x, ids, *rest)
    back = ep_combine_low_latency(out[0], ids, weights, *out[3:], world.group)
    return (back != x * sizes.top_k).any()
