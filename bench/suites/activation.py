"""SiLU of the gate times the up projection, with and without the quantization that follows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.case import DECODE, Case, Target, activations, quantized_bytes, same
from bench.suites.quantization import group_quant


def silu_mul(packed: Tensor) -> Tensor:
    gate, up = packed.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_mul_group_quant(packed: Tensor) -> tuple[Tensor, Tensor]:
    return group_quant(silu_mul(packed))


def _op_args(packed: Tensor, rest: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (*packed.chunk(2, dim=-1), *rest), {}


def cases(tiny: bool = False) -> Iterator[Case]:
    width = 256 if tiny else 2048
    for plain in (silu_mul, silu_mul_group_quant):
        quantizes = plain is silu_mul_group_quant
        for tokens in (4,) if tiny else (*DECODE, 16384):
            large = (Target("of_copy", 0.90),) if quantizes else ()
            small = (Target("of_inductor", 0.97),) if quantizes else ()
            out = quantized_bytes(tokens, width) if quantizes else 2 * tokens * width
            yield Case(
                name=plain.__name__,
                sizes={"tokens": tokens, "intermediate": width},
                inputs=partial(activations, shapes=[(tokens, 2 * width)]),
                plain=plain,
                check=same,
                op=plain.__name__,
                op_args=partial(_op_args, rest=(128,) if quantizes else ()),
                fusion=plain.__name__,
                moved_bytes=4 * tokens * width + out,
                targets=large if tokens == 16384 else small,
            )
