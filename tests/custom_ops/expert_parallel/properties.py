"""What dispatch and combine must do, as every rank checks it: whole inputs follow from a seed, so a rank knows all."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import custom_ops
from custom_ops.expert_parallel import ExchangeError
from custom_ops.expert_parallel.agreement import CHANNELS
from tests.custom_ops.helpers import assert_same_bits

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    """Inputs of every rank: tokens[r] of rank r, ids drawn from [lowest, highest)."""

    tokens: tuple[int, ...]
    experts: int
    top_k: int
    hidden: int
    lowest: int
    highest: int
    dtype: torch.dtype = torch.bfloat16
    groups: int = 0
    ids_dtype: torch.dtype = torch.int64
    weights_dtype: torch.dtype = torch.float32
    max_tokens: int = 0
    distinct: bool = False  # the experts of a token, which are then of all
    seed: int = 0

    def inputs(self, rank: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """x, scale, topk_ids and topk_weights of a rank."""
        generator = torch.Generator().manual_seed(1000 * self.seed + rank)
        tokens = self.tokens[rank]
        x = torch.randn(tokens, self.hidden, generator=generator).to(self.dtype)
        scale = None
        if self.groups:
            scale = torch.rand(self.groups, tokens, generator=generator).t()
        shape = tokens, self.top_k
        ids = torch.randint(self.lowest, self.highest, shape, generator=generator)
        if self.distinct:
            scores = torch.rand(tokens, self.experts, generator=generator)
            ids = torch.where(ids < 0, ids, scores.argsort(1)[:, : self.top_k])
        weights = torch.rand(shape, generator=generator).to(self.weights_dtype)
        return x, scale, ids.to(self.ids_dtype), weights


def draw(
    ranks: int, seed: int, most_tokens: int = 6, hiddens: tuple[int, ...] = (1, 3, 8, 16)
) -> Case:
    """A random case: ranks and experts without tokens, ids that repeat or name nobody, one rank that gets all."""
    r = random.Random(f"{ranks}/{seed}")
    local = r.choice((1, 2, 4))
    experts = local * ranks
    owner = r.randrange(ranks)
    lowest, highest = r.choice(
        (
            (0, experts),
            (0, experts),
            (-2, experts + 2),
            (owner * local, (owner + 1) * local),
            (experts - 1, experts),
        )
    )
    tokens = [r.choice((0, 1, r.randint(0, most_tokens))) for _ in range(ranks)]
    return Case(
        tokens=tuple(tokens),
        experts=experts,
        top_k=r.randint(1, 4),
        hidden=r.choice(hiddens),
        lowest=lowest,
        highest=highest,
        dtype=r.choice((torch.float32, torch.bfloat16, torch.float16, FP8, torch.int8)),
        groups=r.choice((0, 0, 1, 3)),
        ids_dtype=r.choice((torch.int32, torch.int64)),
        weights_dtype=r.choice((torch.float32, torch.bfloat16)),
        max_tokens=r.choice((0, 0, max(1, *tokens), most_tokens)),
        seed=seed,
    )


def expect(case: Case, rank: int) -> list[Tensor]:
    """What a rank receives: recv_x, recv_scale, recv_ids, recv_weights and counts, token by token."""
    local = case.experts // len(case.tokens)
    first = rank * local
    rows: list[list[Tensor]] = [[], [], [], []]
    counts = [0] * local
    for source in range(len(case.tokens)):
        x, scale, ids, weights = case.inputs(source)
        for token, named in enumerate(ids.tolist()):
            here = [first <= expert < first + local for expert in named]
            if not any(here):
                continue
            rows[0].append(x[token])
            if scale is not None:
                rows[1].append(scale[token])
            mine = [
                expert - first if is_here else -1
                for expert, is_here in zip(named, here, strict=True)
            ]
            rows[2].append(torch.tensor(mine))
            rows[3].append(weights[token] * torch.tensor(here))
            for expert in mine:
                if expert >= 0:
                    counts[expert] += 1
    empty = [
        torch.empty(0, case.hidden, dtype=case.dtype),
        torch.empty(0, case.groups) if case.groups else torch.empty(0),
        torch.empty(0, case.top_k, dtype=torch.int64),
        torch.empty(0, case.top_k, dtype=case.weights_dtype),
    ]
    found = [torch.stack(r) if r else e for r, e in zip(rows, empty, strict=True)]
    return [*found, torch.tensor(counts, dtype=torch.int32)]


def expect_handle(case: Case, rank: int) -> list[Tensor]:
    """sent, sources, ranks and channels of a rank, token by token."""
    ranks = len(case.tokens)
    local = case.experts // ranks
    sent_to = torch.zeros(ranks, ranks, dtype=torch.int32)
    sent = torch.full((case.tokens[rank], ranks), -1, dtype=torch.int32)
    sources: list[int] = []
    channels = torch.zeros(ranks, CHANNELS, dtype=torch.int32)
    for source, tokens in enumerate(case.tokens):
        named = case.inputs(source)[2].tolist()
        each = -(-tokens // CHANNELS)
        for target in range(ranks):
            places = [0] * CHANNELS
            for token in range(tokens):
                if all(expert // local != target for expert in named[token]):
                    continue
                if source == rank:
                    sent[token, target] = places[token // each]
                if target == rank:
                    sources.append(token)
                places[token // each] += 1
            sent_to[source, target] = sum(places)
            if target == rank:
                channels[source] = torch.tensor([sum(places[:c]) for c in range(CHANNELS)])
    return [sent, torch.tensor(sources, dtype=torch.int32), sent_to.cumsum(0).int(), channels]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, shape, strides and bytes."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert actual.is_contiguous()
    if actual.numel():
        actual = actual.cpu()
        assert torch.equal(actual.view(torch.uint8), expected.contiguous().view(torch.uint8))


def check(
    case: Case, group: str, rank: int, device: str = "cpu", elastic: bool = False
) -> set[str]:
    """Dispatch against the tokens one by one; combine of rows times a number of each rank against their sum.

    Returns which implementations ran. elastic: only so much of the handle as ElasticBuffer knows.
    """
    ranks, local = len(case.tokens), case.experts // len(case.tokens)
    x, scale, ids, weights = case.inputs(rank)
    args = [t if t is None else t.to(device) for t in (x, scale, ids, weights)]
    most = {"max_tokens": case.max_tokens} if case.max_tokens else {}
    out = custom_ops.ep_dispatch(*args, case.experts, group, **most)
    used = {name_of("ep_dispatch", *args, case.experts, group, **most)}
    handle = out[5:]
    expected = expect(case, rank)
    arrived = len(expected[0])
    assert len(out[0]) == len(handle[1]) == (ranks * case.max_tokens or arrived)
    assert (out[2][arrived:] == -1).all()
    for actual, wanted in zip(out[:4], expected, strict=False):
        assert_same(actual[:arrived] if len(actual) else actual, wanted)
    assert_same(out[4], expected[4])

    owners = torch.where((ids >= 0) & (ids < case.experts), ids // local, ranks)
    goes = torch.stack([(owners == r).any(1) for r in range(ranks)], 1)
    sent, sources, sent_to, channels = expect_handle(case, rank)
    assert_same(handle[0], sent)
    assert_same(handle[1][:arrived], sources)
    assert handle[2].shape == sent_to.shape
    assert_same(handle[2][:, rank].contiguous(), sent_to[:, rank])
    if not elastic:
        assert_same(handle[3], channels)
    before = [tensor.clone() for tensor in handle]

    dtype = (
        case.dtype if case.dtype.itemsize > 1 and case.dtype.is_floating_point else torch.float32
    )
    rows = out[0].to(dtype) * (rank + 1)
    total = torch.zeros(x.shape)
    for r in range(ranks):
        total += torch.where(goes[:, r : r + 1], (x.to(dtype) * (r + 1)).float(), 0.0)
    combined = custom_ops.ep_combine(rows, *handle, group, **most)
    assert_same_bits(combined.cpu(), total.to(dtype))
    for actual, wanted in zip(handle, before, strict=True):
        assert_same(actual, wanted.cpu())
    return used | {name_of("ep_combine", rows, *handle, group, **most)}


def name_of(op: str, *args: Any, **kwargs: Any) -> str:
    """The implementation that runs, with the op."""
    choice = custom_ops.explain(op, *args, **kwargs)
    assert choice.implementation is not None
    return f"{op} {choice.implementation.name}"


def random_routings(
    group: str, rank: int, ranks: int, first: int, count: int, device: str = "cpu", **sizes: Any
) -> Counter[str]:
    """Random cases; how often each implementation ran."""
    used: Counter[str] = Counter()
    for seed in range(first, first + count):
        case = draw(ranks, seed, **sizes)
        try:
            used.update(check(case, group, rank, device))
        except Exception as error:
            raise AssertionError(f"{case}") from error
    return used


def named_cases(ranks: int) -> dict[str, Case]:
    """Those that the issue names, whatever the draws are."""
    few = tuple(3 + r for r in range(ranks))
    base = {"experts": 2 * ranks, "top_k": 3, "hidden": 256}
    return {
        "every expert": Case(few, **base, lowest=0, highest=2 * ranks),
        "no tokens on rank 0": Case((0, *few[1:]), **base, lowest=0, highest=2 * ranks),
        "tokens on the last rank only": Case((*[0] * (ranks - 1), 7), **base, lowest=0, highest=2 * ranks),
        "no tokens anywhere": Case((0,) * ranks, **base, lowest=0, highest=2 * ranks),
        "all to the last rank": Case(few, **base, lowest=2 * ranks - 2, highest=2 * ranks),
        "one expert has all": Case(few, **base, lowest=0, highest=1),
        "nobody's experts": Case(few, **base, lowest=-1, highest=0),
        "codes and scales": Case(few, 2 * ranks, 3, 384, 0, 2 * ranks, dtype=FP8, groups=3),
        "room for more": Case(few, **base, lowest=0, highest=2 * ranks, max_tokens=3 * ranks),
        "no tokens, but room": Case((0,) * ranks, **base, lowest=0, highest=2, max_tokens=2),
    }  # fmt: skip


def named(group: str, rank: int, ranks: int, device: str = "cpu") -> list[str]:
    for name, case in named_cases(ranks).items():
        try:
            check(case, group, rank, device)
        except Exception as error:
            raise AssertionError(name) from error
    return list(named_cases(ranks))


def every_code(group: str, rank: int, ranks: int, device: str = "cpu") -> int:
    """All 256 codes of float8, NaN included, and scales of every kind, to every rank."""
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    scale = torch.tensor([[float("inf")], [-0.0]])
    ids = torch.arange(ranks).expand(2, ranks)
    args = [t.to(device) for t in (codes.view(FP8), scale, ids, torch.ones(2, ranks))]
    recv_x, recv_scale, *_ = custom_ops.ep_dispatch(*args, ranks, group)
    assert torch.equal(recv_x.cpu().view(torch.uint8), codes.repeat(ranks, 1))
    assert_same_bits(recv_scale.cpu(), scale.repeat(ranks, 1))
    return recv_x.shape[0]


def experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """A mixture of experts in float32, every expert for every token: what fused_moe computes in 16 bits."""
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        gate, up = (x @ gate_up[expert].T).chunk(2, -1)
        each = (torch.nn.functional.silu(gate) * up) @ down[expert].T
        out = out + each * (weights * (ids == expert)).sum(1, keepdim=True)
    return out


def compiled_layer(group: str, rank: int, ranks: int, backend: str | None) -> list[str]:
    """dispatch -> experts of this rank -> combine in one graph, for several numbers of tokens without a new one.

    backend: None to run it as it is.
    """
    generator = torch.Generator().manual_seed(1)
    count, hidden, inner, top_k = 2 * ranks, 64, 32, 3
    gate_up = torch.randn(count, 2 * inner, hidden, generator=generator) / hidden**0.5
    down = torch.randn(count, hidden, inner, generator=generator) / inner**0.5
    mine = slice(2 * rank, 2 * rank + 2)

    def layer(x: Tensor, weights: Tensor, ids: Tensor, local: tuple[Tensor, Tensor]) -> Tensor:
        recv_x, _, recv_ids, recv_weights, _, *handle = custom_ops.ep_dispatch(
            x, None, ids, weights, count, group
        )
        moe = custom_ops.fused_moe if x.dtype == torch.bfloat16 else experts
        y = moe(recv_x, *local, recv_weights, recv_ids)
        return custom_ops.ep_combine(y, *handle, group)

    done = []
    for dtype in (torch.float32, torch.bfloat16):
        torch._dynamo.reset()
        compiled = layer
        if backend:
            compiled = torch.compile(layer, backend=backend, fullgraph=True)
        first, second = gate_up.to(dtype), down.to(dtype)
        local = first[mine].contiguous(), second[mine].contiguous()
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            for tokens in (5 + rank, 17, 2 + 3 * rank):
                x = torch.randn(tokens, hidden, generator=generator).to(dtype)
                weights = torch.rand(tokens, top_k, generator=generator)
                ids = (
                    torch.rand(tokens, count, generator=generator)
                    .argsort(-1)[:, :top_k]
                    .contiguous()
                )
                for t in (x, weights, ids):
                    torch._dynamo.mark_dynamic(t, 0)
                out = compiled(x, weights, ids, local)
                exact = experts(*(t.double() for t in (x, first, second, weights)), ids)
                limit = exact.abs().amax()
                if dtype == torch.float32:
                    one = experts(x, first, second, weights, ids)
                    assert ((out - one).abs() <= 1e-6 * limit).all()
                    continue
                one = custom_ops.fused_moe(x, first, second, weights, ids)
                # Beside fused_moe's, one rounding to bfloat16 of the sum of each rank, and one of their sum.
                assert ((out.double() - one.double()).abs() <= 2**-7 * limit).all()
                # Where one rank has all experts of a token, nothing is added up: the bits of fused_moe.
                alone = (2 * (ids // 2)[:, :1] + torch.arange(top_k) % 2).contiguous()
                torch._dynamo.mark_dynamic(alone, 0)
                out = compiled(x, weights, alone, local)
                assert_same_bits(out, custom_ops.fused_moe(x, first, second, weights, alone))
            done.append(str(dtype))
    # A rank without tokens has a graph of its own, and calls the same ops in it.
    tokens = 0 if rank == 0 else 4
    x, weights = torch.ones(tokens, hidden, dtype=torch.bfloat16), torch.full((tokens, top_k), 0.5)
    ids = torch.zeros(tokens, top_k, dtype=torch.int64)
    with torch.no_grad():
        out = compiled(x, weights, ids, local)
        assert_same_bits(out, custom_ops.fused_moe(x, first, second, weights, ids))
    return done


def uneven(group: str, rank: int, ranks: int) -> str:
    """Experts that cannot be shared out."""
    x, ids = torch.ones(3, 8), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="num_experts") as caught:
        custom_ops.ep_dispatch(x, None, ids, torch.ones(3, 2), ranks + 1, group)
    return str(caught.value)


def mismatches(group: str, rank: int, ranks: int) -> list[str]:
    """What each rank says when one is called with something else. The group goes on working."""
    last = rank == ranks - 1

    def dispatch(
        hidden: int = 8, dtype: torch.dtype = torch.float32, top_k: int = 2, experts: int = 0
    ) -> tuple:
        x, ids = torch.ones(3, hidden, dtype=dtype), torch.zeros(3, top_k, dtype=torch.int64)
        weights = torch.ones(3, top_k)
        return custom_ops.ep_dispatch(x, None, ids, weights, experts or ranks, group)

    said = []
    for other in ({"hidden": 16}, {"dtype": torch.bfloat16}, {"top_k": 3}, {"experts": 2 * ranks}):
        with pytest.raises(ExchangeError) as caught:
            dispatch(**(other if last else {}))
        said.append(str(caught.value))
    out = dispatch()
    received, handle = out[0], out[5:]
    with pytest.raises(ExchangeError) as caught:
        custom_ops.ep_combine(received, *handle, group) if last else dispatch()
    said.append(str(caught.value))
    with pytest.raises(ExchangeError) as caught:
        custom_ops.ep_combine(received.bfloat16() if last else received, *handle, group)
    said.append(str(caught.value))
    assert torch.equal(custom_ops.ep_combine(received, *handle, group), torch.ones(3, 8))
    return said
