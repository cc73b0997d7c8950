"""Experts in CUDA C++ for Hopper, `csrc/moe_grouped.cuh`, in bfloat16.

For many tokens. The kernels read rows of tokens by their index, in blocks of 8 pairs, and share a weight between up to
320 tokens of an expert; the first one applies SiLU-mul. FP8 weights with scales of blocks have kernels of another kind:
`experts_hopper_fp8`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops import platform
from custom_ops.implementation import _no_cuda
from custom_ops.moe.parts import Experts, Prepared
from custom_ops.moe.problem import Problem, Sizes
from custom_ops.platform import on_device
from custom_ops.scales import known

FAMILY = "cuda"
COLUMNS = 128  # of a tile of gate, and channels of two steps
ROWS = 8  # of a block of the index
MAX_EXPERTS = 256
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
    x = reads_by_tma(prepared.x)
    index = (aligned.sorted_ids, aligned.block_experts, aligned.num_padded)
    act = x.new_empty(aligned.sorted_ids.shape[0], sizes.intermediate_size)
    out = x.new_empty(sizes.pairs, sizes.hidden_size)
    if tracing.current() is not None:  # they are built with the library
        return out
    gate_up, down = op("moe_grouped_gate_up"), op("moe_grouped_down")
    with on_device(x):
        gate_up(x, problem.gate_up, problem.up, *index, act, sizes.top_k)
        down(act, problem.down, *index, out)
    return out


def reads_by_tma(x: Tensor) -> Tensor:
    """x, or a copy whose rows TMA can read."""
    itemsize = x.element_size()
    begins = (x.stride(0) * itemsize, x.storage_offset() * itemsize)
    if x.stride(1) == 1 and not any(distance % _ALIGNMENT_BYTES for distance in begins):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def op(name: str) -> Any:
    """An op of the library, which this builds if need be."""
    from custom_ops import library

    library.load_cuda()
    return getattr(torch.ops.custom_ops_cuda, name).default


def _unsupported(problem: Problem) -> str | None:
    num_experts = problem.sizes.num_experts
    if problem.dtype != torch.bfloat16:
        return f"writes torch.bfloat16, hidden_states are {problem.dtype}"
    if not 1 <= num_experts <= MAX_EXPERTS:
        return f"takes 1 to {MAX_EXPERTS} experts, here are {num_experts}"
    return unsupported_by_all(problem)


def unsupported_by_all(problem: Problem) -> str | None:
    """Why neither these kernels nor those in FP8 can take a problem, or None. Symbolic sizes must be known to fit."""
    sizes, activation = problem.sizes, problem.activation
    if activation.name != "silu_mul" or activation.interleaved:
        return f"applies silu_mul of halves, the activation is {activation}"
    if problem.gate_up_bias is not None or problem.down_bias is not None:
        return "adds no bias"
    for name, size in (
        ("hidden_size", sizes.hidden_size),
        ("intermediate_size", sizes.intermediate_size),
    ):
        if not known(size % COLUMNS == 0):
            return f"needs {name} a multiple of {COLUMNS}, it is {size}"
    weights = [("gate_up", problem.gate_up), ("down", problem.down), ("up", problem.up)]
    for name, weight in weights:
        if weight is None:
            continue
        if not weight.is_contiguous():
            return f"reads contiguous weights, the strides of {name} are {weight.stride()}"
        if not known(weight.storage_offset() * weight.element_size() % _ALIGNMENT_BYTES == 0):
            return f"{name} does not lie on boundaries of {_ALIGNMENT_BYTES} bytes"
        if not known(weight.shape[0] * weight.shape[1] < 2**31):
            return f"counts rows of weights in 31 bits, {name} has the shape {tuple(weight.shape)}"
    return None


def _bytes(sizes: Sizes, itemsize: int) -> int:
    act = sizes.rows(ROWS) * sizes.intermediate_size
    return itemsize * (act + (sizes.pairs + sizes.num_tokens) * sizes.hidden_size)


EXPERTS = (
    Experts(
        "hopper",
        FAMILY,
        _run,
        "indexed",
        "pairs",
        "16_bit",
        None,
        apart=True,
        align=lambda problem: ROWS,
        workspace=_bytes,
        unavailable=unavailable,
        unsupported=_unsupported,
    ),
)
