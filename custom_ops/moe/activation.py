"""The activations of experts: what stands between the two grouped GEMMs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from custom_ops.activation import reference
from custom_ops.quantization.checks import check_bound, check_choice

NAMES = ("silu_mul", "gelu_tanh_mul", "clamped_swiglu", "clamped_silu_mul", "relu2")


@dataclass(frozen=True)
class Activation:
    """What an expert does between its two products, on a tensor of dtype T: bfloat16 or float16.

    name: "silu_mul", "gelu_tanh_mul" and "clamped_swiglu" take [..., 2 * I] and return [..., I], with the roundings of
    the ops of those names. So does "clamped_silu_mul", which is silu_mul of gate.clamp(max=limit) and
    up.clamp(-limit, limit), as in DeepSeek-V4 and GLM-5-Next. "relu2" takes and returns [..., I]: T(max(x, 0) ** 2).

    interleaved: gate and up are the even and the odd channels, as in gpt-oss, and not the first and the second half.
    alpha: of clamped_swiglu alone. limit: of the two that clamp; it is rounded to T, and a NaN stays one.
    """

    name: str = "silu_mul"
    interleaved: bool = False
    alpha: float = 1.702
    limit: float = 7.0

    @property
    def gated(self) -> bool:
        """Whether its input is twice as wide as its output."""
        return self.name != "relu2"

    def width(self, rows: int) -> int:
        """I, from the number of output channels of the first product."""
        return rows // 2 if self.gated else rows

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up of [..., 2 * I], as views."""
        if self.interleaved:
            return x[..., ::2], x[..., 1::2]
        half = x.shape[-1] // 2
        return x[..., :half], x[..., half:]

    def reference(self, x: Tensor) -> Tensor:
        """[..., 2 * I] or, for relu2, [..., I] -> [..., I], contiguous, as eager PyTorch rounds."""
        if not self.gated:
            return torch.relu(x).square()
        gate, up = self.halves(x)
        if self.name == "clamped_swiglu":
            return reference.clamped_swiglu(gate, up, self.alpha, self.limit)
        if self.name == "clamped_silu_mul":
            return reference.silu_mul(*self._clamped(gate, up))
        return {"silu_mul": reference.silu_mul, "gelu_tanh_mul": reference.gelu_tanh_mul}[
            self.name
        ](gate, up)

    def __call__(self, x: Tensor) -> Tensor:
        """As `reference`, by the fastest op there is for the device."""
        return self.of(*self.halves(x)) if self.gated else torch.relu(x).square()

    def of(self, gate: Tensor, up: Tensor) -> Tensor:
        """The same for gate and up [..., I], in any strides."""
        ops = torch.ops.custom_ops
        if self.name == "clamped_swiglu":
            return ops.clamped_swiglu(gate, up, self.alpha, self.limit)
        if self.name == "clamped_silu_mul":
            return ops.silu_mul(*self._clamped(gate, up))
        return (ops.silu_mul if self.name == "silu_mul" else ops.gelu_tanh_mul)(gate, up)

    def _clamped(self, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)


def check(op: str, name: str, interleaved: bool, alpha: float, limit: float) -> None:
    """The arguments `activation`, `interleaved`, `alpha` and `limit` of an op."""
    check_choice(op, "activation", name, NAMES)
    if interleaved and name == "relu2":
        raise ValueError(
            f"{op}: interleaved is True; accepted for 'relu2', which has no gate: False"
        )
    if not (isinstance(alpha, torch.SymFloat) or math.isfinite(alpha)):
        raise ValueError(f"{op}: alpha is {alpha}; accepted: a finite number")
    check_bound(op, "limit", limit)
