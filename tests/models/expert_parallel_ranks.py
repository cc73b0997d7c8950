"""What two ranks of a sharded model do, each with tokens of its own."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import fusion_passes
from custom_ops.expert_parallel import groups
from fusion_passes.expert_parallel import sharding
from tests.fusion_passes.expert_parallel.graphs import tokens
from tests.models import moe_zoo

COUNTS = ((5, 17, 3), (3, 9, 21))
"""Tokens of the calls of each rank."""


def model_of(kind: str, dtype: torch.dtype, scheme: str = "bf16", **changes: Any) -> nn.Module:
    """A model of its own, the same on every rank."""
    model = copy.deepcopy(moe_zoo.build(kind, scheme=scheme, **changes))
    return model if scheme != "bf16" else model.to(dtype)


def logits(model: Any, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(ids, use_cache=False).logits for ids in inputs]


def difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest norm of a difference over that of what it should be."""
    return max(
        float((a.double() - e.double()).norm() / e.double().norm())
        for a, e in zip(actual, expected, strict=True)
    )


def inputs_of(rank: int) -> list[Tensor]:
    return [moe_zoo.tokens(count) for count in COUNTS[rank % 2]]


def compiled(model: nn.Module, inputs: list[Tensor], **options: Any) -> tuple[list[Tensor], int]:
    """The logits of a compiled model, and how many graphs it was compiled to: one for all numbers of tokens."""
    torch._dynamo.reset()
    fusion_passes.reset_reports()
    given = {"allow_reference": True, **options}
    run = torch.compile(model, backend="fusion_passes", fullgraph=True, options=given)
    for ids in inputs:
        torch._dynamo.maybe_mark_dynamic(ids, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = logits(run, inputs)
    return found, len(fusion_passes.reports())


def float32(group: str, rank: int, kind: str) -> dict[str, Any]:
    """Eager and compiled against one rank, in the reference mode."""
    model, inputs = model_of(kind, torch.float32), inputs_of(rank)
    expected = logits(model, inputs)
    alone, _ = compiled(model, inputs)
    fusion_passes.parallelize_experts_(model, group)
    eager = difference(logits(model, inputs), expected)
    found, graphs = compiled(model, inputs)
    return {
        "eager": eager,
        "compiled": difference(found, alone),
        "graphs": graphs,
        "matches": matches(),
    }


def float32_eager(group: str, rank: int, kind: str) -> tuple[float, float]:
    """The error against float64 of a model in float32: sharded, and of the same on one rank. Not compiled."""
    model, inputs = model_of(kind, torch.float32, implementation="eager"), inputs_of(rank)
    wanted = logits(copy.deepcopy(model).double(), inputs)
    alone = difference(logits(model, inputs), wanted)
    fusion_passes.parallelize_experts_(model, group)
    return difference(logits(model, inputs), wanted), alone


def matches() -> dict[str, int]:
    return dict(fusion_passes.report().matches)


def no_tokens(group: str, rank: int, kind: str) -> int:
    """One layer's mixture of experts, of which one rank has no tokens."""
    layer = model_of(kind, torch.float32, layers=1).model.layers[0].mlp
    count = (0, 7)[rank]
    x = torch.randn(1, count, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = layer(x)
        fusion_passes.parallelize_experts_(layer, group)
        run = torch.compile(layer, backend="fusion_passes", fullgraph=True)
        for found in (layer(x), run(x)):
            assert found.shape == expected.shape
            if count:
                assert difference([found], [expected]) <= 1e-6
    return count


def low_latency(group: str, rank: int, kind: str) -> dict[str, Any]:
    """The experts of a layer by the ops of fixed shapes, eagerly and compiled, against all experts on one rank."""
    kind, _, scheme = kind.partition(" ")
    found: dict[str, Any] = {}
    built = model_of(
        kind, torch.bfloat16, scheme or "bf16", layers=1, implementation="fusion_passes"
    )
    _, experts = next(sharding._experts_of(built))
    calls = [tokens(count, 128, moe_zoo.EXPERTS, moe_zoo.TOP_K) for count in (5 + rank, 17, 2, 0)]
    for x, *_ in calls:
        x.clamp_(-8, 8)
    with torch.no_grad():
        expected = [experts(*args) for args in calls]
        fusion_passes.parallelize_experts_(experts, group, mode="low_latency", max_tokens=20)
        eager = [experts(*args) for args in calls]
        torch._dynamo.reset()
        run = torch.compile(experts, backend="fusion_passes", fullgraph=True)
        for args in calls[:3]:
            for tensor in args:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        fusion_passes.reset_reports()
        compiled = [run(*args) for args in calls]
    found["max_tokens"] = experts.share.max_tokens
    found["difference"] = difference(eager[:3], expected[:3])
    found["same"] = all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))
    found["graphs"] = len(fusion_passes.reports())
    return found


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes that dispatches of this process hand over, headers and all."""
    sent: list[int] = []
    exchange = groups.exchange

    def counting(op: str, group: str, given: Tensor, *args: Any, **kwargs: Any) -> None:
        if op == "ep_dispatch":
            sent.append(given.numel() * given.element_size())
        exchange(op, group, given, *args, **kwargs)

    groups.exchange = counting
    try:
        yield sent
    finally:
        groups.exchange = exchange


def quantized_before(group: str, rank: int, kind: str) -> dict[str, Any]:
    """A block-scaled model with the rewrite on and off: the same bits, and what was sent."""
    model = model_of(kind, torch.bfloat16, "fp8_block")
    fusion_passes.parallelize_experts_(model, group)
    inputs = inputs_of(rank)
    off, graphs = compiled(model, inputs, fusions="none")
    on, graphs_on = compiled(model, inputs, fusions="quantize_before_dispatch")
    return {
        "matches": matches(),
        "same": [torch.equal(a, b) for a, b in zip(on, off, strict=True)],
        "graphs": (graphs, graphs_on),
    }


def bytes_sent(group: str, rank: int, kind: str) -> float:
    """Of dispatch, by one layer of 2048 channels: with the rewrite over without it. All that travels is counted."""
    layer = model_of(kind, torch.bfloat16, "fp8_block", layers=1, hidden_size=2048).model.layers[0]
    experts = fusion_passes.parallelize_experts_(layer.mlp, group).experts
    args = tokens(64 + 8 * rank, 2048, moe_zoo.EXPERTS, moe_zoo.TOP_K)
    totals, results = [], []
    for fusions in ("none", "quantize_before_dispatch"):
        torch._dynamo.reset()
        options = {"fusions": fusions, "allow_reference": True}
        run = torch.compile(experts, backend="fusion_passes", fullgraph=True, options=options)
        with torch.no_grad(), counted() as sent:
            results.append(run(*args))
        totals.append(sum(sent))
    assert torch.equal(*results)
    return totals[1] / totals[0]


def by_token(actual: list[Tensor], judge: list[Tensor]) -> Tensor:
    """The norm of each token's error over that of what it should be."""
    errors = [
        (a.double() - j.double()).norm(dim=-1) / j.double().norm(dim=-1)
        for a, j in zip(actual, judge, strict=True)
    ]
    return torch.cat([error.flatten() for error in errors]).cpu()


