"""Dispatch and combine by the ElasticBuffer of DeepEP 2: ours beside the calls that a layer written for it makes.

Needs CUSTOM_OPS_DISABLE=deep_ep: where that is not left out, the ops take DeepEP's first Buffer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import custom_ops
from bench.expert_parallel_world import Call, World, launched, row
from bench.results import Row
from custom_ops.expert_parallel import buffers

TOKENS = (128, 4096)
SMS = (0, 64)  # 0: as many as DeepEP thinks best


def rows(world: World) -> Iterator[Row]:
    """Raw calls in `deep_ep` (with as many SMs as ours) and `deep_ep_<SMs>`."""
    from custom_ops.expert_parallel import deep_ep_elastic

    if deep_ep_elastic.why_not(world.device) is not None:
        return
    sizes = world.sizes
    for tokens in TOKENS:
        x, ids, weights = world.draw(tokens)
        rest = ids, weights, sizes.experts, world.group
        for name, (data, scale) in {
            "bf16": (x, None),
            "fp8": custom_ops.group_quant(x, 128),
        }.items():
            given = data if scale is None else (data, scale)
            calls: dict[str, Call] = {
                "ours": partial(custom_ops.ep_dispatch, data, scale, *rest, max_tokens=tokens),
                "deep_ep": partial(dispatch, world, given, ids, weights, tokens, buffers.SMS),
            }
            for sms in SMS:
                calls[f"deep_ep_{sms}"] = partial(dispatch, world, given, ids, weights, tokens, sms)
            args = data, scale, *rest
            choice = custom_ops.explain("ep_dispatch", *args, max_tokens=tokens).implementation
            made = row(world, f"ep_elastic_dispatch_{name}", tokens, launched(world, calls))
            made.chosen = choice.name if choice else ""
            yield made
        out = custom_ops.ep_dispatch(x, None, *rest, max_tokens=tokens)
        handle: Any = (*out[5:], world.group)
        theirs = dispatch(world, x, ids, weights, tokens, buffers.SMS)
        calls = {
            "ours": partial(custom_ops.ep_combine, out[0], *handle, max_tokens=tokens),
            "deep_ep": partial(_buffer(world, tokens).combine, theirs[0], theirs[3]),
        }
        choice = custom_ops.explain("ep_combine", out[0], *handle, max_tokens=tokens).implementation
        made = row(world, "ep_elastic_combine_bf16", tokens, launched(world, calls))
        made.chosen = choice.name if choice else ""
        yield made


def _buffer(world: World, tokens: int) -> Any:
    return buffers.elastic("bench", world.group, tokens, world.sizes.hidden, world.sizes.top_k)


def dispatch(world: World, given: Any, ids: Any, weights: Any, tokens: int, sms: int) -> Any:
    return _buffer(world, tokens).dispatch(
        given,
        topk_idx=ids,
        topk_weights=weights,
        num_experts=world.sizes.experts,
        num_max_tokens_per_rank=tokens,
        num_sms=sms,
        do_cpu_sync=False,
    )
