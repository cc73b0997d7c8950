"""RMSNorm as Llama spells it, with and without the residual before it and the quantization after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import DECODE, Case, Target, activations, same
from bench.suites.quantization import FEW, FUSED, GROUP, TOKEN, Scheme

EPS = 1e-6


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight), total


def _quantized(
    *inputs: Tensor, norm: Callable[..., Any], scheme: Scheme, keep: bool
) -> tuple[Tensor, ...]:
    count = len(inputs) - len(scheme.given)
    values, given = inputs[:count], inputs[count:]
    normed, *total = (rms_norm(*values),) if norm is rms_norm else add_rms_norm(*values)
    return *scheme.plain(normed, *given), *((normed,) if keep else ()), *total


def _op_args(*inputs: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (*inputs, EPS), {}


def _shapes(norm: Callable[..., Any], tokens: int, hidden: int) -> list[tuple[int, ...]]:
    return [*[(tokens, hidden)] * (1 + (norm is add_rms_norm)), (hidden,)]


def fused(
    norm: Callable[..., Any],
    scheme: Scheme,
    tokens: int,
    hidden: int,
    *targets: Target,
    keep: bool = False,
) -> Case:
    """A norm and a scheme at one size. keep: the norm is wanted too, by an adapter or a router."""
    row = 2 * tokens * hidden
    # a second pass reads the sum that the first one wrote, or else x again
    moved = (3 if norm is add_rms_norm else 1) * row + (scheme.passes - 1) * row + 2 * hidden
    producer = norm.__name__ + "_and" * keep
    return Case(
        name=f"{producer}_{scheme.name}",
        sizes={"tokens": tokens, "hidden": hidden},
        inputs=partial(scheme.inputs, shapes=_shapes(norm, tokens, hidden)),
        plain=partial(_quantized, norm=norm, scheme=scheme, keep=keep),
        check=same,
        op=f"{producer}_{scheme.op}",
        op_args=partial(scheme.arguments, numbers=(EPS,)),
        fusion=scheme.fusion(tokens, norm.__name__),
        moved_bytes=moved + keep * row + scheme.out_bytes(tokens, hidden),
        targets=targets,
    )


def cases(tiny: bool = False) -> Iterator[Case]:
    hidden = 256 if tiny else 7168
    for norm in (rms_norm, add_rms_norm):
        adds = norm is add_rms_norm
        for tokens in (4,) if tiny else (*DECODE, 16384):
            row = 2 * tokens * hidden
            yield Case(
                name=norm.__name__,
                sizes={"tokens": tokens, "hidden": hidden},
                inputs=partial(activations, shapes=_shapes(norm, tokens, hidden)),
                plain=norm,
                check=same,
                op=norm.__name__,
                op_args=_op_args,
                fusion=norm.__name__,
                moved_bytes=(4 if adds else 2) * row + 2 * hidden,
            )
        for scheme in FUSED:
            for tokens in (4,) if tiny else (*(DECODE if scheme is GROUP else FEW), 16384):
                large, small = Target("of_copy", scheme.of_copy[1]), Target("of_inductor", 0.97)
                target = large if tokens == 16384 else small
                yield fused(norm, scheme, tokens, hidden, target)
                if scheme in (GROUP, TOKEN) and tokens in (*FEW, 16384, 4):
                    yield fused(norm, scheme, tokens, hidden, target, keep=True)
