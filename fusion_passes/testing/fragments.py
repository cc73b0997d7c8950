"""Pieces of models as hypothesis draws them: norms, residuals, gated activations and quantized linears, in any order
and spelling that stock models have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from fusion_passes.quantize import Fp8BlockLinear

NORMS = ("llama", "gemma", "nn.RMSNorm")
WIDTHS = (128, 256, 384)
LEADING = ((1,), (2,), (7,), (1, 1), (1, 5), (3, 2), (2, 1, 3))


class LlamaNorm(nn.Module):
    """Normalized, rounded, then multiplied in the activation dtype."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter((1 + 0.1 * torch.randn(size)).to(dtype))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


class GemmaNorm(LlamaNorm):
    """Multiplied by one plus the weight in float32, then rounded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (h * (1.0 + self.weight.float())).type_as(x)


class ModelFragment(nn.Module):
    """``[residual +] [norm] -> linears``, or ``silu(gate) * up -> linear``, with block-FP8 linears.

    expected: how often each fusion must fire in it when all are on.
    """

    def __init__(
        self,
        kind: str,
        norm: str,
        residual: bool,
        linears: int,
        hidden: int,
        out: int,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.kind, self.residual = kind, residual
        makers = {"llama": LlamaNorm, "gemma": GemmaNorm}
        if kind == "norm":
            self.norm = (
                makers[norm](hidden, 1e-5, dtype)
                if norm in makers
                else nn.RMSNorm(hidden, eps=1e-5, dtype=dtype)
            )
        plain = [nn.Linear(hidden, out, bias=False, dtype=dtype) for _ in range(linears)]
        self.linears = nn.ModuleList(Fp8BlockLinear.from_linear(linear) for linear in plain)
        producer = {
            "norm": "add_rms_norm_group_quant" if residual else "rms_norm_group_quant",
            "gated": "silu_mul_group_quant",
            "plain": "group_quant",
        }[kind]
        self.expected = {"block_scaled_linear": linears, producer: 1}
        if linears > 1:
            self.expected["shared_group_quant"] = linears - 1

    def forward(self, x: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.kind == "gated":
            return tuple(linear(F.silu(x) * other) for linear in self.linears)
        if self.kind == "plain":
            return tuple(linear(x) for linear in self.linears)
        x = other + x if self.residual else x
        normed = self.norm(x)
        return (*(linear(normed) for linear in self.linears), x)


@dataclass(frozen=True)
class Drawn:
    """A fragment and inputs for it."""

    module: ModelFragment
    inputs: tuple[torch.Tensor, torch.Tensor]


@st.composite
def model_fragments(draw: st.DrawFn, device: str = "cpu") -> Drawn:
    """A :class:`ModelFragment` and two inputs ``[..., hidden]``, bfloat16 or float16."""
    dtype = draw(st.sampled_from((torch.bfloat16, torch.float16)))
    hidden, out = draw(st.sampled_from(WIDTHS)), draw(st.sampled_from((64, 128, 200, 256)))
    kind, norm = (
        draw(st.sampled_from(("norm", "norm", "gated", "plain"))),
        draw(st.sampled_from(NORMS)),
    )
    seed = draw(st.integers(0, 2**16))
    module = (
        ModelFragment(
            kind, norm, draw(st.booleans()), draw(st.integers(1, 3)), hidden, out, dtype, seed
        )
        .to(device)
        .eval()
    )
    shape = (*draw(st.sampled_from(LEADING)), hidden)
    inputs = torch.randn(shape).to(dtype).to(device), torch.randn(shape).to(dtype).to(device)
    return Drawn(module, inputs)
