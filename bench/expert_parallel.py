"""`python -m bench expert-parallel`: dispatch, combine and whole layers over the GPUs of a host, one process for each.

Times are the slowest rank's median. `launched`: CUDA events around a call, as the host launches it, for what a CUDA
graph cannot hold; `graphed`: a CUDA graph of many calls. The ways of a row are timed in turns. Beside ours: `deep_ep`,
the calls of DeepEP's Buffer that a hand-written layer makes, and `nccl`, our reference.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import results
from bench.expert_parallel_captured import count
from bench.expert_parallel_layers import Layer
from bench.expert_parallel_world import (
    Call,
    Plan,
    World,
    graphed,
    launched,
    row,
)
from bench.results import Row, Run

TIMER = (
    "slowest rank's median; launched: events around a call; graphed: a CUDA graph of 2 to 20 calls"
)
WITHIN = 1 / 1.05  # of raw DeepEP
FP8_OF_BF16 = 1 / 0.75
MOST_LOW_LATENCY = 256
LEAST_SPLIT = 1024
GROUP_TIMEOUT = datetime.timedelta(seconds=90)


def has_deep_ep(world: World) -> bool:
    from custom_ops.expert_parallel import deep_ep

    return deep_ep.why_not(world.device) is None


def high_throughput(world: World) -> Iterator[Row]:
    """Dispatch of bfloat16 and of codes, and combine, against DeepEP's Buffer and against NCCL."""
    import custom_ops
    from custom_ops.expert_parallel import reference

    sizes, group = world.sizes, world.group
    x, ids, weights = world.draw(sizes.tokens)
    codes, scale = _codes(x)
    targets = {"of_deep_ep": WITHIN}
    rest = ids, weights, sizes.experts, group
    for name, data in {"bf16": (x, None), "fp8": (codes, scale)}.items():
        calls: dict[str, Call] = {
            "ours": partial(custom_ops.ep_dispatch, data[0], data[1], *rest),
            "nccl": partial(reference.ep_dispatch, data[0], data[1], *rest),
        }
        if has_deep_ep(world):
            calls["deep_ep"] = partial(raw_dispatch, world, *data, ids, weights)
        chosen = name_of("ep_dispatch", *data, *rest)
        times = launched(world, calls)
        yield row(world, f"ep_dispatch_{name}", sizes.tokens, times, targets, chosen=chosen)
    out = custom_ops.ep_dispatch(x, None, *rest)
    args: Any = (out[0], *out[5:], group)
    calls = {
        "ours": partial(custom_ops.ep_combine, *args),
        "nccl": partial(reference.ep_combine, *args),
    }
    if has_deep_ep(world):
        calls["deep_ep"] = partial(raw_combine, world, *out[:1], out[5:])
    chosen = name_of("ep_combine", *args)
    times = launched(world, calls)
    yield row(world, "ep_combine_bf16", sizes.tokens, times, targets, chosen=chosen)


def raw_dispatch(
    world: World, x: Tensor, scale: Tensor | None, ids: Tensor, weights: Tensor
) -> Any:
    """What a layer written for DeepEP calls."""
    from custom_ops.expert_parallel import buffers

    buffer = buffers.high_throughput("bench", world.group, 2 * x.shape[1], counted=True)
    to_rank, _, to_expert, is_in_rank, _ = buffer.get_dispatch_layout(ids, world.sizes.experts)
    return buffer.dispatch(
        x if scale is None else (x, scale),
        num_tokens_per_rank=to_rank,
        is_token_in_rank=is_in_rank,
        num_tokens_per_expert=to_expert,
        topk_idx=ids,
        topk_weights=weights,
        config=buffers.dispatch_config(world.ranks),
    )


def raw_combine(world: World, y: Tensor, handle: Iterable[Tensor]) -> Any:
    from custom_ops.expert_parallel import buffers

    sent, sources, ranks, channels = handle
    buffer = buffers.high_throughput("bench", world.group, 2 * y.shape[1], counted=True)
    config = buffers.combine_config(world.ranks)
    return buffer.combine(y, (ranks, None, channels, sources, None, sent), config=config)


