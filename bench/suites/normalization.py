"""RMSNorm as Llama spells it, with and without the residual before it and the quantization after it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import DECODE, Case, Target, activations, quantized_bytes, same
from bench.suites.quantization import group_quant

EPS = 1e-6


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight), total


def rms_norm_group_quant(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return group_quant(rms_norm(x, weight))


def add_rms_norm_group_quant(
    x: Tensor, residual: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    normed, total = add_rms_norm(x, residual, weight)
    return *group_quant(normed), total


def _op_args(*inputs: Tensor, quantizes: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (*inputs, EPS, *((128,) if quantizes else ())), {}


def cases(tiny: bool = False) -> Iterator[Case]:
    hidden = 256 if tiny else 7168
    for plain in (rms_norm, add_rms_norm, rms_norm_group_quant, add_rms_norm_group_quant):
        adds = plain in (add_rms_norm, add_rms_norm_group_quant)
        quantizes = plain in (rms_norm_group_quant, add_rms_norm_group_quant)
        must_win = plain is add_rms_norm_group_quant
        for tokens in (4,) if tiny else (*DECODE, 16384):
            large = (Target("of_copy", 0.90),) if must_win else ()
            small = (Target("of_inductor", 0.97),) if must_win else ()
            row = 2 * tokens * hidden
            out = quantized_bytes(tokens, hidden) if quantizes else row

            yield Case(
                name=plain.__name__,
                sizes={"tokens": tokens, "hidden": hidden},
                inputs=partial(activations, shapes=[*[(tokens, hidden)] * (1 + adds), (hidden,)]),
                plain=plain,
                check=same,
                op=plain.__name__,
                op_args=partial(_op_args, quantizes=quantizes),
                fusion=plain.__name__,
                moved_bytes=(3 * row if adds else row) + 2 * hidden + out,
                targets=large if tokens == 16384 else small,
            )
