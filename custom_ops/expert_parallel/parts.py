"""Prepare and Finalize for experts on several ranks: any of `custom_ops.moe`, with an exchange between ranks around it.

    dispatch_permute  = dispatch, then permute the received rows        high-throughput: `ep_dispatch`, `ep_combine`
    unpermute_combine = un-permute with the weights, then combine
    dispatch_batched  = dispatch into the batched format                low-latency: nothing is left to permute or
    combine_batched   = combine with the weights                        to un-permute

`join` refuses a Prepare that sends tokens away beside a Finalize that does not fetch them back, and the reverse.
Where experts take codes, tokens are quantized before they travel: by `group_quant` with the words of the problem, or,
with low latency, as `ep_dispatch_low_latency` rounds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from custom_ops.expert_parallel.low_latency import ep_combine_low_latency, ep_dispatch_low_latency
from custom_ops.expert_parallel.ops import ep_combine, ep_dispatch
from custom_ops.moe import batched, finalize, prepare
from custom_ops.moe.parts import Experts, ExpertTokensMetadata, Finalize, Prepare, Prepared
from custom_ops.moe.problem import Problem
from custom_ops.scales import BLOCK

HIGH_THROUGHPUT, LOW_LATENCY = "high_throughput", "low_latency"


@dataclass(frozen=True, eq=False)
class RanksProblem(Problem):
    """Tokens of this rank, and weights of the experts of this rank; topk_ids name experts of all ranks.

    group: the `group_name` of a process group. num_everywhere: experts of all ranks. max_tokens: of low latency, the
    most that a rank has. No expert_map: rank r has experts r * E / N and those after it.
    """

    group: str = ""
    num_everywhere: int = 0
    max_tokens: int = 0


def _of_ranks(problem: Problem) -> str | None:
    if not isinstance(problem, RanksProblem):
        return "sends tokens to the ranks of a group, and the problem names none"
    if problem.expert_map is not None:
        return "each rank has the experts after those of the rank before; expert_map is given"
    return None


def _dispatching(local: Prepare) -> Prepare:
    """What a Prepare does, to the rows that this rank receives."""

    def run(problem: Problem, experts: Experts) -> Prepared:
        assert isinstance(problem, RanksProblem)
        x, scale = problem.hidden_states, problem.hidden_scale
        if local.quantization is not None and scale is None:
            x, scale = torch.ops.custom_ops.group_quant(x, BLOCK, **problem.quantization)
        rows, row_scale, ids, weights, _, *handle = ep_dispatch(
            x, scale, problem.topk_ids, problem.topk_weights, problem.num_everywhere, problem.group
        )
        given = {field.name: getattr(problem, field.name) for field in fields(Problem)}
        given |= {"hidden_states": rows, "topk_ids": ids, "topk_weights": weights}
        given |= {"hidden_scale": None if scale is None else row_scale, "out_dtype": problem.dtype}
        received = Problem(**given)
        # Without a row there is nothing to bring into a format, and the ranks that sent none still wait for combine.
        prepared = Prepared(rows, None, ExpertTokensMetadata())
        if rows.shape[0]:
            prepared = local.run(received, experts)
        metadata = replace(prepared.metadata, received=received, handle=tuple(handle))
        return prepared._replace(metadata=metadata)

    return replace(
        local,
        name=f"dispatch_{local.name}",
        run=run,
        exchange=HIGH_THROUGHPUT,
        chunkable=False,  # ranks would have different numbers of chunks, and wait for each other
        unsupported=lambda problem: _of_ranks(problem) or local.unsupported(problem),
    )


def _combining(local: Finalize) -> Finalize:
    """What a Finalize does, and the sums of rows back to the ranks of their tokens."""

    def run(problem: Problem, results: Tensor, metadata: ExpertTokensMetadata) -> Tensor:
        received = metadata.received
        assert isinstance(problem, RanksProblem)
        assert received is not None
        rows = received.hidden_states
        y = rows.new_empty(rows.shape, dtype=received.dtype)
        if rows.shape[0]:
            y = local.run(received, results, metadata)
        sent, sources, ranks, channels = metadata.handle
        return ep_combine(y, sent, sources, ranks, channels, problem.group)

    return replace(
        local, name=f"{local.name}_combine", run=run, exchange=HIGH_THROUGHPUT, chunkable=False
    )


def _dispatch_batched(problem: Problem, fp8: bool) -> Prepared:
    assert isinstance(problem, RanksProblem)
    batch, scale, counts, *handle = ep_dispatch_low_latency(
        problem.hidden_states,
        problem.topk_ids,
        problem.num_everywhere,
        problem.max_tokens,
        problem.group,
        fp8=fp8,
    )
    received = batched.problem_of(problem, batch, scale if fp8 else None, counts)
    metadata = ExpertTokensMetadata(counts=counts, received=received, handle=tuple(handle))
    return Prepared(batch, scale if fp8 else None, metadata)


def _low_latency(problem: Problem) -> str | None:
    if reason := _of_ranks(problem):
        return reason
    if problem.hidden_states.dtype != torch.bfloat16:
        return f"sends torch.bfloat16, hidden_states are {problem.hidden_states.dtype}"
    return None


def _combine_batched(problem: Problem, results: Tensor, metadata: ExpertTokensMetadata) -> Tensor:
    assert isinstance(problem, RanksProblem)
    sources, ranges = metadata.handle
    return ep_combine_low_latency(
        results, problem.topk_ids, problem.topk_weights, sources, ranges, problem.group
    )


def _batched(name: str, fp8: bool) -> Prepare:
    def run(problem: Problem, experts: Experts) -> Prepared:
        return _dispatch_batched(problem, fp8)

    return Prepare(
        name,
        run,
        "batched",
        "fp8_group" if fp8 else None,
        exchange=LOW_LATENCY,
        chunkable=False,
        unsupported=_low_latency,
    )


PREPARES: tuple[Prepare, ...] = (
    *map(_dispatching, prepare.PREPARES),
    _batched("dispatch_batched", False),
    _batched("dispatch_batched_quantized", True),
)
FINALIZES: tuple[Finalize, ...] = (
    *map(_combining, finalize.FINALIZES),
    Finalize("combine_batched", _combine_batched, "batched", exchange=LOW_LATENCY, chunkable=False),
)


def problem_of(
    problem: Problem, group: str, num_everywhere: int, max_tokens: int = 0
) -> RanksProblem:
    """A problem as one of the ranks of a group."""
    given = {field.name: getattr(problem, field.name) for field in fields(problem)}
    return RanksProblem(**given, group=group, num_everywhere=num_everywhere, max_tokens=max_tokens)
