"""Blocks whose experts keep gate and up as two weights, as libraries other than transformers write them.

`moe_apart_*`: pairs sorted by expert and three grouped products, as torchtitan and torchtune have them;
`moe_gathered_*`: a matrix for each pair, as gpt-fast has for few tokens. Stock `torch.compile` and the plugin, both of
the whole block; `by_hand` is our ops on the two weights, `packed` on one that has both, and `experts NAME` are the ways
of `fused_moe` that take two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import custom_ops
from bench.case import Case, Inapplicable, Inputs, Thunk, activation, close
from bench.suites import moe
from bench.suites.moe import MODELS, TOKENS, Model
from custom_ops.moe import choice
from custom_ops.moe.problem import Problem

NAMES = ("qwen3_30b_a3b", "mixtral_8x7b")
MOST_GATHERED = 16
"""Tokens up to which anybody gathers matrices: their copies are what stock spends its time on."""


class Block(nn.Module):
    """A router in float32, and experts w2(silu(w1(x)) * w3(x)). The numbers are drawn on the device."""

    def __init__(self, model: Model, device: torch.device) -> None:
        super().__init__()
        self.top_k, self.experts = model.top_k, model.experts
        generator = torch.Generator(device).manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
            return weight.normal_(std=shape[-1] ** -0.5, generator=generator)

        inner, outer = (model.experts, model.intermediate, model.hidden), model.hidden
        self.register_buffer("gate", drawn(model.experts, model.hidden))
        self.register_buffer("w1", drawn(*inner))
        self.register_buffer("w2", drawn(model.experts, outer, model.intermediate))
        self.register_buffer("w3", drawn(*inner))

    gate: Tensor
    w1: Tensor
    w2: Tensor
    w3: Tensor

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = F.softmax(F.linear(x, self.gate).float(), dim=-1)
        weights, ids = torch.topk(scores, self.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids

    def by_ours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same router by our op."""
        logits = F.linear(x, self.gate)
        return custom_ops.topk_softmax(logits, self.top_k, renormalize=True, dtype=torch.float32)


def grouped(block: Block, x: Tensor) -> Tensor:
    """Pairs sorted by expert; the results go back to the order of pairs, where a product adds up those of a token."""
    weights, ids = block.route(x)
    flat = ids.reshape(-1)
    last = block.experts - 1
    # a CPU counts no integers
    counts = torch.histc(flat if x.is_cuda else flat.float(), block.experts, 0, last)
    ends = counts.cumsum(0, dtype=torch.int32)
    order = flat.argsort(stable=True)
    rows = x[order // block.top_k]
    gate, up = (torch._grouped_mm(rows, w.transpose(1, 2), offs=ends) for w in (block.w1, block.w3))
    out = torch._grouped_mm(F.silu(gate) * up, block.w2.transpose(1, 2), offs=ends)
    pairs = torch.zeros_like(out)
    pairs[order] = out
    total = torch.bmm(weights.unsqueeze(1), pairs.view(*ids.shape, -1).float())
    return total.squeeze(1).to(x.dtype)


def gathered(block: Block, x: Tensor) -> Tensor:
    weights, ids = block.route(x)
    gate, up = (torch.einsum("th,tkih->tki", x, w[ids]) for w in (block.w1, block.w3))
    out = torch.einsum("tki,tkhi->tkh", F.silu(gate) * up, block.w2[ids])
    return torch.einsum("tkh,tk->th", out, weights.to(x.dtype))


FORMS: dict[str, Callable[[Block, Tensor], Tensor]] = {"apart": grouped, "gathered": gathered}


@lru_cache(maxsize=1)
def _block(model: Model, device: torch.device) -> Block:
    return Block(model, device)


@lru_cache(maxsize=1)
def _packed(block: Block) -> Tensor:
    return torch.cat([block.w1, block.w3], 1)


def _inputs(device: torch.device, model: Model, tokens: int) -> Inputs:
    return _block(model, device), activation(device, tokens, model.hidden)


def _by_hand(inputs: Inputs, packed: bool = False) -> Thunk:
    block, x = inputs
    gate, up = (_packed(block), None) if packed else (block.w1, block.w3)

    def run() -> Tensor:
        return custom_ops.fused_moe(x, gate, block.w2, *block.by_ours(x), up=up)

    return run


def _by_way(inputs: Inputs, name: str) -> Thunk:
    block, x = inputs
    pipeline = choice.pipelines()[name]

    def problem() -> Problem:
        return Problem.of(x, block.w1, block.w2, *block.by_ours(x), up=block.w3)

    if reason := pipeline.unsupported(problem()):
        raise Inapplicable(f"{name}: {reason}")
    return lambda: pipeline(problem())


def _others(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"by_hand": _by_hand, "packed": partial(_by_hand, packed=True)}
    for name, pipeline in choice.pipelines().items():
        experts = pipeline.experts
        if experts.apart and experts.weights == "16_bit" and experts.unavailable(device) is None:
            found[f"experts {name}"] = partial(_by_way, name=name)
    return found


def cases(tiny: bool = False) -> Iterator[Case]:
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in NAMES:
        model = moe.small(MODELS[name]) if tiny else MODELS[name]
        for form, plain in FORMS.items():
            for tokens in (4,) if tiny else TOKENS:
                if form == "gathered" and tokens > MOST_GATHERED:
                    continue
                moved, flops = moe.least(model, "bf16", tokens)
                yield Case(
                    name=f"moe_{form}_{name}_bf16",
                    sizes={
                        "tokens": tokens,
                        "experts": model.experts,
                        "top_k": model.top_k,
                        "hidden": model.hidden,
                        "intermediate": model.intermediate,
                    },
                    inputs=partial(_inputs, model=model, tokens=tokens),
                    plain=plain,
                    check=close(2e-2),
                    others=_others(here),
                    fusion="fused_moe",
                    beside=("topk_softmax",),
                    moved_bytes=moved,
                    flops=flops,
                )
