"""All tokens to all ranks or each to those of its experts, where nobody knows how many tokens a rank has at most.

Both wait for the host then: gathering for the largest number of tokens, dispatching for the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import fusion_passes
from bench.expert_parallel_layers import Layer
from bench.expert_parallel_model import block_of, compiled, tokens_of
from bench.expert_parallel_world import Call, World, launched, row
from bench.results import Row

UNEVEN = 8  # rank 0 has so many times the tokens of the others
COMPILED_TOKENS = (128, 1024)


def rows(world: World) -> Iterator[Row]:
    yield from _launched(world)
    yield from _compiled(world)


def _launched(world: World) -> Iterator[Row]:
    """`ours`: gathered without max_tokens; the same with it; dispatched; by hand, which knows that all have as many."""
    layer = Layer.of(world)
    for tokens in world.plan.tokens or world.sizes.layer_tokens:
        for name, mine in {"even": tokens, "uneven": -(-tokens // UNEVEN)}.items():
            x, ids, weights = world.draw(mine if world.rank else tokens)
            gathered = partial(layer.whole, x, ids, weights, exchange="gather")
            calls: dict[str, Call] = {
                "ours": gathered,
                "bounded": partial(gathered, max_tokens=tokens),
                "dispatched": partial(layer.whole, x, ids, weights),
            }
            if name == "even":
                calls["all_gather"] = partial(layer.gathered, x, ids, weights)
            made = row(world, f"ep_gather_{name}_bf16", tokens, launched(world, calls))
            wanted = calls["dispatched"]()
            for way, call in calls.items():
                if not layer.close(call(), wanted):
                    made.errors[way] = "differs from dispatched by more than its roundings"
            yield made


def _compiled(world: World) -> Iterator[Row]:
    """A layer of a stock model, sharded without max_tokens, in CUDA graphs as far as they go: on (`ours`) and off."""
    if not world.cuda:
        return
    block = block_of(world)
    fusion_passes.parallelize_experts_(block, world.group)
    for tokens in COMPILED_TOKENS:
        torch._dynamo.reset()
        x = tokens_of(world, tokens, block.experts.down_proj.shape[1])
        calls: dict[str, Call] = {
            name: partial(compiled(block, True, gather_tokens=on), x)
            for name, on in {"ours": True, "off": False}.items()
        }
        for call in calls.values():
            for _ in range(3):  # warm up, record, replay
                call()
        yield row(world, "ep_gather_compiled_bf16", tokens, launched(world, calls))