JUDGED_COUNTS = ((240, 97), (128, 256))
"""Tokens of the calls of each rank: enough that a median says something."""


class Judge:
    """A stock model on this rank alone, and the errors of it in 16 bits and of others against float64.

    float64 where the model's own code does not ask for float32, as in norms and routers. kind: a model, and "float16"
    instead of bfloat16, or "fp8_block": then "stock" is quantized too.
    """

    def __init__(self, kind: str, rank: int, device: str) -> None:
        self.kind, _, self.how = kind.partition(" ")
        self.device = device
        self.inputs = [moe_zoo.tokens(count).to(device) for count in JUDGED_COUNTS[rank % 2]]
        exact = model_of(self.kind, torch.float64, implementation="eager").to(device)
        self.wanted = logits(exact, self.inputs)
        stock = "fusion_passes" if self.how == "fp8_block" else "eager"
        self.errors = {"stock": self.of(self.model(stock))}

    def model(self, implementation: str) -> nn.Module:
        dtype = torch.float16 if self.how == "float16" else torch.bfloat16
        scheme = self.how if self.how == "fp8_block" else "bf16"
        return model_of(self.kind, dtype, scheme, implementation=implementation).to(self.device)

    def of(self, run: Any) -> Tensor:
        return by_token(logits(run, self.inputs), self.wanted)

    def sharded(self, group: str, **how: Any) -> nn.Module:
        return fusion_passes.parallelize_experts_(self.model("fusion_passes"), group, **how)


def sixteen_bits(group: str, rank: int, kind: str) -> dict[str, Tensor]:
    """Each token's error against float64: of the model on one rank, and sharded; not compiled."""
    judge = Judge(kind, rank, "cpu")
    sharded = judge.sharded(group)
    judge.errors["eager"] = judge.of(sharded)
    bounded = judge.sharded(group, max_tokens=max(max(counts) for counts in JUDGED_COUNTS))
    both = (logits(model, judge.inputs) for model in (bounded, sharded))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    return judge.errors


def judged(group: str, rank: int, kind: str) -> dict[str, Tensor]:
    """The same, and compiled."""
    judge = Judge(kind, rank, "cpu")
    sharded = judge.sharded(group)
    judge.errors["eager"] = judge.of(sharded)
    torch._dynamo.reset()
    options = {"allow_reference": True}
    run = torch.compile(
        sharded, backend="fusion_passes", fullgraph=True, dynamic=True, options=options
    )
    judge.errors["compiled"] = judge.of(run)
    return judge.errors


def on_gpus(group: str, rank: int, mode: str, max_tokens: int) -> dict[str, Tensor]:
    """`judged` with a GPU for each rank."""
    start = time.perf_counter()

    def say(name: str) -> None:
        seconds = time.perf_counter() - start
        said = described(judge.errors[name])
        print(f"rank {rank}: {mode} {max_tokens} {name}: {said}, {seconds:.1f} s", flush=True)

    judge = Judge("qwen3_moe", rank, "cuda")
    say("stock")
    sharded = judge.sharded(group, mode=mode, max_tokens=max_tokens)
    judge.errors["eager"] = judge.of(sharded)
    say("eager")
    torch._dynamo.reset()
    # of any number of tokens, or it would be compiled for each of the two
    run = torch.compile(sharded, backend="fusion_passes", fullgraph=True, dynamic=True)
    judge.errors["compiled"] = judge.of(run)
    say("compiled")
    return judge.errors


def described(errors: Tensor) -> str:
    far = float((errors > FAR).double().mean())
    return f"median {float(errors.median()):.2e}, mean {float(errors.mean()):.2e}, far {far:.3f}"


FAR = 0.1
"""A token that a rounding sent to another expert is off by more than this, and few others."""


def everything(group: str, rank: int, what: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Each function that is named, for each kind of model."""
    os.environ["FUSION_PASSES_ALLOW_REFERENCE"] = "1"
    torch._inductor.config.fx_graph_cache = False  # a graph that is found there has no report
    return {
        name: {k: globals()[name](group, rank, k) for k in kinds} for name, kinds in what.items()
    }
