"""What an input that is not contiguous costs: the same values, where a view of a larger tensor has them and packed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.case import Case, Inputs, Target, Thunk, activation, same
from bench.suites.normalization import EPS, add_rms_norm
from bench.suites.quantization import GROUP
from custom_ops import library

BAR = 1.1
"""The most times that a view may take of what packed values take."""


def _sliced(device: torch.device, rows: int, columns: int) -> Tensor:
    """The middle of wider rows, as a part of a packed projection is."""
    return activation(device, rows, 3 * columns)[:, columns : 2 * columns]


def _row_strided(device: torch.device, rows: int, columns: int) -> Tensor:
    return activation(device, 2 * rows, columns)[::2]


def _offset(device: torch.device, rows: int, columns: int) -> Tensor:
    """From the eighth element of a buffer on, which is a vector of 16 bytes further than it begins."""
    return activation(device, rows * columns + 8)[8:].view(rows, columns)


VIEWS: dict[str, Callable[[torch.device, int, int], Tensor]] = {
    "sliced": _sliced,
    "row_strided": _row_strided,
    "offset": _offset,
}


class Subject(NamedTuple):
    """An op, it in plain PyTorch, how many inputs over tokens it has, and whether it has a weight."""

    op: str
    plain: Callable[..., Any]
    rows: int
    weight: bool = False

    def arguments(self, *inputs: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (*inputs, *((EPS,) if self.weight else ()), *GROUP.rest), {}

    def bytes(self, tokens: int, width: int) -> int:
        written = 2 * tokens * width if self.weight else 0  # the sum
        return 2 * tokens * width * self.rows + written + GROUP.out_bytes(tokens, width)


def _silu_mul_group_quant(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    return GROUP.plain(torch.nn.functional.silu(gate) * up)


def _add_rms_norm_group_quant(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    normed, total = add_rms_norm(x, residual, weight)
    return *GROUP.plain(normed), total


SUBJECTS = (
    Subject("group_quant", GROUP.plain, 1),
    Subject("silu_mul_group_quant", _silu_mul_group_quant, 2),
    Subject("add_rms_norm_group_quant", _add_rms_norm_group_quant, 2, weight=True),
)


def _inputs(device: torch.device, subject: Subject, view: str, tokens: int, width: int) -> Inputs:
    rows = [VIEWS[view](device, tokens, width) for _ in range(subject.rows)]
    return (*rows, activation(device, width)) if subject.weight else tuple(rows)


def _packed(inputs: Sequence[Tensor], subject: Subject) -> Thunk:
    args, kwargs = subject.arguments(*(value.contiguous().clone() for value in inputs))
    op = library.ops()[subject.op]
    return lambda: op(*args, **kwargs)


def cases(tiny: bool = False) -> Iterator[Case]:
    width = 256 if tiny else 7168
    for subject in SUBJECTS:
        for view in VIEWS:
            for tokens in (4,) if tiny else (64, 1024, 16384):
                yield Case(
                    name=f"{subject.op}_{view}",
                    sizes={"tokens": tokens, "hidden": width},
                    inputs=partial(_inputs, subject=subject, view=view, tokens=tokens, width=width),
                    plain=subject.plain,
                    check=same,
                    op=subject.op,
                    op_args=subject.arguments,
                    moved_bytes=subject.bytes(tokens, width),
                    others={"contiguous": partial(_packed, subject=subject)},
                    targets=(Target("of_contiguous", 1 / BAR),),
                )
