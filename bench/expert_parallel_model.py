"""A stock mixture of experts after `parallelize_experts_`, compiled: what its rewrite and its CUDA graphs are worth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fusion_passes
from bench.expert_parallel_captured import launches
from bench.expert_parallel_world import Call, World, graphed, launched, row
from bench.results import Row

FUSIONS = ("quantize_before_dispatch", "gather_tokens", "two_batch_overlap")
TOKENS = (128, 512, 4096)


def block_of(world: World) -> Any:
    """The router and all experts of a Qwen3-MoE layer, the same on every rank, in bfloat16."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = world.sizes
    config = Qwen3MoeConfig(
        hidden_size=max(
            sizes.hidden, 128
        ),  # a whole group of a quantization, for the small sizes of a test
        moe_intermediate_size=max(sizes.intermediate, 128),
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config).bfloat16()
    block = block.to_empty(device=world.device).eval().requires_grad_(False)
    generator = torch.Generator(world.device).manual_seed(0)
    for parameter in block.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return block


def tokens_of(world: World, count: int, width: int) -> Tensor:
    return torch.randn(1, count, width, device=world.device).bfloat16()


def compiled(block: nn.Module, graphs: bool = False, **options: Any) -> Callable[[Tensor], Tensor]:
    """The block by the backend, with options that nothing else of this process shares; in CUDA graphs or not."""
    given = {"allow_reference": True, "triton.cudagraphs": graphs, **options}
    copied = copy.copy(block)  # a module of its own to Dynamo, with the same weights
    run = torch.compile(
        copied, backend="fusion_passes", fullgraph=True, dynamic=False, options=given
    )

    def call(x: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return first(run(x))

    return call


def first(out: Any) -> Tensor:
    """The hidden states: some versions of transformers return the router's logits beside them."""
    return out[0] if isinstance(out, tuple) else out


def rewrite(world: World) -> Iterator[Row]:
    """A block-scaled layer, each fusion on (ours) against off, with those before it on: quantized before it travels and
    on the ranks that receive it; all tokens to all ranks; in two halves.
    """
    block: Any = fusion_passes.quantize_(block_of(world), "fp8_block")
    fusion_passes.parallelize_experts_(block, world.group, max_tokens=1)
    width = block.experts.down_proj.shape[1]
    chosen: dict[str, tuple[str, ...]] = {
        "none": (),
        "quantized": FUSIONS[:1],
        "gathered": FUSIONS[:2],
        "gathered_in_halves": FUSIONS,
        "in_halves": (FUSIONS[0], FUSIONS[2]),
    }
    against = {
        FUSIONS[0]: ("quantized", "none"),
        FUSIONS[1]: ("gathered", "quantized"),
        FUSIONS[2]: ("in_halves", "quantized"),
        f"{FUSIONS[2]}_gathered": ("gathered_in_halves", "gathered"),
    }
    for count in TOKENS if world.cuda else (world.sizes.tokens,):
        torch._dynamo.reset()
        # so that nobody waits for the host, and graphs hold all of it
        block.experts.share.max_tokens = count
        x = tokens_of(world, count, width)
        calls: dict[str, Call] = {}
        for name, names in chosen.items():
            options: dict[str, Any] = {"overlap_from": 1} | {
                fusion: fusion in names for fusion in FUSIONS
            }
            calls[name] = partial(compiled(block, **options), x)
        found = {name: call().clone() for name, call in calls.items()}
        times = graphed(world, calls, repeats=2, replays=8)
        for name, (on, without) in against.items():
            fusion = name.removesuffix("_gathered")
            pair = {"ours": times[on], "off": times[without]}
            made = row(world, f"ep_{name}_fp8", count, pair, fusion=fusion, fired={fusion: 1})
            made.ratios["plugin_of_inductor"] = made.ratios["of_off"]
            if not torch.equal(found[on], found[without]):
                made.errors["ours"] = f"{int((found[on] != found[without]).sum())} elements differ"
            yield made


def captured(world: World) -> Iterator[Row]:
    """Graphs and kernels that a compiled layer launches: by mode, and with room for the worst routing or without.

    In `fired`: graphs launched in a call, and kernels outside of them.
    """

    if not world.cuda:
        return
    count = world.sizes.low_latency_tokens
    whole = block_of(world)
    ways: dict[str, dict[str, Any]] = {
        "high_throughput": {},
        "high_throughput_bounded": {"max_tokens": count},
        "high_throughput_gathered": {"max_tokens": count},
        "low_latency": {"mode": "low_latency", "max_tokens": count},
    }
    for name, how in ways.items():
        torch._dynamo.reset()
        block: Any = copy.deepcopy(whole)
        fusion_passes.parallelize_experts_(block, world.group, **how)
        x = tokens_of(world, count, block.experts.down_proj.shape[1])
        gathers = {"gather_tokens": name.endswith("gathered")}
        run, plain = compiled(block, True, **gathers), compiled(block, **gathers)
        for _ in range(4):
            out = run(x).clone()
        world.together()
        seen = launches(partial(run, x))
        world.together()
        calls: dict[str, Any] = {"ours": partial(run, x), "no_graphs": partial(plain, x)}
        made = row(world, f"ep_model_{name}", count, launched(world, calls))
        made.fired = {"graphs": seen["graphs"], "kernels_outside": seen["kernels"]}
        wanted = plain(x)  # not eager: one rounding less sends a token to another expert
        limit = 2**-5 * wanted.float().abs().amax()
        if not ((out.float() - wanted.float()).abs() <= limit).all():
            made.errors["result"] = "differs from the same code without graphs"
        if not seen["graphs"]:
            made.errors["ours"] = "nothing of it ran in a CUDA graph"
        yield made
        del block
