"""Linears whose weights are codes and scales, as plain PyTorch that any backend runs and this one fuses."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from fusion_passes.coded import Coded, straight_through

__all__ = [
    "BLOCK",
    "Fp8BlockLinear",
    "Fp8TokenLinear",
    "Int8TokenLinear",
    "TokenLinear",
    "check_dtype",
    "dequantize_weight",
    "quantize_weight",
]

BLOCK = 128


class Fp8BlockLinear(Coded, nn.Linear):
    """A linear with block-scaled FP8 weights and activations quantized on the fly, in plain PyTorch.

    The tensors are those of DeepSeek-V3 and Qwen3-FP8 checkpoints: ``weight`` float8_e4m3fn [out_features,
    in_features], ``weight_scale_inv`` float32 [ceil(out_features / 128), ceil(in_features / 128)] (the factor that
    *dequantizes*, despite its name), ``bias`` in the activation dtype or None. Activations get one float32 scale
    per token and 128 channels. The result is what eager PyTorch computes from these words: operands dequantized,
    rounded to the activation dtype, multiplied.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        # a torch.nn.Linear to libraries that look for one, such as PEFT, which makes its adapters in compute_dtype
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = dtype
        self.weight: torch.Tensor
        self.weight_scale_inv: torch.Tensor
        self.bias: torch.Tensor | None  # type: ignore[assignment]
        blocks = (-(-out_features // BLOCK), -(-in_features // BLOCK))
        self.register_buffer(
            "weight",
            torch.zeros(out_features, in_features, dtype=torch.float8_e4m3fn, device=device),
        )
        self.register_buffer(
            "weight_scale_inv", torch.ones(blocks, dtype=torch.float32, device=device)
        )
        self.register_buffer(
            "bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Fp8BlockLinear:
        weight = linear.weight.detach()
        new = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            weight.device,
            weight.dtype,
        )
        new.weight, new.weight_scale_inv = quantize_weight(weight)
        if linear.bias is not None:
            new.bias = linear.bias.detach().clone()
        return new

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_input(self, x)
        rounded = straight_through(self._round_trip, x)
        weight = dequantize_weight(self.weight, self.weight_scale_inv, x.dtype)
        return F.linear(rounded, weight, self.bias)

    def _round_trip(self, x: torch.Tensor) -> torch.Tensor:
        padding = -self.in_features % BLOCK
        groups = F.pad(x, (0, padding)) if padding else x
        groups = groups.float().unflatten(-1, (-1, BLOCK))
        # literals, as torch.compile(dynamic=True) takes a float that has a name for a value that may change; 448 as
        # a tensor, as eager on a GPU divides by a number as it multiplies by the rounded reciprocal
        amax = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10)
        scale = amax / amax.new_full((), 448.0)
        codes = (groups / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        dequantized = (codes.float() * scale).flatten(-2).to(x.dtype)
        # contiguous: of what is no view of rows, a matmul is a product for each of the leading dimensions
        return dequantized[..., : self.in_features].contiguous() if padding else dequantized

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, float8_e4m3fn, {BLOCK} x {BLOCK} blocks"


def _check_input(linear: nn.Linear, x: torch.Tensor) -> None:
    if x.dtype in (torch.float8_e4m3fn, torch.int8):
        raise ValueError(
            f"{type(linear).__name__}: x is {x.dtype}; accepted: 16 bits or more. A model that casts x "
            "to the dtype of this linear's weight has to keep the linear: quantize_ without a filter does"
        )
    # the product would say so, too; before the groups, as dynamic=True then knows how many there are
    if x.shape[-1] != linear.in_features:
        raise ValueError(
            f"{type(linear).__name__}: x is {tuple(x.shape)}; accepted: [..., {linear.in_features}]"
        )


class TokenLinear(Coded, nn.Linear):
    """What Fp8TokenLinear and Int8TokenLinear share: everything but their codes."""

    code_dtype: ClassVar[torch.dtype]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        # a torch.nn.Linear to libraries that look for one, such as PEFT, which makes its adapters in compute_dtype
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = dtype
        self.weight: torch.Tensor
        self.weight_scale: torch.Tensor
        self.bias: torch.Tensor | None  # type: ignore[assignment]
        codes = torch.zeros(out_features, in_features, dtype=self.code_dtype, device=device)
        self.register_buffer("weight", codes)
        self.register_buffer(
            "weight_scale", torch.ones(out_features, 1, dtype=torch.float32, device=device)
        )
        self.register_buffer(
            "bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        )

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> TokenLinear:
        weight = linear.weight.detach()
        biased = linear.bias is not None
        new = cls(linear.in_features, linear.out_features, biased, weight.device, weight.dtype)
        new.weight, new.weight_scale = cls.quantize(weight)
        if biased:
            new.bias = linear.bias.detach().clone()
        return new

    @staticmethod
    def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., features] -> codes [..., features] and a float32 scale [..., 1]."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_input(self, x)
        rounded = straight_through(self._round_trip, x)
        weight = (self.weight.float() * self.weight_scale).to(x.dtype)
        return F.linear(rounded, weight, self.bias)

    def _round_trip(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = self.quantize(x)
        return (codes.float() * scale).to(x.dtype)

    def extra_repr(self) -> str:
        codes = str(self.code_dtype).removeprefix("torch.")
        return f"{self.in_features} -> {self.out_features}, {codes}, per token x per channel"


class Fp8TokenLinear(TokenLinear):
    """A linear with float8_e4m3fn codes, one scale per output channel of its weight and one per token of its input.

    In plain PyTorch: operands dequantized, rounded to the activation dtype, multiplied. The tensors are those of
    compressed-tensors checkpoints: ``weight`` [out_features, in_features], ``weight_scale`` float32 [out_features, 1],
    ``bias`` in the activation dtype or None.
    """

    code_dtype = torch.float8_e4m3fn

    @staticmethod
    def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # literals, and 448 as a tensor: see Fp8BlockLinear.forward
        values = rows.float()
        amax = values.abs().amax(-1, keepdim=True).clamp(min=1e-10)
        scale = amax / amax.new_full((), 448.0)
        return (values / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale


class Int8TokenLinear(TokenLinear):
    """As :class:`Fp8TokenLinear`, with int8 codes from -127 to 127."""

    code_dtype = torch.int8

    @staticmethod
    def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = rows.float()
        amax = values.abs().amax(-1, keepdim=True).clamp(min=1e-10)
        scale = amax / amax.new_full((), 127.0)
        return (values / scale).round().clamp(-127.0, 127.0).to(torch.int8), scale


def dequantize_weight(
    weight: torch.Tensor, weight_scale_inv: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """[out, in] float8 and [ceil(out / 128), ceil(in / 128)] float32 -> [out, in] ``dtype``, rounded once."""
    rows, columns = weight.shape
    blocks = weight_scale_inv.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[
        :, :columns
    ]
    return (weight.float() * blocks).to(dtype)


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[out, in] -> float8_e4m3fn [out, in] and one float32 scale per 128 x 128 block (the last ones may be cut)."""
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [R, 128, C, 128]
    amax = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-10)
    scale = amax / amax.new_full((), 448.0)
    codes = (blocks / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    codes = codes.reshape(padded.shape)[:rows, :columns]
    return codes.contiguous(), scale[:, 0, :, 0].contiguous()


def check_dtype(name: str, weight: torch.Tensor) -> None:
    """Raises ValueError unless a weight is in one of the dtypes that are quantized."""
    if weight.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"{name} is {weight.dtype}; accepted: torch.bfloat16, torch.float16")
