"""What dispatch and combine of fixed shapes must do, as every rank checks it: a rank knows the inputs of all."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from custom_ops.expert_parallel import (
    ExchangeError,
    ep_combine_low_latency,
    ep_dispatch_low_latency,
)
from custom_ops.expert_parallel.low_latency_reference import quantize
from tests.custom_ops.expert_parallel.properties import name_of
from tests.custom_ops.helpers import assert_same_bits


@dataclass(frozen=True)
class Case:
    """Inputs of every rank: tokens[r] of rank r; of a token's experts, `nobody` are negative."""

    tokens: tuple[int, ...]
    experts: int
    top_k: int
    hidden: int
    max_tokens: int
    fp8: bool = False
    only: int = 0  # all tokens to the first so many experts, or to any
    nobody: int = 0
    ids_dtype: torch.dtype = torch.int64
    weights_dtype: torch.dtype = torch.float32
    seed: int = 0

    def inputs(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, topk_ids and topk_weights of a rank."""
        generator = torch.Generator().manual_seed(1000 * self.seed + rank)
        tokens = self.tokens[rank]
        x = torch.randn(tokens, self.hidden, generator=generator).bfloat16()
        x[:, : self.hidden // 2] *= 100.0
        among = torch.rand(tokens, self.only or self.experts, generator=generator)
        ids = among.argsort(1)[:, : self.top_k]
        ids[:, : self.nobody] = -1 - ids[:, : self.nobody]
        weights = torch.rand(tokens, self.top_k, generator=generator).to(self.weights_dtype)
        return x, ids.to(self.ids_dtype), weights


def draw(ranks: int, seed: int, hiddens: tuple[int, ...], most_tokens: int = 6) -> Case:
    r = random.Random(f"low latency/{ranks}/{seed}")
    experts = r.choice((1, 2, 4)) * ranks
    only = r.choice((0, 0, experts // ranks))
    top_k = r.randint(1, min(4, only or experts))
    most = 4 * -(-most_tokens // 4)
    return Case(
        tokens=tuple(r.choice((0, 1, r.randint(0, most_tokens))) for _ in range(ranks)),
        experts=experts,
        top_k=top_k,
        hidden=r.choice(hiddens),
        max_tokens=most,
        fp8=r.random() < 0.5,
        only=only,
        nobody=r.choice((0, 0, 1, top_k)),
        ids_dtype=r.choice((torch.int32, torch.int64)),
        weights_dtype=r.choice((torch.float32, torch.bfloat16)),
        seed=seed,
    )


def named_cases(ranks: int, hidden: int = 256) -> dict[str, Case]:
    few = tuple(3 + r for r in range(ranks))
    base = {"experts": 2 * ranks, "top_k": 2, "hidden": hidden, "max_tokens": 2 * ranks + 2}
    return {
        "every expert": Case(few, **base),
        "codes": Case(few, **base, fp8=True),
        "no tokens on rank 0": Case((0, *few[1:]), **base),
        "no tokens anywhere": Case((0,) * ranks, **base, fp8=True),
        "all to rank 0": Case(few, **base, only=2),
        "nobody's experts": Case(few, **base, nobody=2),
        "full": Case((2 * ranks + 2,) * ranks, **base, only=2),
    }


def check(case: Case, group: str, rank: int, device: str = "cpu") -> set[str]:
    """Each expert's rows against the tokens one by one, then the sum of what numbers of the experts make of them."""
    ranks, most = len(case.tokens), case.max_tokens
    local = case.experts // ranks
    x, ids, weights = case.inputs(rank)
    args = x.to(device), ids.to(device), case.experts, most, group
    out = ep_dispatch_low_latency(*args, fp8=case.fp8)
    used = {name_of("ep_dispatch_low_latency", *args)}
    recv_x, recv_scale, counts, sources, ranges = (t.cpu() for t in out)
    dtype = torch.float8_e4m3fn if case.fp8 else torch.bfloat16
    assert (recv_x.dtype, recv_x.shape) == (dtype, (local, ranks * most, case.hidden))
    if case.fp8:
        assert out[1].shape == (local, ranks * most, case.hidden // 128)
        assert out[1].stride()[1:] == (1, ranks * most)
    rows_of = [(*(quantize(t[0]) if case.fp8 else (t[0], None)), t[1]) for t in all_inputs(case)]
    for expert in range(local):
        seen = 0
        for source, (data, scale, named) in enumerate(rows_of):
            count = int(ranges[expert, source]) & 0xFFFFFFFF
            first = int(ranges[expert, source]) >> 32
            here = slice(first, first + count)
            tokens = sources[expert, here].long()
            wanted = (named == rank * local + expert).any(1).nonzero()[:, 0]
            assert torch.equal(tokens.sort()[0], wanted)
            assert_same_bits(recv_x[expert, here], data[tokens])
            if case.fp8:
                assert torch.equal(recv_scale[expert, here], scale[tokens])
            seen += count
        assert int(counts[expert]) == seen

    y = out[0].to(torch.bfloat16)
    if case.fp8:
        y = (out[0].float().unflatten(2, (-1, 128)) * out[1].unsqueeze(3)).flatten(2).bfloat16()
    numbers = torch.arange(local, device=device).view(-1, 1, 1) + rank * local
    y = y * (1.0 + numbers).bfloat16()
    combine = y, args[1], weights.to(device), *out[3:], group
    combined = ep_combine_low_latency(*combine)
    data = x.float()
    if case.fp8:
        codes, scale = rows_of[rank][:2]
        data = (codes.float().unflatten(1, (-1, 128)) * scale.unsqueeze(2)).flatten(1)
    data = data.bfloat16()
    total = torch.zeros(x.shape)
    for named, weight in zip(ids.t(), weights.double().t(), strict=True):
        each = (data * (1.0 + named.clamp(min=0)).bfloat16().unsqueeze(1)).double()
        exact = total.double() + each * weight.unsqueeze(1)
        total = torch.where((named >= 0).unsqueeze(1), exact.float(), total)
    assert_same_bits(combined.cpu(), total.bfloat16())
    return used | {name_of("ep_combine_low_latency", *combine)}


def all_inputs(case: Case) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [case.inputs(rank) for rank in range(len(case.tokens))]


def random_routings(
    group: str, rank: int, ranks: int, count: int, hiddens: tuple[int, ...], device: str = "cpu"
) -> Counter[str]:
    used: Counter[str] = Counter()
    for seed in range(count):
        case = draw(ranks, seed, hiddens)
        try:
            used.update(check(case, group, rank, device))
        except Exception as error:
            raise AssertionError(f"{case}") from error
    return used


def named(group: str, rank: int, ranks: int, device: str = "cpu", hidden: int = 256) -> list[str]:
    for name, case in named_cases(ranks, hidden).items():
        try:
            check(case, group, rank, device)
        except Exception as error:
            raise AssertionError(name) from error
    return list(named_cases(ranks))


def mismatches(group: str, rank: int, ranks: int) -> list[str]:
    """What each rank says when one is called with something else for the first time. The group goes on working."""
    last = rank == ranks - 1

    def dispatch(hidden: int = 24, top_k: int = 1, **more: Any) -> tuple[Tensor, ...]:
        x, ids = torch.ones(2, hidden).bfloat16(), torch.zeros(2, top_k, dtype=torch.int64)
        args = {"num_experts": ranks, "max_tokens": 3, "group": group} | more
        return ep_dispatch_low_latency(x, ids, **args)

    said = []
    others: list[dict[str, Any]] = [{"hidden": 40}, {"max_tokens": 5}, {"num_experts": 2 * ranks}]
    for other in others:
        with pytest.raises(ExchangeError) as caught:
            dispatch(**(other if last else {}))
        said.append(str(caught.value))
    recv_x, _, counts, sources, ranges = dispatch()
    assert int(counts.sum()) == (2 * ranks if rank == 0 else 0)
    ids, weights = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    combine = recv_x, ids, weights, sources, ranges, group
    with pytest.raises(ExchangeError) as caught:
        dispatch(hidden=56) if last else ep_combine_low_latency(*combine)
    said.append(str(caught.value))
    assert torch.equal(ep_combine_low_latency(*combine), torch.ones(2, 24).bfloat16())
    return said
