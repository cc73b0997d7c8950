"""Cases of the lora suite: experts with an adapter on both linears of each."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import custom_ops
from bench.case import Case, Inputs, Thunk, activation, close
from bench.suites.lora import CLOSE


def _experts(
    device: torch.device, m: int, adapters: int, experts: int, top_k: int, h: int, i: int, rank: int
) -> Inputs:
    """The arguments of fused_moe_lora; tokens in turn have each adapter, and random experts."""
    torch.manual_seed(0)
    slots = torch.arange(m, dtype=torch.int32, device=device) % adapters
    scores = torch.rand(m, experts, device=device)
    weights, ids = scores.softmax(-1).topk(top_k)
    shapes = ((2 * i, h), (h, i))
    products = [activation(device, experts, n, k) / k**0.5 for n, k in shapes]
    lora = [
        each
        for n, k in shapes
        for each in (
            activation(device, adapters, experts, rank, k) / k**0.5,
            activation(device, adapters, experts, n, rank) / rank**0.5,
        )
    ]
    scaling = torch.rand(adapters, device=device) + 0.5
    ranks = torch.full((adapters,), rank, dtype=torch.int32, device=device)
    return activation(device, m, h), *products, weights, ids, *lora, scaling, ranks, slots


def _experts_plain(
    x, gate_up, down, weights, ids, up_a, up_b, down_a, down_b, scaling, ranks, slots
):
    """Copies of the weights and the adapters of every pair, and batched products; float32 between the two."""
    top_k = ids.shape[1]
    expert, slot = ids.flatten(), slots.long().repeat_interleave(top_k)

    def linear(rows: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        column = rows[:, :, None]
        base = torch.bmm(weight[expert], column)[:, :, 0]
        y = torch.bmm(a[slot, expert].float(), column.float())
        return (base + torch.bmm(b[slot, expert].float(), y)[:, :, 0] * scaling[slot, None]).to(
            rows.dtype
        )

    gate, up = linear(x.repeat_interleave(top_k, 0), gate_up, up_a, up_b).chunk(2, -1)
    out = linear(torch.nn.functional.silu(gate) * up, down, down_a, down_b)
    pairs = out.view(*ids.shape, -1) * weights[:, :, None]
    return pairs.float().sum(1).to(x.dtype)


def _experts_alone(inputs: Inputs) -> Thunk:
    """The same experts without adapters."""
    return lambda: custom_ops.fused_moe(*inputs[:5])


def expert_cases(tiny: bool) -> Iterator[Case]:
    sizes = (
        [(5, 3, 4, 2, 32, 16, 4)] if tiny else [(m, 4, 64, 8, 2048, 768, 16) for m in (1, 16, 64)]
    )
    for m, adapters, experts, top_k, hidden, width, rank in sizes:
        used = min(m * top_k, experts)
        yield Case(
            name="fused_moe_lora",
            sizes={
                "tokens": m,
                "adapters": adapters,
                "experts": experts,
                "top_k": top_k,
                "h": hidden,
                "i": width,
            },
            inputs=partial(
                _experts,
                m=m,
                adapters=adapters,
                experts=experts,
                top_k=top_k,
                h=hidden,
                i=width,
                rank=rank,
            ),
            plain=_experts_plain,
            check=close(2 * CLOSE),
            op="fused_moe_lora",
            op_args=lambda *inputs: (inputs, {}),
            moved_bytes=6 * used * hidden * width
            + 2 * min(m * top_k, adapters * experts) * rank * (2 * hidden + 3 * width),
            flops=6 * m * top_k * hidden * width,
            others={"fused_moe": _experts_alone},
        )
