"""Quantization of weights in blocks of 128 x 128, as block-scaled FP8 checkpoints are."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.implementation import cuda, triton
from custom_ops.quantization import reference
from custom_ops.quantization.ops import DYNAMIC_KEYWORDS, check_dynamic
from custom_ops.scales import BLOCK, DEFAULT_MIN_AMAX, quant_spec


def block_quant(
    x: Tensor,
    *,
    min_amax: float = DEFAULT_MIN_AMAX,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_format: str = "float32",
    min_scale: float = 0.0,
    scale_mode: str = "divide",
    code_mode: str = "divide",
) -> tuple[Tensor, Tensor]:
    """Quantize a weight to FP8 or int8 with one scale per block of 128 x 128.

    x: bfloat16 or float16, [N, K], any strides; the blocks at the ends may be smaller. The keywords: see the
    module `custom_ops.quantization.ops`; scale_format is "float32" or "ue8m0". Returns q, of `dtype`, [N, K],
    and scale, float32, [ceil(N / 128), ceil(K / 128)], both contiguous: what `block_scaled_mm` takes.

    Every implementation equals the reference bit for bit. Raises ValueError for another dtype, number of
    dimensions or value of a keyword. Source: DeepSeek-V3 (arXiv:2412.19437, 3.3).
    """
    return torch.ops.custom_ops.block_quant(
        x,
        min_amax=min_amax,
        dtype=dtype,
        scale_format=scale_format,
        min_scale=min_scale,
        scale_mode=scale_mode,
        code_mode=code_mode,
    )


def _check(
    x: Tensor,
    *,
    min_amax: float,
    dtype: torch.dtype,
    scale_format: str,
    min_scale: float,
    scale_mode: str,
    code_mode: str,
) -> None:
    check_dynamic(
        "block_quant",
        "x",
        x,
        min_amax=min_amax,
        dtype=dtype,
        scale_format=scale_format,
        min_scale=min_scale,
        scale_mode=scale_mode,
        code_mode=code_mode,
    )
    if x.dim() != 2:
        raise ValueError(f"block_quant: x has {x.dim()} dimensions; accepted: 2")


def _empty(
    x: Tensor,
    *,
    min_amax: float,
    dtype: torch.dtype,
    scale_format: str,
    min_scale: float,
    scale_mode: str,
    code_mode: str,
) -> tuple[Tensor, Tensor]:
    return quant_spec(dtype, (BLOCK, BLOCK), scale_format).empty(x.shape, x.device)


library.define(
    block_quant,
    f"(Tensor x, *, {DYNAMIC_KEYWORDS}) -> (Tensor q, Tensor scale)",
    check=_check,
    empty=_empty,
    reference=reference.block_quant,
    implementations=(
        cuda("block_quant"),
        triton("custom_ops.quantization.block_quant_triton:block_quant"),
    ),
)
