"""Quantization of a matrix in blocks of 128 x 128: a weight that is quantized where it is used.

float, abs, amax, clamp, div, div, clamp, cast   ->   block_quant(x)
"""

from __future__ import annotations

import torch
from torch import Tensor as T

from custom_ops.scales import BLOCK
from fusion_passes.arithmetic import MAX
from fusion_passes.fusion import Fusion, Pattern, Scalar, Tensor
from fusion_passes.passes._quantizing import FINITE_MIN_AMAX
from fusion_passes.rewriting import Rewrite

FP8 = torch.float8_e4m3fn


def _block_quant(x: T, min_amax: float) -> tuple[T, T]:
    blocks = x.float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    amax = blocks.abs().amax((1, 3), keepdim=True).clamp(min=min_amax)
    scale = amax / amax.new_full((), MAX[FP8])
    codes = (blocks / scale).clamp(-MAX[FP8], MAX[FP8]).to(FP8)
    return codes.flatten(2).flatten(0, 1), scale.squeeze((1, 3))


def _rewrite(m: Rewrite) -> tuple[object, ...]:
    assert m.match.arithmetic is not None
    keywords = {"min_amax": m.scalar("min_amax")} | m.match.arithmetic.arguments()
    return m.outputs_of(m.call("block_quant", m.tensor("x"), **keywords), 2)


FUSION = Fusion(
    name="block_quant",
    summary="quantization in blocks of 128 x 128",
    stage=3,
    priority=-1,
    patterns=(
        Pattern(
            _block_quant,
            {
                "x": Tensor(f"num_row_blocks*{BLOCK}", f"num_column_blocks*{BLOCK}"),
                "min_amax": Scalar(),
            },
            name="block_quant",
        ),
    ),
    rewrite=_rewrite,
    constraints=(FINITE_MIN_AMAX,),
    needs="block_quant",
    bytes_before=f"3*num_row_blocks*num_column_blocks*{BLOCK**2} + 4*num_row_blocks*num_column_blocks",
    bytes_after=f"3*num_row_blocks*num_column_blocks*{BLOCK**2} + 4*num_row_blocks*num_column_blocks",
)
