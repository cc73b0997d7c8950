"""`python -m tests.custom_ops.moe.shared_draws SEED DRAWS`: shared experts beside routed ones, over and over on a GPU.

Sizes of every alignment, and nothing waits for the device between the draws: a race of the streams, or memory that one
of them gives back too early, has its chance. Few kernels have to be compiled: what a draw changes is the tokens, where
they go, and which kernels run one after the other.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

import custom_ops
from custom_ops.moe.shared import _shared
from tests.custom_ops.moe.problems import Shape

TOKENS = (1, 2, 7, 16, 33)
BETWEEN = 250  # draws between two looks at what was found


@dataclass(frozen=True)
class Kind:
    """One kind of weights, on the device."""

    shape: Shape
    args: tuple[Tensor, ...]
    kwargs: dict
    shared: tuple[Tensor, ...]


def kinds() -> list[Kind]:
    found = []
    for weights, hidden, inner, width, transposed in (
        ("16_bit", 40, 8, 8, False),
        ("16_bit", 8, 136, 24, True),
        ("fp8_block", 128, 136, 24, False),
        ("fp8_block", 40, 8, 24, True),
        ("int8_channel", 40, 136, 8, True),
        ("16_bit", 256, 128, 384, False),
    ):
        shape = Shape(
            max(TOKENS), 2, 8, hidden, inner, weights=weights, transposed=transposed, seed=hidden
        )
        args, kwargs = shape.call("cuda")
        sizes = ((width, hidden), (width, hidden), (hidden, width))
        shared = tuple(
            torch.randn(size, device="cuda", dtype=shape.dtype) * size[1] ** -0.5 for size in sizes
        )
        found.append(Kind(shape, args, kwargs, shared))
    return found


def run(seed: int, draws: int, seconds: float = 60.0) -> tuple[int, int, float]:
    """How many were drawn, of how many the routed experts had other bits than alone, and the largest relative error of
    shared ones.

    seconds: once something was looked at, draw no further after so long, where kernels have to be compiled first.
    """
    until = time.monotonic() + seconds
    chance = random.Random(seed)
    torch.manual_seed(seed)
    every = kinds()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    worst = torch.zeros((), dtype=torch.float64, device="cuda")
    drawn = 0
    while drawn < draws and (drawn <= BETWEEN or time.monotonic() < until):
        kind = chance.choice(every)
        tokens = chance.choice(TOKENS)
        weights = kind.args[1:3]
        x = torch.randn(tokens, kind.shape.hidden, device="cuda", dtype=kind.shape.dtype)
        scores = torch.rand(tokens, kind.shape.experts, device="cuda")
        top, ids = scores.topk(kind.shape.top_k)
        call = (x, *weights, top, ids)
        routed, ours = custom_ops.fused_moe_and_shared(*call, *kind.shared, **kind.kwargs)
        wrong += (routed != custom_ops.fused_moe(*call, **kind.kwargs)).any()
        alone = _shared(x, *kind.shared, torch.empty_like(x)).double()
        worst = torch.maximum(worst, (ours.double() - alone).norm() / alone.norm())
        drawn += 1
        if drawn % BETWEEN == 0:
            torch.cuda.synchronize()
    return drawn, int(wrong), float(worst)


if __name__ == "__main__":
    drawn, wrong, worst = run(int(sys.argv[1]), int(sys.argv[2]))
    print(f"{drawn} drawn, {wrong} wrong, {worst:.1e}")
    sys.exit(wrong > 0 or not worst <= 1e-2)
