"""What the expert kernels multiply at a time, and which tiles are fastest where: measured, never guessed at run time.

`custom_ops/tables/moe_<arch>.json` has, for kinds of weights and sizes of experts, the tiles that won at some numbers
of pairs. A problem takes the nearest sizes, by their ratios, and the least measured number of pairs that is not below
its own (or the largest one). An architecture without a table takes the nearest older one, or the oldest there is.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from importlib import resources
from typing import Any, NamedTuple

import torch
from torch import Tensor

from custom_ops import platform

PREFIX = "moe_sm_"
# Where no table knows better: this many pairs are served without sorting them.
FEW_PAIRS = 16


class Aligned(NamedTuple):
    """What `moe_align_block_size` returns, and the block size it was given.

    sorted_ids: int32 [P], the pairs of each expert one after the other, padded to blocks with a number that is no pair.
    block_experts: int32 [P // block_size], -1 for a block without pairs. num_padded: int32 [1].
    """

    sorted_ids: Tensor
    block_experts: Tensor
    num_padded: Tensor
    block_size: int


@dataclass(frozen=True)
class Tile:
    """One program's share of a grouped product: columns and channels at a time, warps, stages of the pipeline.

    n: columns of the output; a gated product reads twice as many rows of the weight. swap: multiply transposed, with
    the weight on the side of the matrix instruction that is 64 high. band: blocks of pairs that run together through
    all columns, so that they share the weight in L2. halve: a block that is at most half full multiplies half as much.
    tma: read weights (and what `gate_up` wrote) by the tensor memory accelerator where that is possible. roles: by the
    kernel of `gluon_experts` where it takes the problem, which of all this has stages and a band of its own. ahead:
    cache lines of each row of the weight, a power of two, that the first programs ask for in L2 while the kernel before
    still runs; for where most experts have few pairs, and all wait for memory. keep: what is written stays in L2, where
    the weights that pass through would drive it out before the next kernel reads it; for as much as fits there.
    """

    n: int
    k: int
    warps: int
    stages: int
    swap: bool = False
    band: int = 1
    halve: bool = False
    tma: bool = True
    roles: bool = False
    ahead: int = 0
    keep: bool = False

    def within(self, rows: int, itemsize: int, shared_bytes: int) -> Tile:
        """With as few stages as the shared memory asks for; rows: of both operands together."""
        stage = rows * self.k * itemsize
        return replace(self, stages=max(1, min(self.stages, (shared_bytes - 4096) // stage)))

    def without_roles(self, itemsize: int) -> Tile:
        """What stands in where the kernel with roles does not take a problem."""
        return replace(self, n=128, k=128 // itemsize, warps=8, halve=True, roles=False)


@dataclass(frozen=True)
class Strip:
    """One program's share of a product with a single row: columns, channels at a time, warps, stages.

    prefetch: ask for the weights in L2 while the kernel before still runs; for weights that fit there. choices: how
    many experts of a token at once, in the second product; 0 for all.
    """

    n: int
    k: int
    warps: int
    stages: int = 1
    prefetch: bool = False
    choices: int = 0


@dataclass(frozen=True)
class Choice:
    """What was measured for some sizes and a number of pairs.

    block_size: pairs to a block. strips: of the kernels that sort nothing, None where those lost.
    """

    pairs: int
    block_size: int
    gate_up: Tile
    down: Tile
    strips: tuple[Strip, Strip] | None = None


def kind(weight: Tensor) -> str:
    """What the tables call the weights: by their dtype."""
    return {torch.float8_e4m3fn: "fp8_block", torch.int8: "int8_channel"}.get(
        weight.dtype, "16_bit"
    )


def choose(
    weight: Tensor,
    sizes: tuple[int, int, int],
    pairs: int,
    *,
    block_size: int | None = None,
    few: bool = False,
) -> Choice:
    """What to use for this many pairs and weights like this one.

    sizes: num_experts, hidden_size, intermediate_size. block_size, few: only among choices of that block size, or only
    among those with strips.
    """
    capability = None
    if weight.device.type == "cuda":
        capability = platform.cuda_capability(weight.device)
    return _choose(kind(weight), capability or (9, 0), sizes, pairs, block_size, few)


@functools.lru_cache(maxsize=4096)
def _choose(
    kind: str,
    capability: tuple[int, int],
    sizes: tuple[int, int, int],
    pairs: int,
    block_size: int | None,
    few: bool,
) -> Choice:
    rows = [
        (size, choice)
        for size, choice in _rows(kind, capability)
        if (block_size is None or choice.block_size == block_size)
        and (not few or choice.strips is not None)
    ]
    if not rows:
        return _untuned(kind, pairs / max(sizes[0], 1), block_size)

    def distance(size: Sequence[int]) -> float:
        return sum(abs(math.log(max(a, 1) / b)) for a, b in zip(sizes, size, strict=True))

    nearest = min((size for size, _ in rows), key=lambda size: (distance(size), size))
    here = [choice for size, choice in rows if size == nearest]
    # As many pairs to an expert as were measured, where the number of experts is another.
    wanted = pairs * nearest[0] / max(sizes[0], 1)
    above = [choice for choice in here if choice.pairs >= wanted]
    if above:
        return min(above, key=lambda choice: choice.pairs)
    return max(here, key=lambda choice: choice.pairs)


def _untuned(kind: str, pairs_per_expert: float, block_size: int | None) -> Choice:
    """What works everywhere."""
    k = 64 if kind == "16_bit" else 128
    if block_size is None:
        block_size = 16 if pairs_per_expert <= 8 else 64 if pairs_per_expert <= 64 else 128
    few = block_size < 64
    n = 128 if kind == "fp8_block" else 64
    tile = Tile(n, k, 4, 3, swap=few, band=1 if few else 8, halve=block_size > 32)
    return Choice(0, block_size, tile, tile, (Strip(4, 1024, 4), Strip(4, 512, 4)))


@functools.cache
def _tables() -> dict[int, dict[str, Any]]:
    """Every shipped table by its SM version."""
    found = {}
    for entry in resources.files("custom_ops.tables").iterdir():
        if entry.name.startswith(PREFIX) and entry.name.endswith(".json"):
            found[int(entry.name.removeprefix(PREFIX).removesuffix(".json"))] = json.loads(
                entry.read_text()
            )
    return found


@functools.cache
def _rows(kind: str, capability: tuple[int, int]) -> list[tuple[tuple[int, int, int], Choice]]:
    """The measured sizes and choices of a kind, of the table for a compute capability."""
    tables = _tables()
    if not tables:
        return []
    older = [version for version in tables if version <= 10 * capability[0] + capability[1]]
    table = tables[max(older) if older else min(tables)]
    rows = []
    for row in table["tiles"].get(kind, []):
        strips = row.get("strips")
        rows.append(
            (
                (row["experts"], row["hidden"], row["intermediate"]),
                Choice(
                    row["pairs"],
                    row["block_size"],
                    Tile(**row["gate_up"]),
                    Tile(**row["down"]),
                    strips and (Strip(**strips[0]), Strip(**strips[1])),
                ),
            )
        )
    return rows


def as_row(choice: Tile | Strip) -> dict[str, Any]:
    """A tile or strip as the tables keep it: what is not the default."""
    return {
        field.name: getattr(choice, field.name)
        for field in fields(choice)
        if getattr(choice, field.name) != field.default
    }