def low_latency(world: World) -> Iterator[Row]:
    """Dispatch of bfloat16 and with casting to codes, and combine, in CUDA graphs."""
    from custom_ops.expert_parallel import (
        buffers,
        ep_combine_low_latency,
        ep_dispatch_low_latency,
    )
    from custom_ops.expert_parallel import low_latency_reference as reference

    sizes, group, targets = world.sizes, world.group, {"of_deep_ep": WITHIN}
    tokens = most = sizes.low_latency_tokens
    x, ids, weights = world.draw(tokens)
    rest = ids, sizes.experts, most, group
    raw: Any = None
    if has_deep_ep(world):
        raw = buffers.low_latency("bench", group, most, sizes.hidden, sizes.experts)
    for name, fp8 in {"bf16": False, "fp8": True}.items():
        if fp8 and sizes.hidden % 128:
            continue
        calls: dict[str, Call] = {
            "ours": partial(ep_dispatch_low_latency, x, *rest, fp8=fp8),
            "nccl": partial(reference.ep_dispatch_low_latency, x, *rest, fp8=fp8),
        }
        if raw:
            given = x, ids, most, sizes.experts
            calls["deep_ep"] = partial(raw.low_latency_dispatch, *given, use_fp8=fp8)
        chosen = name_of("ep_dispatch_low_latency", x, *rest)
        times = graphed(world, calls)
        yield row(world, f"ep_dispatch_low_latency_{name}", tokens, times, targets, chosen=chosen)
    for _ in range(2):  # an even number of times, see WARM_UPS
        recv_x, _, _, sources, ranges = ep_dispatch_low_latency(x, *rest)
    args = recv_x, ids, weights, sources, ranges, group
    calls = {
        "ours": partial(ep_combine_low_latency, *args),
        "nccl": partial(reference.ep_combine_low_latency, *args),
    }
    if raw:
        handle = sources, ranges, most, sizes.hidden, sizes.experts
        calls["deep_ep"] = partial(raw.low_latency_combine, recv_x, ids, weights, handle)
    chosen = name_of("ep_combine_low_latency", *args)
    times = graphed(world, calls)
    yield row(world, "ep_combine_low_latency", tokens, times, targets, chosen=chosen)


def quantize_first(world: World) -> Iterator[Row]:
    """Quantizing before dispatch (ours) and after it."""
    import custom_ops

    sizes, rest = world.sizes, (world.sizes.experts, world.group)
    if sizes.hidden % 128:
        return
    x, ids, weights = world.draw(sizes.tokens)

    def before() -> tuple[Tensor, ...]:
        out = custom_ops.ep_dispatch(*custom_ops.group_quant(x, 128), ids, weights, *rest)
        return out[:2]

    def after() -> tuple[Tensor, ...]:
        out = custom_ops.ep_dispatch(x, None, ids, weights, *rest)
        return custom_ops.group_quant(out[0], 128)

    codes, scale = custom_ops.group_quant(x, 128)
    calls = {
        "ours": before,
        "quantized_after": after,
        "dispatch_fp8": lambda: custom_ops.ep_dispatch(codes, scale, ids, weights, *rest),
        "dispatch_bf16": lambda: custom_ops.ep_dispatch(x, None, ids, weights, *rest),
    }
    times = launched(world, calls)
    made = row(world, "ep_quantize_first", sizes.tokens, times)
    made.ratios["bf16_of_fp8"] = times["dispatch_bf16"] / times["dispatch_fp8"]
    made.targets = {"bf16_of_fp8": FP8_OF_BF16}
    for a, b in zip(before(), after(), strict=True):
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            made.errors["ours"] = "the codes or scales differ from those quantized after"
    yield made


def layers(world: World) -> Iterator[Row]:
    """Dispatch, experts here, combine; against all tokens to all ranks, experts here, reduce-scatter."""

    layer = Layer.of(world)
    for tokens in world.plan.tokens or world.sizes.layer_tokens:
        x, ids, weights = world.draw(tokens)
        bounded = partial(layer.whole, x, ids, weights, max_tokens=tokens)
        gathered = partial(bounded, exchange="gather")  # what the fusion gather_tokens makes of it
        calls: dict[str, Call] = {
            "ours": gathered,
            "all_gather": partial(layer.gathered, x, ids, weights),
            "dispatched": partial(layer.dispatched, x, ids, weights),
        }
        in_graphs: dict[str, Call] = {
            "all_gather_graphed": calls["all_gather"],
            "ours_graphed": gathered,
        }
        alone: Call = partial(layer.alone, x, ids, weights)
        if tokens >= LEAST_SPLIT:
            calls["ours_in_halves"] = partial(gathered, split_from=1)
            calls["dispatched_in_halves"] = partial(bounded, split_from=1)
        if has_deep_ep(world):
            in_graphs["dispatched_graphed"] = bounded
        if tokens <= MOST_LOW_LATENCY and layer.has_low_latency:
            in_graphs["low_latency_graphed"] = partial(layer.low_latency, x, ids, weights)
        times = launched(world, calls)
        errors: dict[str, str] = {}
        try:  # all in turns: a GPU that is warmer is slower
            together = {**in_graphs, "experts_alone_graphed": alone}
            times |= graphed(world, together, repeats=2, replays=6)
        except RuntimeError as error:  # the same on every rank, or the next collective ends it
            errors |= dict.fromkeys(in_graphs, str(error))
        made = row(world, "ep_layer_bf16", tokens, times, errors=errors)
        if {"ours_graphed", "all_gather_graphed"} <= times.keys():
            made.ratios["graphed_of_all_gather"] = (
                times["all_gather_graphed"] / times["ours_graphed"]
            )
        wanted = calls["all_gather"]()
        for name, call in {**calls, **in_graphs}.items():
            if name not in errors and not layer.close(call(), wanted):
                made.errors[name] = "differs from all_gather by more than its roundings"
        yield made


