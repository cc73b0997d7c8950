"""Quantization to FP8 and int8 per group, per token and per tensor, alone; `Scheme` is for what it is fused with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.case import DECODE, Case, Inputs, Target, activations, same

FP8, INT8 = torch.float8_e4m3fn, torch.int8
FEW = (1, 16, 256)
"""Token counts of what is fused: fewer than DECODE, for there are many of them."""


def group_quant(x: Tensor, dtype: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    """As a block-FP8 linear layer in plain PyTorch quantizes its input."""
    most = 448.0 if dtype == FP8 else 127.0
    groups = x.float().unflatten(-1, (-1, 128))
    amax = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10)
    scale = amax / amax.new_full(
        (), most
    )  # eager on a GPU multiplies by 1 / 448 for a plain number
    codes = groups / scale
    codes = (codes if dtype == FP8 else codes.round()).clamp(-most, most).to(dtype)
    return codes.flatten(-2), scale.squeeze(-1)


def token_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """As torchao's float8 PerRow."""
    scale = (x.abs().amax(-1, keepdim=True) / 448.0).float()
    return (x.float() / scale).clamp(-448.0, 448.0).to(FP8), scale


def token_quant_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """As torchao's int8 dynamic activations, every step of which is rounded to bfloat16; its zero point is 0."""
    zero = torch.zeros(x.shape[:-1], dtype=x.dtype, device=x.device)
    low, high = torch.minimum(x.amin(-1), zero), torch.maximum(x.amax(-1), zero)
    scale = (torch.maximum(-low, high) / 127.0).float().clamp(min=1e-5).to(x.dtype).unsqueeze(-1)
    codes = (x * (1.0 / scale)).round() + zero.unsqueeze(-1)
    return codes.float().clamp(-127, 127).to(x.dtype).to(INT8), scale.float()


def tensor_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """As torchao's float8 PerTensor."""
    scale = (x.abs().amax() / 448.0).float().reshape(1)
    return (x.float() / scale).clamp(-448.0, 448.0).to(FP8), scale


def tensor_quant_static(x: Tensor, scale: Tensor) -> tuple[Tensor]:
    """With a scale that a calibration found."""
    return ((x.float() / scale).clamp(-448.0, 448.0).to(FP8),)


def block_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """As block-FP8 checkpoints are made."""
    blocks = x.float().unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    amax = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-10)
    scale = amax / amax.new_full((), 448.0)
    codes = (blocks / scale).clamp(-448.0, 448.0).to(FP8)
    return codes.flatten(2).flatten(0, 1), scale.squeeze((1, 3))


def token_quant_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """To all 256 codes of int8, with a zero point."""
    x = x.float()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / high.new_full((), 255.0)).clamp(min=1e-5)
    zero = (-128 - torch.round(low / scale)).clamp(-128, 127)
    codes = (torch.round(x / scale) + zero).clamp(-128, 127)
    return codes.to(INT8), scale, zero.to(INT8)


