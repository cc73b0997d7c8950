"""Experts in CUDA C++ for Hopper, `csrc/moe_fp8.cuh`, in FP8 with scales of 128 x 128 blocks.

For where an expert has few blocks of pairs: a block that is at most half full is shared by all warps that multiply,
which the kernels of `gluon_experts` cannot do. The results are those of `triton_experts` in blocks of 128 pairs, to the
bit; where Triton takes smaller blocks, it multiplies those that are half full by other instructions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.gemm.reference import BLOCK
from custom_ops.moe.experts_hopper import (
    FAMILY,
    op,
    reads_by_tma,
    unavailable,
    unsupported_by_all,
)
from custom_ops.moe.parts import Experts, Prepared
from custom_ops.moe.problem import FP8, Problem, Sizes
from custom_ops.moe.tiles import Aligned
from custom_ops.platform import on_device

ROWS = 128  # of a block of the index
LEAST_AMAX = 2.0**-60  # which makes no scale subnormal
MOST_AMAX = 2.0**60
# Blocks of pairs that run together through all columns, so that each column is read once for them. Where L2 has all of
# an expert's weight one is best: DeepSeek-V3's gate_up (29 MB) at 4096 tokens on an H100 took 419, 432, 438, 447 and
# 470 us for 1, 2, 4, 8 and 16, Mixtral's (117 MB) 2697, 1892, 1727, 1676 and 1660.
BAND = 8
IN_L2 = 64 * 2**20  # bytes; Mixtral's down has 59 MB, and took 840 to 862 us


def best_band(weight: Tensor) -> int:
    return 1 if weight.shape[1] * weight.shape[2] <= IN_L2 else BAND


def counters(aligned: Aligned) -> Tensor:
    """What both products count in: the tiles that were taken of each, and what of each block gate_up is done with."""
    return aligned.num_padded.new_zeros(2 + aligned.block_experts.shape[0])


def gate_up(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    aligned: Aligned,
    counted: Tensor,
    *,
    top_k: int,
    min_amax: float,
    band: int | None = None,
) -> tuple[Tensor, Tensor]:
    """SiLU-mul of the first product, quantized: codes [P, I] and scales [P, I / 128], by row of the index.

    x: float8_e4m3fn [T, H] with rows that begin on 16 bytes; x_scale: float32 [T, H / 128] in any strides. weight:
    float8_e4m3fn [E, 2 * I, H], contiguous, gates first; weight_scale: float32 [E, 2 * I / 128, H / 128]. counted:
    what `counters` returned. band: blocks of pairs that run together through all columns.
    """
    padded, width = aligned.sorted_ids.shape[0], weight.shape[1] // 2
    act = x.new_empty((padded, width), dtype=FP8)
    act_scale = x.new_empty((padded, width // BLOCK), dtype=torch.float32)
    op("moe_fp8_gate_up")(
        x, x_scale, weight, weight_scale, *aligned[:3], counted[:1], counted[2:], act, act_scale, top_k, min_amax,
        band or best_band(weight),
    )  # fmt: skip
    return act, act_scale


def down(
    act: Tensor,
    act_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    aligned: Aligned,
    counted: Tensor,
    num_pairs: int,
    *,
    band: int | None = None,
) -> Tensor:
    """The second product, bfloat16 [num_pairs, H], of what `gate_up` returned; weight: [E, H, I]. See there.

    It begins where no tile of gate_up is left, while others still run, and waits for the rows of each block.
    """
    out = act.new_empty((num_pairs, weight.shape[1]), dtype=torch.bfloat16)
    op("moe_fp8_down")(
        act, act_scale, weight, weight_scale, *aligned[:3], counted[1:2], counted[2:], out,
        band or best_band(weight),
    )  # fmt: skip
    return out


def _run(problem: Problem, prepared: Prepared) -> Tensor:
    from custom_ops.jit import tracing

    assert prepared.scale is not None
    assert problem.gate_up_scale is not None
    assert problem.down_scale is not None
    aligned, sizes = prepared.metadata.aligned, problem.sizes
    if tracing.current() is not None:  # they are built with the library
        return prepared.x.new_empty((sizes.pairs, sizes.hidden_size), dtype=problem.dtype)
    with on_device(prepared.x):
        counted = counters(aligned)
        act, act_scale = gate_up(
            reads_by_tma(prepared.x),
            prepared.scale,
            problem.gate_up,
            problem.gate_up_scale,
            aligned,
            counted,
            top_k=sizes.top_k,
            min_amax=problem.min_amax,
        )
        return down(act, act_scale, problem.down, problem.down_scale, aligned, counted, sizes.pairs)


def _unsupported(problem: Problem) -> str | None:
    if problem.dtype != torch.bfloat16:
        return f"writes torch.bfloat16, the result is {problem.dtype}"
    if not problem.sizes.num_experts:
        return "there is no expert here"
    if (problem.scale_mode, problem.code_mode) != ("divide", "divide"):
        return f"quantizes by division, not by {problem.scale_mode} and {problem.code_mode}"
    if not LEAST_AMAX <= problem.min_amax <= MOST_AMAX:
        return f"needs min_amax of 2^-60 to 2^60, it is {problem.min_amax:g}"
    return unsupported_by_all(problem)


def _bytes(sizes: Sizes, itemsize: int) -> int:
    act = sizes.rows(ROWS) * (sizes.intermediate_size + 4 * -(-sizes.intermediate_size // BLOCK))
    return act + sizes.num_tokens * sizes.hidden_size + itemsize * sizes.pairs * sizes.hidden_size


EXPERTS = (
    Experts(
        "hopper_fp8_block",
        FAMILY,
        _run,
        "indexed",
        "pairs",
        "fp8_block",
        "fp8_group",
        align=lambda problem: ROWS,
        workspace=_bytes,
        unavailable=unavailable,
        unsupported=_unsupported,
    ),
)
