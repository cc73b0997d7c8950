"""Which way of a linear layer with adapters is fastest for how many tokens: measured, never tried out at run time.

| way         | what it is                                                                | kind   |
| ----------- | ------------------------------------------------------------------------- | ------ |
| decode CxB  | one kernel for few tokens, `csrc/lora_decode.cu`, in tiles of C by 1 / B  | cuda   |
| prefill     | one kernel for many tokens of one 16-bit adapter, `csrc/lora_prefill.cu`  | cuda   |
| prefill own | the same with a shrink of its own, for ranks up to 32                     | cuda   |
| fused       | prefill in Triton, `triton_linear.linear_kernel`                          | triton |
| apart       | the BLAS, the shrink before it, the expand on what it wrote               | triton |
| beside      | the same, with the shrink on a stream of its own while the BLAS runs      | triton |
| after       | the same, with the shrink after the BLAS: the expand starts while it runs | triton |
| tiled       | after, for a batch, in CUDA C++: `csrc/lora_batch.cu`                     | cuda   |

A decode tile is C columns by one of up to B parts of the channels.

`custom_ops/tables/lora_sm_90.json` has a row for each kind of call, size, rank and number of tokens that was measured,
with the microseconds of each way. A size that was not measured takes the nearest, by the ratios of N, K, rank and
tokens: of a size the least number of tokens that is not below its own, or the largest. Where nothing was measured:
apart.
"""

from __future__ import annotations

import functools
import json
import math
from importlib import resources
from typing import Any

DECODES = ("decode 64x2", "decode 64x4", "decode 128x2", "decode 128x4")
WITH_BLAS = ("apart", "beside", "after")
TILED = "tiled"
CUDA = (*DECODES, "prefill", "prefill own", TILED)
WAYS = (*CUDA, "fused", *WITH_BLAS)
MAX_FUSED_RANK = (
    64  # above it the tiles of y and B, which its loop over the rank would prefetch, find no room
)
KINDS = ("single", "single float32", "batch")


@functools.cache
def table() -> tuple[dict[str, Any], ...]:
    """The rows of the table for Hopper; no other architecture has been measured."""
    entry = resources.files("custom_ops.tables").joinpath("lora_sm_90.json")
    return tuple(json.loads(entry.read_text())["rows"]) if entry.is_file() else ()


@functools.lru_cache(maxsize=4096)
def ranked(kind: str, tokens: int, columns: int, channels: int, rank: int) -> tuple[str, ...]:
    """The ways that were measured for a call, the fastest first.

    kind: of `KINDS`: one adapter of 16 bits, one of float32, or those of a batch.
    """
    rows = [row for row in table() if row["kind"] == kind]
    if not rows:
        return ()

    def apart(row: dict[str, Any], **sizes: int) -> float:
        return sum(abs(math.log(max(have, 1) / row[name])) for name, have in sizes.items())

    taken: dict[tuple[int, int, int], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda r: -r["m"]):
        size = row["n"], row["k"], row["rank"]
        if size not in taken or row["m"] >= tokens:
            taken[size] = row

    def distance(row: dict[str, Any]) -> tuple[float, float]:
        size = apart(row, n=columns, k=channels, rank=rank)
        return round(size + apart(row, m=tokens), 6), size

    row = min(taken.values(), key=distance)
    return tuple(sorted(row["us"], key=lambda way: row["us"][way]))


def best(
    kind: str, tokens: int, columns: int, channels: int, rank: int, among: tuple[str, ...]
) -> str:
    """The fastest way among some, or "apart", which takes everything."""
    order = ranked(kind, tokens, columns, channels, rank)
    return next((way for way in order if way in among), "apart")