def tensor_quant_asymmetric(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As torchao's asymmetric int8 dynamic activations, PerTensor: a scale of 16 bits, codes by its reciprocal."""
    low, high = x.amin((0, 1), keepdim=True), x.amax((0, 1), keepdim=True)
    zeros = torch.zeros_like(low)
    low, high = torch.minimum(low, zeros), torch.maximum(high, zeros)
    scale = ((high - low) / 255.0).float().clamp(min=2.0**-23).to(x.dtype)
    zero = (-128 - torch.round(low / scale)).float().clamp(-128, 127).to(x.dtype).to(INT8)
    scale = scale.float()
    codes = (torch.round(x * (1.0 / scale)) + zero).clamp(-128, 127)
    return codes.to(INT8), scale.reshape(1), zero.reshape(1)


def tensor_quant_static_asymmetric(x: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor]:
    """As torchao's static asymmetric int8 activations."""
    return ((torch.round(x * (1.0 / scale)) + zero).clamp(-128, 127).to(INT8),)


@dataclass(frozen=True)
class Scheme:
    """A quantization: its name here, its op, it in plain PyTorch, and the arguments with which the op computes that.

    scales: bytes of the scales. passes: how often the values are read, which nothing keeps for that long.
    given: the inputs besides: a scale, and a zero point. of_copy: what it must reach of copy bandwidth, alone
    and fused.
    """

    name: str
    op: str
    plain: Callable[..., tuple[Tensor, ...]]
    scales: Callable[[int, int], int]
    rest: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    passes: int = 1
    given: tuple[Tensor, ...] = ()
    of_copy: tuple[float, float] = (0.0, 0.0)

    def inputs(self, device: torch.device, shapes: Sequence[tuple[int, ...]]) -> Inputs:
        return *activations(device, shapes), *(each.to(device) for each in self.given)

    def arguments(
        self, *inputs: Any, numbers: tuple[Any, ...] = ()
    ) -> tuple[Inputs, dict[str, Any]]:
        """Arguments of a fused op: inputs of the producer, its numbers, and the scheme's."""
        count = len(inputs) - len(self.given)
        return (*inputs[:count], *numbers, *self.rest, *inputs[count:]), dict(self.options)

    def out_bytes(self, tokens: int, width: int) -> int:
        return tokens * width + self.scales(tokens, width)

    def fusion(self, tokens: int, producer: str = "") -> str:
        """The fusion that finds it, after a producer or alone: the whole of one token is what one token has."""
        whole = self.op in ("tensor_quant", "tensor_quant_asymmetric") and tokens == 1
        op = self.op.replace("tensor", "token") if whole else self.op
        return f"{producer}_{op}" if producer else op


def _one(tokens: int, width: int) -> int:
    return 4


def _per_token(tokens: int, width: int) -> int:
    return 4 * tokens


def _per_group(tokens: int, width: int) -> int:
    return 4 * tokens * (width // 128)


_TORCHAO = {"min_amax": 0.0, "scale_mode": "divide_input"}
GROUP = Scheme("group_quant", "group_quant", group_quant, _per_group, (128,), of_copy=(0.97, 0.88))
GROUP_INT8 = Scheme(
    "group_quant_int8",
    "group_quant",
    partial(group_quant, dtype=INT8),
    _per_group,
    (128,),
    {"dtype": INT8},
    of_copy=(0.97, 0.88),
)
TOKEN = Scheme(
    "token_quant", "token_quant", token_quant, _per_token, (), _TORCHAO, of_copy=(0.95, 0.88)
)
TOKEN_INT8 = Scheme(
    "token_quant_int8",
    "token_quant",
    token_quant_int8,
    _per_token,
    (),
    {**_TORCHAO, "dtype": INT8, "min_scale": 1e-5, "code_mode": "reciprocal_input"},
    of_copy=(0.95, 0.88),
)
TENSOR = Scheme(
    "tensor_quant", "tensor_quant", tensor_quant, _one, (), _TORCHAO, passes=2, of_copy=(0.88, 0.88)
)
STATIC = Scheme(
    "tensor_quant_static",
    "tensor_quant_static",
    tensor_quant_static,
    _one,
    given=(torch.tensor([0.01]),),
    of_copy=(0.95, 0.88),
)
ASYMMETRIC = Scheme(
    "token_quant_asymmetric",
    "token_quant_asymmetric",
    token_quant_asymmetric,
    lambda tokens, width: 5 * tokens,
    options={"min_scale": 1e-5},
    of_copy=(0.88, 0.88),
)
TENSOR_ASYMMETRIC = Scheme(
    "tensor_quant_asymmetric",
    "tensor_quant_asymmetric",
    tensor_quant_asymmetric,
    lambda tokens, width: 5,
    options={"min_scale": 2.0**-23, "scale_mode": "divide_input", "code_mode": "reciprocal"},
    passes=2,
    of_copy=(0.88, 0.88),
)
STATIC_ASYMMETRIC = Scheme(
    "tensor_quant_static_asymmetric",
    "tensor_quant_static_asymmetric",
    tensor_quant_static_asymmetric,
    lambda tokens, width: 5,
    options={"code_mode": "reciprocal"},
    given=(torch.tensor([0.01]), torch.tensor([-7], dtype=INT8)),
    of_copy=(0.95, 0.88),
)
ZERO_POINTS = (ASYMMETRIC, TENSOR_ASYMMETRIC, STATIC_ASYMMETRIC)
SCHEMES = (GROUP, GROUP_INT8, TOKEN, TOKEN_INT8, TENSOR, STATIC, *ZERO_POINTS)
FUSED = (GROUP, TOKEN, TOKEN_INT8, TENSOR, STATIC, *ZERO_POINTS)


def case(scheme: Scheme, tokens: int, width: int, *targets: Target) -> Case:
    """A scheme alone at one size."""
    return Case(
        name=scheme.name,
        sizes={"tokens": tokens, "hidden": width},
        inputs=partial(scheme.inputs, shapes=[(tokens, width)]),
        plain=scheme.plain,
        check=same,
        op=scheme.op,
        op_args=scheme.arguments,
        fusion=scheme.fusion(tokens),
        moved_bytes=2 * scheme.passes * tokens * width + scheme.out_bytes(tokens, width),
        targets=targets,
    )


def cases(tiny: bool = False) -> Iterator[Case]:
    hidden = 256 if tiny else 7168
    for scheme in SCHEMES:
        usual = (*FEW, 16384) if scheme in ZERO_POINTS else (*DECODE, 4096, 16384)
        for tokens in (4,) if tiny else usual:
            large = Target("of_copy", scheme.of_copy[0])
            small = Target("of_inductor", 0.97)
            yield case(scheme, tokens, hidden, large if tokens == 16384 else small)
    rows = 256 if tiny else 7168
    yield Case(
        name="block_quant",
        sizes={"rows": rows, "hidden": hidden},
        inputs=partial(activations, shapes=[(rows, hidden)]),
        plain=block_quant,
        check=same,
        op="block_quant",
        op_args=lambda x: ((x,), {}),
        fusion="block_quant",
        moved_bytes=3 * rows * hidden,
    )
