"""Experts in CUDA C++ for Hopper, `csrc/moe_grouped.cuh`: bfloat16, and FP8 weights with scales of blocks.

For many tokens. The kernels read rows of tokens by their index, in blocks of 8 pairs, and share a weight between up to
320 tokens of an expert; the first one applies SiLU-mul and quantizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops import platform
from custom_ops.gemm.reference import BLOCK
from custom_ops.implementation import _no_cuda
from custom_ops.moe.parts import Experts, Prepared
from custom_ops.moe.problem import Problem, Sizes
from custom_ops.platform import on_device
from custom_ops.scales import known

FAMILY = "cuda"
ROWS = 8  # of a block of the index
MAX_EXPERTS = 256
LEAST_AMAX = 2.0**-60  # below, a quotient by a scale would not be exact
_ALIGNMENT_BYTES = 16  # TMA


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None."""
    if reason := _no_cuda(device):
        return reason
    capability = platform.cuda_capability(device)
    return None if capability == (9, 0) else f"needs compute capability 9.0, here is {capability}"


def _run(problem: Problem, prepared: Prepared) -> Tensor:
    from custom_ops.jit import tracing

    aligned, sizes = prepared.metadata.aligned, problem.sizes
    x, scale = _by_rows(prepared.x), prepared.scale
    index = (aligned.sorted_ids, aligned.block_experts, aligned.num_padded)
    rows = aligned.sorted_ids.shape[0]
    act = x.new_empty(rows, sizes.intermediate_size)
    act_scale = None
    if scale is not None:  # those of a group lie side by side
        act_scale = scale.new_empty(sizes.intermediate_size // BLOCK, rows)
    out = x.new_empty(sizes.pairs, sizes.hidden_size, dtype=problem.dtype)
    if tracing.current() is not None:  # they are built with the library
        return out
    gate_up, down = _op("moe_grouped_gate_up"), _op("moe_grouped_down")
    with on_device(x):
        first = (x, scale, problem.gate_up, _packed(problem.gate_up_scale))
        gate_up(*first, *index, act, act_scale, sizes.top_k, problem.min_amax)
        codes_scale = None if act_scale is None else act_scale.t()
        down(act, codes_scale, problem.down, _packed(problem.down_scale), *index, out)
    return out


def _by_rows(x: Tensor) -> Tensor:
    """x, or a copy whose rows TMA can read."""
    itemsize = x.element_size()
    begins = (x.stride(0) * itemsize, x.storage_offset() * itemsize)
    if x.stride(1) == 1 and not any(distance % _ALIGNMENT_BYTES for distance in begins):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _packed(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.contiguous()


def _op(name: str) -> Any:
    from custom_ops import library

    library.load_cuda()
    return getattr(torch.ops.custom_ops_cuda, name).default


def _unsupported(problem: Problem) -> str | None:
    sizes, activation = problem.sizes, problem.activation
    if problem.dtype != torch.bfloat16:
        return f"writes torch.bfloat16, hidden_states are {problem.dtype}"
    if not 1 <= sizes.num_experts <= MAX_EXPERTS:
        return f"takes 1 to {MAX_EXPERTS} experts, here are {sizes.num_experts}"
    if activation.name != "silu_mul" or activation.interleaved:
        return f"applies silu_mul of halves, the activation is {activation}"
    if problem.gate_up_bias is not None or problem.down_bias is not None:
        return "adds no bias"
    for name, size in (
        ("hidden_size", sizes.hidden_size),
        ("intermediate_size", sizes.intermediate_size),
    ):
        if not known(size % BLOCK == 0):
            return f"needs {name} a multiple of {BLOCK}, it is {size}"
    for name, weight in (("gate_up", problem.gate_up), ("down", problem.down)):
        if not weight.is_contiguous():
            return f"reads contiguous weights, the strides of {name} are {weight.stride()}"
        if not known(weight.storage_offset() * weight.element_size() % _ALIGNMENT_BYTES == 0):
            return f"{name} does not lie on boundaries of {_ALIGNMENT_BYTES} bytes"
        if not known(weight.shape[0] * weight.shape[1] < 2**31):
            return f"counts rows of weights in 31 bits, {name} has the shape {tuple(weight.shape)}"
    if problem.weights == "fp8_block":
        usual = (problem.scale_mode, problem.code_mode) == ("divide", "divide")
        if not usual or problem.min_amax < LEAST_AMAX:
            return f"quantizes by division with min_amax >= 2^-60, asked for are {problem.quantization}"
    return None


def _bytes(sizes: Sizes, itemsize: int) -> int:
    groups = -(-sizes.intermediate_size // BLOCK)
    act = sizes.rows(ROWS) * (sizes.intermediate_size * itemsize + 4 * groups)
    return (
        act
        + sizes.pairs * sizes.hidden_size * itemsize
        + sizes.num_tokens * sizes.hidden_size * itemsize
    )


def _experts(weights: str, quantization: str | None) -> Experts:
    return Experts(
        "hopper" if weights == "16_bit" else f"hopper_{weights}",
        FAMILY,
        _run,
        "indexed",
        "pairs",
        weights,
        quantization,
        align=lambda problem: ROWS,
        workspace=_bytes,
        unavailable=unavailable,
        unsupported=_unsupported,
    )


EXPERTS = (_experts("16_bit", None), _experts("fp8_block", "fp8_group"))
