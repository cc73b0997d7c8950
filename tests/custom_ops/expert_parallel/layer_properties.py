"""What `ep_fused_moe` is held to, on every rank: the three ops that it stands for.

Values are small whole numbers, so that sums are exact in any order and in batches of any size (with codes: nearly, as
there is no activation of whole numbers for them): what two halves or a gathering return has the same bits.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import custom_ops
from custom_ops.scales import BLOCK

FP8 = torch.float8_e4m3fn
EXCHANGES = ("dispatch", "gather")


@dataclass
class Case:
    """tokens: of each rank. experts: of each rank."""

    tokens: tuple[int, ...]
    experts: int = 2
    top_k: int = 2
    hidden: int = 16
    inner: int = 8
    max_tokens: int = 0
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0
    skewed: bool = False  # all tokens to the experts of rank 0


def draw(case: Case, rank: int, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `ep_fused_moe` on a rank but for the group, and keywords."""
    ranks, tokens = len(case.tokens), case.tokens[rank]
    generator = torch.Generator().manual_seed(case.seed * 100 + rank)

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=generator).to(device)

    among = case.experts if case.skewed else case.experts * ranks
    ids = torch.rand(tokens, among, generator=generator).argsort(1)[:, : case.top_k]
    if tokens:
        ids[tokens // 2, 0] = -1  # a pair that goes nowhere
    x = whole(-2, 2, tokens, case.hidden).to(case.dtype)
    weights = whole(0, 2, tokens, ids.shape[1]).float()
    codes = case.dtype == FP8
    products = [
        whole(-1, 1, case.experts, (1 + codes) * case.inner, case.hidden),
        whole(-1, 1, case.experts, case.hidden, case.inner),
    ]
    scale: Tensor | None = None
    how: dict[str, Any] = {} if codes else {"activation": "relu2"}
    if codes:
        scale = torch.ones(tokens, -(-case.hidden // BLOCK), device=device)
        for name, weight in zip(("gate_up", "down"), products, strict=True):
            blocks = [-(-size // BLOCK) for size in weight.shape[1:]]
            how[f"{name}_scale"] = torch.ones(case.experts, *blocks, device=device)
    gate_up, down = (weight.to(case.dtype) for weight in products)
    args = x, scale, ids.to(device).contiguous(), weights, gate_up, down, case.experts * ranks
    return args, how


def three_ops(args: tuple[Any, ...], group: str, max_tokens: int, how: dict[str, Any]) -> Tensor:
    x, scale, ids, weights, gate_up, down, num_experts = args
    out = custom_ops.ep_dispatch(x, scale, ids, weights, num_experts, group, max_tokens=max_tokens)
    y = custom_ops.fused_moe(
        out[0], gate_up, down, out[3], out[2], hidden_scale=None if scale is None else out[1], **how
    )
    return custom_ops.ep_combine(y, *out[5:], group)


def check(case: Case, group: str, rank: int, device: str = "cpu") -> None:
    """Each exchange, whole and in two halves from a number on that the ranks are at, above and below."""
    args, how = draw(case, rank, device)
    expected = three_ops(args, group, case.max_tokens, how)
    most = max(case.tokens)
    for exchange in EXCHANGES:
        for split_from in (0, 1, most or 1, most + 1):
            given = {"exchange": exchange, "split_from": split_from, "max_tokens": case.max_tokens}
            found = custom_ops.ep_fused_moe(*args, group, **given, **how)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected), (case, given, rank)


def random_cases(group: str, rank: int, ranks: int, first: int, last: int) -> int:
    """How many random cases hold. The same on every rank, but for the values."""
    for seed in range(first, last):
        numbers = random.Random(seed)
        tokens = tuple(numbers.choice((0, 1, 2, numbers.randint(0, 12))) for _ in range(ranks))
        case = Case(
            tokens,
            experts=numbers.choice((1, 2, 3)),
            top_k=numbers.choice((1, 2)),
            max_tokens=numbers.choice((0, max(tokens), 13)),
            dtype=numbers.choice((torch.bfloat16, torch.float16)),
            seed=seed,
            skewed=numbers.random() < 0.2,
        )
        check(case, group, rank)
    return last - first


def named(group: str, rank: int, ranks: int) -> list[str]:
    """Codes with scales, and ranks without tokens."""
    cases = {
        "codes": Case((5,) * ranks, hidden=256, inner=128, dtype=FP8, seed=1),
        "codes, bounded": Case((5,) * ranks, hidden=256, inner=128, dtype=FP8, seed=2, max_tokens=6),
        "nobody has tokens": Case((0,) * ranks, seed=3),
        "only the last rank has tokens": Case((0,) * (ranks - 1) + (7,), seed=4),
        "all to rank 0": Case((6,) * ranks, seed=5, skewed=True),
    }  # fmt: skip
    for case in cases.values():
        check(case, group, rank)
    return list(cases)


def disagreeing(group: str, rank: int) -> str:
    """What a rank is told whose peers gather other tokens."""
    args, how = draw(Case((3, 3), hidden=16 if rank else 32, inner=8), rank, "cpu")
    try:
        custom_ops.ep_fused_moe(*args, group, exchange="gather", max_tokens=4, **how)
    except custom_ops.expert_parallel.ExchangeError as error:
        return str(error)
    return "nothing"


def everything(group: str, rank: int, ranks: int, cases: int) -> dict[str, Any]:
    return {
        "random": random_cases(group, rank, ranks, 0, cases),
        "named": named(group, rank, ranks),
        "disagreeing": disagreeing(group, rank) if ranks == 2 else "",
    }
