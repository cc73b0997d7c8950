"""The float32 logits of routers from 16-bit operands: DeepSeek-V3, GLM-4.5 and its Air, Kimi-K2, and a small one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.case import Case, Inputs, Thunk, activation, close
from fusion_passes.passes.router_logits import FUSION

TOKENS = (1, 2, 4, 16, 64, 256, 512, 1024, 4096, 8192)
ROUTERS = ((256, 7168), (160, 5120), (128, 4096), (384, 7168), (64, 2048), (16, 4096))


def wide(x: Tensor, weight: Tensor) -> Tensor:
    return linear(x.float(), weight.float())


def _inputs(device: torch.device, tokens: int, experts: int, hidden: int) -> Inputs:
    return activation(device, tokens, hidden), activation(device, experts, hidden) / hidden**0.5


def _by_cublas(inputs: Inputs) -> Thunk:
    """The product of the matrix units, which adds up all channels with their rounding."""
    x, weight = inputs
    return lambda: torch.mm(x, weight.t(), out_dtype=torch.float32)


def cases(tiny: bool = False) -> Iterator[Case]:
    for experts, hidden in ((16, 128),) if tiny else ROUTERS:
        for tokens in (4,) if tiny else TOKENS:
            yield Case(
                name=FUSION.name,
                sizes={"tokens": tokens, "experts": experts, "hidden": hidden},
                inputs=partial(_inputs, tokens=tokens, experts=experts, hidden=hidden),
                plain=wide,
                check=close(1e-5),
                op=FUSION.name,
                op_args=lambda *args: (args, {}),
                fusion=FUSION.name,
                others={} if tiny else {"cublas": _by_cublas},
                moved_bytes=2 * hidden * (tokens + experts) + 4 * tokens * experts,
                flops=2 * tokens * hidden * experts,
            )
