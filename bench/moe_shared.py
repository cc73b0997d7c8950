"""`python -m bench.moe_shared`: do shared experts win time on a second stream? Blocks in CUDA graphs, in microseconds.

What a second stream can win is bounded. Where the routed experts read weights at the speed of memory, both together
take the sum of their bytes, and there is only the time in which memory idles otherwise: the router, the index and the
sum, some 15 us of a block. Where they do not, as a single token with one expert on a rank of many, or where both are
bound by launches, the shorter of the two is hidden. Where all are bound by operations, nothing is.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import custom_ops
from bench import results
from bench.case import close
from bench.results import FOLDER, Row
from bench.timer import CudaTimer, Timer
from custom_ops.moe.beside import beside

SUITE = "moe_shared"
TOKENS = (1, 4, 16, 64, 512, 4096)


@dataclass(frozen=True)
class Block:
    """Sizes of a block with shared experts. routed: how many experts the router knows; the first `experts` are here."""

    name: str
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    shared: int
    routed: int = 0

    @property
    def everywhere(self) -> int:
        return self.routed or self.experts


BLOCKS = (
    Block("deepseek_v3_slice", 32, 8, 7168, 2048, 2048, routed=256),
    Block("qwen2_57b_a14b", 64, 8, 3584, 2560, 20480),
    Block("glm_4_5_air", 128, 8, 4096, 1408, 1408),
)


class Weights(nn.Module):
    """Random weights of a block in bfloat16."""

    router: Tensor
    gate_up: Tensor
    down: Tensor
    shared_gate_up: Tensor
    shared_down: Tensor
    expert_map: Tensor | None

    def __init__(self, block: Block, device: torch.device) -> None:
        super().__init__()

        def normal(*shape: int) -> Tensor:
            weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
            return weight.normal_(std=shape[-1] ** -0.5)

        experts, hidden, width = block.experts, block.hidden, block.intermediate
        self.top_k = block.top_k
        self.register_buffer("router", normal(block.everywhere, hidden))
        self.register_buffer("gate_up", normal(experts, 2 * width, hidden))
        self.register_buffer("down", normal(experts, hidden, width))
        self.register_buffer("shared_gate_up", normal(2 * block.shared, hidden))
        self.register_buffer("shared_down", normal(hidden, block.shared))
        expert_map = None
        if block.routed:
            local = torch.arange(block.routed, dtype=torch.int32, device=device)
            expert_map = torch.where(local < experts, local, -1)
        self.register_buffer("expert_map", expert_map)


def route(weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(x, weights.router)
    return custom_ops.topk_softmax(logits, weights.top_k, renormalize=True)


def routed(weights: Weights, x: Tensor) -> Tensor:
    top, ids = route(weights, x)
    return custom_ops.fused_moe(
        x, weights.gate_up, weights.down, top, ids, expert_map=weights.expert_map
    )


def shared(weights: Weights, x: Tensor) -> Tensor:
    gate, up = F.linear(x, weights.shared_gate_up).chunk(2, dim=-1)
    return F.linear(custom_ops.silu_mul(gate, up), weights.shared_down)


def one_after_the_other(weights: Weights, x: Tensor) -> Tensor:
    return routed(weights, x) + shared(weights, x)


def side_by_side(weights: Weights, x: Tensor) -> Tensor:
    ours, theirs = beside(lambda: routed(weights, x), lambda: shared(weights, x), x.device)
    return ours + theirs


WAYS: dict[str, Callable[[Weights, Tensor], Tensor]] = {
    "routed": routed,
    "shared": shared,
    "one after the other": one_after_the_other,
    "side by side": side_by_side,
}


def measure(block: Block, tokens: tuple[int, ...], timer: Timer) -> Iterator[Row]:
    """The times of a block, by the number of tokens. Raises AssertionError where both ways differ."""
    weights = Weights(block, torch.device("cuda"))
    for count in tokens:
        x = torch.randn(count, block.hidden, device="cuda").bfloat16()
        if problem := close(1e-2)(one_after_the_other(weights, x), side_by_side(weights, x)):
            raise AssertionError(f"{block.name}, {count} tokens: {problem}")
        times = {name: timer.warm(partial(way, weights, x)) for name, way in WAYS.items()}
        row = Row(f"{SUITE}_{block.name}", {"tokens": count}, warm_us=times)
        row.ratios["beside"] = times["one after the other"] / times["side by side"]
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--block", choices=[b.name for b in BLOCKS], action="append")
    parser.add_argument("--tokens", type=int, action="append")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    timer = CudaTimer(rep_ms=10)
    session = results.describe(SUITE, torch.device("cuda"), timer.name, 0.0)
    session.commit = options.commit or session.commit
    session.command = "python -m bench.moe_shared"
    with torch.no_grad():
        for block in BLOCKS:
            if options.block and block.name not in options.block:
                continue
            for row in measure(block, tuple(options.tokens or TOKENS), timer):
                session.rows.append(row)
                session.save(options.out)
                said = ", ".join(f"{name} {us:.1f}" for name, us in row.warm_us.items())
                print(f"{row.label}: {said}; {row.ratios['beside']:.3f}", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
