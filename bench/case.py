"""One thing to measure: inputs, the same math in plain PyTorch, our op, and what it has to move."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = tuple[Any, ...]
Thunk = Callable[[], Any]

DECODE = (1, 16, 64, 256, 1024)
"""Token counts of decoding, where launches and latency count and not bandwidth."""


class Inapplicable(Exception):
    """Raised by one of `Case.others` that does not take these sizes: there is nothing to time, and nothing failed."""


@dataclass(frozen=True)
class Target:
    """A figure that a case must reach: `ratio` is a key of `Row.ratios` (see `bench.results`)."""

    ratio: str
    at_least: float


@dataclass(frozen=True)
class Case:
    """One size of an op, a fusion or a model.

    inputs: draws the arguments of `plain` on a device.
    plain: the math in plain PyTorch; stock `torch.compile` gets it, and the plugin too.
    op, op_args: the op to call directly, and its arguments from the inputs; None for a whole model.
    fusion, beside: the fusion that this case decides about, and those that are on with it, alone. None: the
        default fusions.
    moved_bytes, flops: the least that the work can do, for fractions of bandwidth and for TFLOP/s.
    others: further baselines by name, each a function of the inputs that returns what to time.
    launched: ways that are also timed launch by launch, without a CUDA graph, as `<way>_launched`.
    check: a sentence on how a result differs from what eager returned, or None.
    facts: figures of the drawn inputs that stand beside the times, in `Row.ratios`.
    """

    name: str
    sizes: Mapping[str, int]
    inputs: Callable[[torch.device], Inputs]
    plain: Callable[..., Any]
    check: Callable[[Any, Any], str | None]
    op: str | None = None
    op_args: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    fusion: str | None = None
    beside: tuple[str, ...] = ()
    moved_bytes: int = 0
    flops: int = 0
    others: Mapping[str, Callable[[Inputs], Thunk]] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()
    launched: tuple[str, ...] = ()
    facts: Callable[..., Mapping[str, float]] | None = None

    @property
    def label(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.sizes.items())})"


def same(expected: Any, actual: Any) -> str | None:
    """The semantics of the design: equal up to the order of sums (see `fusion_passes.verify`)."""
    from fusion_passes.verify import difference

    for index, (want, got) in enumerate(zip(tensors(expected), tensors(actual), strict=True)):
        if problem := difference(want, got):
            return f"output {index}: {problem}"
    return None


def close(limit: float) -> Callable[[Any, Any], str | None]:
    """For matrix products in 8-bit floats: the norm of the difference over the norm of the result."""

    def check(expected: Any, actual: Any) -> str | None:
        for want, got in zip(tensors(expected), tensors(actual), strict=True):
            error = float((want.double() - got.double()).norm() / want.double().norm())
            if not error <= limit:
                return f"relative error {error:.3g}, accepted: {limit:g}"
        return None

    return check


def tensors(value: Any) -> Iterable[torch.Tensor]:
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


_drawn: list[torch.Tensor] = []
"""What the next calls of `activation` take their values from, one each."""


@contextlib.contextmanager
def drawn_before(values: Iterable[torch.Tensor]) -> Iterator[None]:
    """The first `activation` in here is the beginning of the first of these, if it is long enough, and so on."""
    _drawn[:] = values
    try:
        yield
    finally:
        _drawn.clear()


def activations(
    device: torch.device, shapes: Sequence[tuple[int, ...]]
) -> tuple[torch.Tensor, ...]:
    return tuple(activation(device, *shape) for shape in shapes)


def activation(device: torch.device, *shape: int) -> torch.Tensor:
    """Random bfloat16: timing on zeros flatters kernels, which draw less power on them."""
    if _drawn:
        drawn, count = _drawn.pop(0), math.prod(shape)
        if count <= drawn.numel() and drawn.device == device:
            return drawn[:count].view(shape)
    return torch.randn(*shape, device=device, dtype=torch.float32).to(torch.bfloat16)


def quantized_bytes(tokens: int, width: int) -> int:
    """FP8 codes and float32 scales of groups of 128."""
    return tokens * width + 4 * tokens * -(-width // 128)
