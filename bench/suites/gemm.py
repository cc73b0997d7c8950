"""The block-scaled FP8 product, alone and as the linear layer that quantizes its input."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import custom_ops
from bench.case import Case, Inputs, Target, Thunk, activation, close
from custom_ops.gemm.reference import BLOCK


def block_scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """Dequantize to bfloat16 and multiply, which is what a model without an FP8 kernel does."""
    wide_a = a.float() * a_scale.repeat_interleave(BLOCK, dim=-1)
    blocks = b_scale.repeat_interleave(BLOCK, dim=0).repeat_interleave(BLOCK, dim=1)
    return wide_a.to(torch.bfloat16) @ (b.float() * blocks).to(torch.bfloat16).t()


def raw_deep_gemm(inputs: Inputs) -> Thunk:
    """The library's own call on prepared operands and a preallocated result."""
    import deep_gemm

    a, a_scale, b, b_scale = inputs
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16, device=a.device)
    return lambda: deep_gemm.fp8_gemm_nt((a, a_scale), (b, b_scale), out)


def linear(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def _operands(device: torch.device, m: int, n: int, k: int) -> Inputs:
    layout = custom_ops.gemm.preferred_scale_layout(device)
    a, a_scale = custom_ops.group_quant(activation(device, m, k), BLOCK, scale_layout=layout)
    weight = activation(device, n // BLOCK, BLOCK, k // BLOCK, BLOCK).float()
    b_scale = weight.abs().amax(dim=(1, 3)) / 448.0
    b = (weight / b_scale[:, None, :, None]).to(torch.float8_e4m3fn).reshape(n, k)
    return a, a_scale, b, b_scale


@lru_cache(maxsize=1)
def _module(device: torch.device, n: int, k: int) -> nn.Module:
    import fusion_passes

    model = nn.Sequential(nn.Linear(k, n, bias=False, device=device, dtype=torch.bfloat16))
    fusion_passes.quantize_(model, "fp8_block")
    return model.eval()


def _linear_inputs(device: torch.device, m: int, n: int, k: int) -> Inputs:
    return _module(device, n, k), activation(device, m, k)


def _deep_gemm_runs() -> bool:
    return torch.cuda.is_available() and "deep_gemm" in custom_ops.ops()["block_scaled_mm"].usable(
        torch.device("cuda", torch.cuda.current_device())
    )


def cases(tiny: bool = False) -> Iterator[Case]:
    n, k = (128, 256) if tiny else (4096, 7168)
    others: dict[str, Any] = {"raw_deep_gemm": raw_deep_gemm} if _deep_gemm_runs() else {}
    for m in (4,) if tiny else (1, 16, 64, 256, 1024, 4096):
        yield Case(
            name="block_scaled_mm",
            sizes={"tokens": m, "n": n, "k": k},
            inputs=partial(_operands, m=m, n=n, k=k),
            plain=block_scaled_mm,
            check=close(1e-2),
            op="block_scaled_mm",
            op_args=lambda *operands: (operands, {}),
            moved_bytes=m * k + n * k + 2 * m * n,
            flops=2 * m * n * k,
            others=others,
            targets=(Target("of_raw_deep_gemm", 0.97),) if m == 4096 else (),
        )
    for m in (4,) if tiny else (1, 16, 64, 256, 1024, 4096):
        yield Case(
            name="block_scaled_linear",
            sizes={"tokens": m, "n": n, "k": k},
            inputs=partial(_linear_inputs, m=m, n=n, k=k),
            plain=linear,
            check=close(2e-2),
            fusion="block_scaled_linear",
            beside=("group_quant",),
            moved_bytes=2 * m * k + n * k + 2 * m * n,
            flops=2 * m * n * k,
        )
