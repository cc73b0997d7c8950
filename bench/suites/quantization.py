"""Per-token-group quantization to FP8."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.case import DECODE, Case, Target, activations, quantized_bytes, same


def group_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """As a block-FP8 linear layer in plain PyTorch quantizes its input."""
    groups = x.float().unflatten(-1, (-1, 128))
    amax = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10)
    scale = amax / amax.new_full(
        (), 448.0
    )  # eager on a GPU multiplies by 1 / 448 for a plain number
    codes = (groups / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return codes.flatten(-2), scale.squeeze(-1)


def cases(tiny: bool = False) -> Iterator[Case]:
    hidden = 256 if tiny else 7168
    for tokens in (4,) if tiny else (*DECODE, 4096):
        large = Target("of_copy", 0.93)
        yield Case(
            name="group_quant",
            sizes={"tokens": tokens, "hidden": hidden},
            inputs=partial(activations, shapes=[(tokens, hidden)]),
            plain=group_quant,
            check=same,
            op="group_quant",
            op_args=lambda x: ((x, 128), {}),
            fusion="group_quant",
            moved_bytes=2 * tokens * hidden + quantized_bytes(tokens, hidden),
            targets=(large,) if tokens == 4096 else (Target("of_inductor", 0.97),),
        )
