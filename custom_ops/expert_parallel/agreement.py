"""That all ranks call the same op with the same sizes, found out before a byte of a row moves.

A header goes to every rank. One that was called with something else is an error on every rank, with its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from custom_ops.expert_parallel import groups

# What a header says a dtype is: its place here.
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int8,
)
OPS = (
    "ep_dispatch",
    "ep_combine",
    "ep_dispatch_low_latency",
    "ep_combine_low_latency",
    "ep_fused_moe",
)
# What a header says in numbers before the counts: the op, and up to this many sizes and dtypes.
_ABOUT = 7
# The runs of tokens that a rank's tokens are divided in: two SMs each of those that DeepEP sends and receives with.
CHANNELS = 10

_agreed: set[tuple[Any, ...]] = set()


def agree(
    op: str,
    group: str,
    device: torch.device,
    about: Mapping[str, Any],
    counts: Sequence[Sequence[int]] = (),
) -> list[list[int]]:
    """Tell each rank what this op was called with, and counts[rank]; returns what each has for this one.

    about: sizes and dtypes by the name that an error gives them, the same on every rank. counts: as many numbers for
    one rank as for another, at most CHANNELS more than there are ranks. All headers are of one length, whatever the op.
    Raises ExchangeError on every rank if one of them was called with something else.
    """
    pg = groups.resolve(op, group)
    length = pg.size() + CHANNELS
    values = [DTYPES.index(v) if isinstance(v, torch.dtype) else int(v) for v in about.values()]
    mine = [OPS.index(op), *values, *[0] * (_ABOUT - len(values))]
    header = torch.zeros((pg.size(), len(mine) + length), dtype=torch.int64)
    header[:, : len(mine)] = torch.tensor(mine)
    if counts:
        header[:, len(mine) : len(mine) + len(counts[0])] = torch.tensor(counts)
    header = header.to(device)
    theirs = torch.empty_like(header)
    ones = [1] * pg.size()
    groups.exchange(op, group, header, ones, theirs, ones)
    answers = theirs.tolist()
    for peer, (which, *found) in enumerate(answers):
        if which != OPS.index(op):
            raise groups.ExchangeError(
                f"{op}: rank {peer} calls {OPS[which]} where rank {pg.rank()} calls {op} (group {group!r})"
            )
        for name, value, given in zip(about, values, found, strict=False):
            if value != given:
                a, b = (DTYPES[v] if name.endswith("dtype") else v for v in (given, value))
                raise groups.ExchangeError(
                    f"{op}: {name} is {a} on rank {peer} and {b} on rank {pg.rank()}; accepted: the same on "
                    f"every rank of group {group!r}"
                )
    count = len(counts[0]) if counts else 0
    return [answer[len(mine) : len(mine) + count] for answer in answers]


def agree_once(op: str, group: str, device: torch.device, about: Mapping[str, Any]) -> None:
    """`agree` the first time that this op of this group is called with these sizes, and nothing after.

    For implementations in which the host waits for nobody, or not at once: a rank that goes on with other sizes later
    is found by the time-out. Raises RuntimeError if that first time is inside a CUDA graph capture.
    """
    key = (op, group, groups.number(op, group), device, *about.values())
    if key in _agreed:
        return
    if device.type == "cuda":
        groups.refuse_capture(op)
    agree(op, group, device, about)
    _agreed.add(key)
