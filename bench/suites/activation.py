"""Gated activations of MLPs, with and without the quantization that follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import DECODE, Case, Target, activations, same
from bench.suites.quantization import FEW, FUSED, GROUP, Scheme

ALPHA, LIMIT = 1.702, 7.0


def silu_mul(packed: Tensor) -> Tensor:
    gate, up = packed.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_tanh_mul(packed: Tensor) -> Tensor:
    gate, up = packed.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def clamped_swiglu(packed: Tensor) -> Tensor:
    """As the experts of gpt-oss compute it, whose gate and up are interleaved."""
    gate, up = packed[..., ::2], packed[..., 1::2]
    gate, up = gate.clamp(min=None, max=LIMIT), up.clamp(min=-LIMIT, max=LIMIT)
    return (up + 1) * (gate * torch.sigmoid(gate * ALPHA))


@dataclass(frozen=True)
class Gate:
    """An activation: it in plain PyTorch, whether its halves are interleaved, its numbers."""

    plain: Callable[[Tensor], Tensor]
    interleaved: bool = False
    numbers: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        return self.plain.__name__

    def halves(self, packed: Tensor) -> tuple[Tensor, ...]:
        return (packed[..., ::2], packed[..., 1::2]) if self.interleaved else packed.chunk(2, -1)

    def arguments(self, packed: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (*self.halves(packed), *self.numbers), {}

    def fused_arguments(
        self, packed: Tensor, *given: Tensor, scheme: Scheme
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return scheme.arguments(*self.halves(packed), *given, numbers=self.numbers)


GATES = (Gate(silu_mul), Gate(gelu_tanh_mul), Gate(clamped_swiglu, True, (ALPHA, LIMIT)))


def _quantized(packed: Tensor, *given: Tensor, gate: Gate, scheme: Scheme) -> tuple[Tensor, ...]:
    return scheme.plain(gate.plain(packed), *given)


def silu_mul_group_quant_masked(gate_up: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    """What plain PyTorch has to do: every row of every expert, for the counts are on the device."""
    return GROUP.plain(silu_mul(gate_up))


def _masked_inputs(device: torch.device, shape: tuple[int, ...], count: int) -> tuple[Tensor, ...]:
    counts = torch.full(shape[:1], count, dtype=torch.int32, device=device)
    return *activations(device, [shape]), counts


def _valid_rows(expected: Any, actual: Any, count: int) -> str | None:
    return same(*([t[:, :count] for t in tensors] for tensors in (expected, actual)))


def masked(tiny: bool) -> Iterator[Case]:
    """32 experts with room for 1024 tokens each, as one GPU of expert parallelism has them."""
    experts, room, width = (2, 4, 256) if tiny else (32, 1024, 2048)
    for count in (2,) if tiny else (8, 128, 1024):
        yield Case(
            name="silu_mul_group_quant_masked",
            sizes={"experts": experts, "room": room, "tokens": count, "intermediate": width},
            inputs=partial(_masked_inputs, shape=(experts, room, 2 * width), count=count),
            plain=silu_mul_group_quant_masked,
            check=partial(_valid_rows, count=count),
            op="silu_mul_group_quant_masked",
            op_args=lambda gate_up, counts: ((gate_up, counts, 128), {}),
            moved_bytes=experts * count * (4 * width + width + 4 * (width // 128)),
        )


def fused(gate: Gate, scheme: Scheme, tokens: int, width: int, *targets: Target) -> Case:
    """A gate and a scheme at one size."""
    # what a second pass reads, the first one wrote: that is no more than to read the halves again
    moved = 4 * scheme.passes * tokens * width
    return Case(
        name=f"{gate.name}_{scheme.name}",
        sizes={"tokens": tokens, "intermediate": width},
        inputs=partial(scheme.inputs, shapes=[(tokens, 2 * width)]),
        plain=partial(_quantized, gate=gate, scheme=scheme),
        check=same,
        op=f"{gate.name}_{scheme.op}",
        op_args=partial(gate.fused_arguments, scheme=scheme),
        fusion=scheme.fusion(tokens, gate.name),
        moved_bytes=moved + scheme.out_bytes(tokens, width),
        targets=targets,
    )


def alone(gate: Gate, tokens: int, width: int) -> Case:
    """A gate at one size, with nothing behind it."""
    return Case(
        name=gate.name,
        sizes={"tokens": tokens, "intermediate": width},
        inputs=partial(activations, shapes=[(tokens, 2 * width)]),
        plain=gate.plain,
        check=same,
        op=gate.name,
        op_args=gate.arguments,
        fusion=gate.name,
        moved_bytes=6 * tokens * width,
    )


def cases(tiny: bool = False) -> Iterator[Case]:
    width = 256 if tiny else 2048
    yield from masked(tiny)
    for gate in GATES:
        for tokens in (4,) if tiny else (*(DECODE if gate.plain is silu_mul else FEW), 16384):
            yield alone(gate, tokens, width)
        for scheme in FUSED:
            all_of_them = gate.plain is silu_mul and scheme is GROUP
            for tokens in (4,) if tiny else (*(DECODE if all_of_them else FEW), 16384):
                large, small = Target("of_copy", scheme.of_copy[1]), Target("of_inductor", 0.97)
                yield fused(gate, scheme, tokens, width, large if tokens == 16384 else small)