def steps(world: World) -> Iterator[Row]:
    """Random sizes and routings, result by result, and the memory that is left, for so many seconds."""
    from bench.expert_parallel_steps import run

    yield run(world)


def captured(world: World) -> Iterator[Row]:
    """What of a compiled step is in CUDA graphs."""

    if not world.cuda:
        return
    layer = Layer.of(world)
    modes = ["high_throughput", *(["low_latency"] if layer.has_low_latency else [])]
    for mode in modes:
        yield count(world, layer, mode, world.sizes.low_latency_tokens)


def model(world: World) -> Iterator[Row]:
    """A stock model's layer after `parallelize_experts_`: its rewrite on and off, and what of it is in CUDA graphs."""
    from bench import expert_parallel_model

    yield from expert_parallel_model.rewrite(world)
    yield from expert_parallel_model.captured(world)


def overlap(world: World) -> Iterator[Row]:
    """The layer in two halves, one of which travels while the experts have the other, and in one."""
    from bench import expert_parallel_overlap

    yield from expert_parallel_overlap.rows(world)


def gather(world: World) -> Iterator[Row]:
    """All tokens to all ranks without max_tokens, with it, and dispatched."""
    from bench import expert_parallel_gather

    yield from expert_parallel_gather.rows(world)


def elastic(world: World) -> Iterator[Row]:
    """DeepEP 2, where it is installed and its first Buffer is left out."""
    from bench import expert_parallel_elastic

    yield from expert_parallel_elastic.rows(world)


PARTS: dict[str, Callable[[World], Iterator[Row]]] = {
    "high_throughput": high_throughput,
    "low_latency": low_latency,
    "quantize_first": quantize_first,
    "steps": steps,
    "layers": layers,
    "overlap": overlap,
    "model": model,
    "captured": captured,
    "gather": gather,
    "elastic": elastic,
}


def name_of(op: str, *args: Any) -> str:
    import custom_ops

    choice = custom_ops.explain(op, *args)
    return choice.implementation.name if choice.implementation else ""


def _codes(x: Tensor) -> tuple[Tensor, Tensor | None]:
    import custom_ops

    return custom_ops.group_quant(x, 128) if x.shape[1] % 128 == 0 else (x, None)


def measure(plan: Plan) -> tuple[Run, Path]:
    """Start the ranks, wait for them, and return the run that rank 0 wrote. Raises RuntimeError if it wrote none."""
    from torch.multiprocessing import spawn

    before = set(plan.out.glob("expert_parallel-*.json"))
    with tempfile.TemporaryDirectory() as folder:
        failure = ""
        try:
            spawn(_rank, (plan, folder), nprocs=plan.ranks)
        except Exception as error:  # of a rank; what was measured before it is kept
            failure = str(error)
    fresh = sorted(set(plan.out.glob("expert_parallel-*.json")) - before)
    if not fresh:
        raise RuntimeError(f"expert-parallel: no row was measured (parts {plan.parts}) {failure}")
    run = results.load(fresh[-1])
    if "overlap" in plan.parts:
        from bench import expert_parallel_overlap

        expert_parallel_overlap.draw_all(plan.out, run.device["name"])
    if failure:
        run.rows.append(Row("ep_run", {"ranks": plan.ranks}, errors={"run": failure}))
        run.save(plan.out)
    return run, fresh[-1]


def _rank(rank: int, plan: Plan, folder: str) -> None:
    cuda = plan.device == "cuda"
    if cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=plan.ranks,
        timeout=GROUP_TIMEOUT,
    )
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    torch.manual_seed(rank)
    group = torch.distributed.distributed_c10d._get_default_group().group_name
    world = World(rank, plan.ranks, group, device, plan.sizes, plan)
    world.generator.manual_seed(rank)
    session = results.describe("expert_parallel", device, TIMER, 0.0)
    session.commit = plan.commit or session.commit
    session.device["ranks"] = plan.ranks
    with torch.no_grad():
        for part in plan.parts:
            for made in PARTS[part](world):
                if rank == 0:
                    session.rows.append(made)
                    session.save(plan.out)  # after each row: a run that is cut off keeps them
                    print(made.label, {n: round(t, 1) for n, t in made.warm_us.items()}, flush=True)
            if cuda:
                torch.cuda.empty_cache()
    world.together()
    from custom_ops.expert_parallel import buffers

    buffers.release()
    torch.distributed.destroy_process_group()
