"""The parts of a mixture of experts, Prepare -> Experts -> Finalize, and what each says about itself.

A part is a function and its declaration. Parts that fit are joined by `join`, which refuses others by name; nothing
else knows which part goes with which. `PREPARES`, `EXPERTS` and `FINALIZES` (`custom_ops.moe.catalogue`) list them.

| format       | a tensor of                      | what says whose row is whose                                      |
| ------------ | -------------------------------- | ----------------------------------------------------------------- |
| `tokens`     | [num_tokens, K]                  | topk_ids                                                          |
| `indexed`    | [num_tokens, K]                  | `metadata.aligned`, from `moe_align_block_size`                   |
| `contiguous` | [rows, K], grouped by expert     | `metadata.row_experts`, `.offsets` and `.row_of_pair`             |
| `batched`    | [num_experts, max_tokens, K]     | `metadata.counts` and `.row_of_pair`                              |
| `pairs`      | [num_tokens * top_k, K]          | row token * top_k + k; a pair whose expert is elsewhere has none  |
| `reduced`    | [num_tokens, K]                  | nothing is left to do                                             |

Experts take one of the first four and return `pairs`, `contiguous`, `batched` or `reduced`. Rows of padding, and of
pairs whose experts are elsewhere, hold whatever memory held.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from custom_ops.moe.problem import Problem, Sizes

CHUNK_VARIABLE = "CUSTOM_OPS_MOE_CHUNK_TOKENS"
DEFAULT_CHUNK_TOKENS = 16384


@dataclass(frozen=True, eq=False)
class ExpertTokensMetadata:
    """Which rows are whose. Tensors are on the device, and nobody waits for them.

    counts: int32 [num_experts], the pairs of each expert that is here. host_counts: the same on the host, where
    whoever made the batch knows them anyway; None otherwise. row_of_pair: int32 [num_tokens * top_k], the row of a pair
    in the flattened rows, -1 where its expert is elsewhere. row_experts: int32 [rows], the expert of a row, -1 for
    padding. offsets: int32 [num_experts + 1], the first row of each expert and their end. aligned: the index of the
    experts in Triton. received: the problem that the experts here have where tokens came from other ranks, None where
    they stayed; handle: what returns the results to them.
    """

    counts: Tensor | None = None
    host_counts: tuple[int, ...] | None = None
    row_of_pair: Tensor | None = None
    row_experts: Tensor | None = None
    offsets: Tensor | None = None
    aligned: Any = None
    received: Problem | None = None
    handle: tuple[Tensor, ...] = ()


class Prepared(NamedTuple):
    """What a Prepare returns: activations, their scales if they are quantized, and whose they are."""

    x: Tensor
    scale: Tensor | None
    metadata: ExpertTokensMetadata


def _anything(problem: Problem) -> str | None:
    return None


def _nothing(sizes: Sizes, itemsize: int) -> int:
    return 0


@dataclass(frozen=True)
class Prepare:
    """Brings tokens into the format of the experts.

    run(problem, experts) -> Prepared. activation_format, quantization: what it makes. applies_topk_weights: whether
    it multiplies the tokens by them. workspace: bytes that it allocates, from the sizes and the bytes of an element of
    hidden_states. chunkable: whether it may see some of the tokens at a time. unsupported: why it cannot take a
    problem. exchange: how it sends tokens to the ranks of their experts, "high_throughput" or "low_latency"; or None.
    """

    name: str
    run: Callable[[Problem, Experts], Prepared]
    activation_format: str
    quantization: str | None = None
    applies_topk_weights: bool = False
    workspace: Callable[[Sizes, int], int] = _nothing
    chunkable: bool = True
    unsupported: Callable[[Problem], str | None] = _anything
    exchange: str | None = None


@dataclass(frozen=True)
class Experts:
    """The two grouped products and what is between them.

    run(problem, prepared) -> Tensor in output_format. family: the implementation of `fused_moe` that it belongs to.
    activation_format, quantization: what it takes. weights: of which it can read, in the words of `Problem.weights`.
    gate_up: the order of the halves that it reads; "up_first" has to keep them once more. apart: whether it reads gate
    and up where they are two weights. align: a multiple of what
    rows each expert has in a contiguous format, or the block size of the index, from the problem. unavailable(device):
    why it cannot run there. The others: see Prepare.
    """

    name: str
    family: str
    run: Callable[[Problem, Prepared], Tensor]
    activation_format: str
    output_format: str
    weights: str = "16_bit"
    quantization: str | None = None
    gate_up: str = "gate_first"
    apart: bool = False
    align: Callable[[Problem], int] = lambda problem: 1
    applies_topk_weights: bool = False
    workspace: Callable[[Sizes, int], int] = _nothing
    chunkable: bool = True
    unavailable: Callable[[torch.device], str | None] = lambda device: None
    unsupported: Callable[[Problem], str | None] = _anything


@dataclass(frozen=True)
class Finalize:
    """Brings the results of experts back to tokens: run(problem, results, metadata) -> [num_tokens, hidden_size].

    activation_format: what it takes. applies_topk_weights: whether it multiplies by them. exchange: how it returns
    results to the ranks of their tokens. The others: see Prepare.
    """

    name: str
    run: Callable[[Problem, Tensor, ExpertTokensMetadata], Tensor]
    activation_format: str
    applies_topk_weights: bool = True
    workspace: Callable[[Sizes, int], int] = _nothing
    chunkable: bool = True
    exchange: str | None = None


@dataclass(frozen=True)
class Pipeline:
    """Three parts that fit; made by `join`."""

    prepare: Prepare
    experts: Experts
    finalize: Finalize

    @property
    def name(self) -> str:
        return f"{self.prepare.name} -> {self.experts.name} -> {self.finalize.name}"

    @property
    def chunkable(self) -> bool:
        return self.prepare.chunkable and self.experts.chunkable and self.finalize.chunkable

    def workspace(self, sizes: Sizes, itemsize: int) -> int:
        """A bound of what a call allocates at once, in bytes, for all of these tokens in one chunk."""
        parts = (self.prepare, self.experts, self.finalize)
        return sum(part.workspace(sizes, itemsize) for part in parts)

    def unsupported(self, problem: Problem) -> str | None:
        """Why it cannot take a problem, or None. Symbolic sizes must be known to fit."""
        if problem.weights != self.experts.weights:
            return f"{self.experts.name} reads weights of {self.experts.weights}, not {problem.weights}"
        if problem.up is not None and not self.experts.apart:
            return f"{self.experts.name} reads gate and up as one weight, here are two"
        if problem.hidden_scale is not None and self.prepare.quantization is None:
            return f"Prepare {self.prepare.name} takes tokens in 16 bits, these are quantized"
        tokens = problem.sizes.num_tokens
        if not self.chunkable and not (isinstance(tokens, int) and tokens <= chunk_tokens()):
            return f"{self.name} cannot be chunked ({CHUNK_VARIABLE} is {chunk_tokens()})"
        return self.prepare.unsupported(problem) or self.experts.unsupported(problem)

    def __call__(self, problem: Problem) -> Tensor:
        """The result, in as many chunks of tokens as CUSTOM_OPS_MOE_CHUNK_TOKENS asks for."""
        tokens = problem.sizes.num_tokens
        if not self.chunkable or tokens <= chunk_tokens():
            return self.once(problem)
        hidden_states = problem.hidden_states
        out = hidden_states.new_empty(hidden_states.shape, dtype=problem.dtype)
        for start, stop in chunks(tokens, chunk_tokens()):
            out[start:stop] = self.once(problem.of_tokens(start, stop))
        return out

    def once(self, problem: Problem) -> Tensor:
        prepared = self.prepare.run(problem, self.experts)
        received = prepared.metadata.received
        if received is None:
            results = self.experts.run(problem, prepared)
        elif received.hidden_states.shape[0]:
            results = self.experts.run(received, prepared)
        else:  # not a token for the experts here
            results = prepared.x
        return self.finalize.run(problem, results, prepared.metadata)


def misfit(prepare: Prepare, experts: Experts, finalize: Finalize) -> str | None:
    """Why parts do not fit, naming both of a pair, or None."""
    if prepare.activation_format != experts.activation_format:
        return (
            f"Prepare {prepare.name!r} makes the format {prepare.activation_format!r}, Experts "
            f"{experts.name!r} take {experts.activation_format!r}"
        )
    if prepare.quantization != experts.quantization:
        return (
            f"Prepare {prepare.name!r} makes the quantization {prepare.quantization!r}, Experts "
            f"{experts.name!r} take {experts.quantization!r}"
        )
    if experts.output_format != finalize.activation_format:
        return (
            f"Experts {experts.name!r} return the format {experts.output_format!r}, Finalize "
            f"{finalize.name!r} takes {finalize.activation_format!r}"
        )
    if prepare.exchange != finalize.exchange:
        return (
            f"around Experts {experts.name!r}, Prepare {prepare.name!r} has the exchange {prepare.exchange!r}, "
            f"Finalize {finalize.name!r} {finalize.exchange!r}"
        )
    appliers = [part for part in (prepare, experts, finalize) if part.applies_topk_weights]
    if len(appliers) > 1:
        first, second = (f"{type(part).__name__} {part.name!r}" for part in appliers[:2])
        return f"{first} and {second} both apply the top-k weights"
    if not appliers:
        return f"neither Experts {experts.name!r} nor Finalize {finalize.name!r} applies the top-k weights"
    return None


def join(prepare: Prepare, experts: Experts, finalize: Finalize) -> Pipeline:
    """Three parts as one. Raises ValueError with the names of two parts that do not fit."""
    if reason := misfit(prepare, experts, finalize):
        raise ValueError(reason)
    return Pipeline(prepare, experts, finalize)


def pipelines(
    prepares: Iterable[Prepare], experts: Iterable[Experts], finalizes: Iterable[Finalize]
) -> Iterator[Pipeline]:
    """Every combination that fits, in the order of the experts."""
    prepares, finalizes = tuple(prepares), tuple(finalizes)
    for e in experts:
        for p in prepares:
            for f in finalizes:
                if misfit(p, e, f) is None:
                    yield Pipeline(p, e, f)


def chunk_tokens() -> int:
    """The most tokens that are worked on at a time. Raises ValueError for a bad value of the variable."""
    return _parse(os.environ.get(CHUNK_VARIABLE, ""))


@functools.cache
def _parse(value: str) -> int:
    if not value:
        return DEFAULT_CHUNK_TOKENS
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError(f"{CHUNK_VARIABLE} is {value!r}; accepted: a whole number >= 1")
    return number


def chunks(tokens: int, most: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of as few chunks as can be, of nearly one size: a short last one would read all weights too."""
    count = -(-tokens // most)
    for index in range(count):
        yield index * tokens // count, (index + 1) * tokens // count


def count_tokens(local_ids: Tensor, num_experts: int) -> Tensor:
    """int32 [num_experts]: how many pairs each expert has. local_ids: -1 for an expert that is elsewhere."""
    ids = local_ids.flatten().long()
    slots = torch.where(ids < 0, num_experts, ids)
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    return counts.scatter_add_(0, slots, torch.ones_like(slots, dtype=torch.int32))[:num_experts]
