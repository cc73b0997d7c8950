"""Experts on `torch._grouped_mm`: PyTorch's own grouped product, and an op for the activation."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import platform
from custom_ops.moe.parts import Experts, Prepared
from custom_ops.moe.problem import Problem, Sizes
from custom_ops.scales import known

FAMILY = "grouped_mm"
_ALIGNMENT_BYTES = 16


def unavailable(device: torch.device) -> str | None:
    """Why torch._grouped_mm cannot run on a device, or None."""
    if device.type == "cpu":
        return None  # every supported torch has it there, slow as it is
    capability = platform.cuda_capability(device) if device.type == "cuda" else None
    if capability is None or capability < (8, 0):
        return f"needs a GPU of compute capability 8.0 or newer, here is {capability}"
    return None


def _experts(problem: Problem, prepared: Prepared) -> Tensor:
    metadata = prepared.metadata
    assert metadata.offsets is not None
    ends = metadata.offsets[1:]
    x, bias = prepared.x, problem.gate_up_bias
    if problem.up is None:
        between = problem.activation(_product(x, problem.gate_up, bias, prepared, ends))
    else:
        biases = (None, None) if bias is None else bias.chunk(2, 1)
        pairs = zip(problem.first_weights, biases, strict=True)
        between = problem.activation.of(*(_product(x, w, b, prepared, ends) for w, b in pairs))
    return _product(between, problem.down, problem.down_bias, prepared, ends)


def _product(
    rows: Tensor, weight: Tensor, bias: Tensor | None, prepared: Prepared, ends: Tensor
) -> Tensor:
    out = torch._grouped_mm(rows, weight.transpose(-2, -1), offs=ends)
    return out if bias is None else add_bias(out, bias, prepared.metadata.row_experts)


def add_bias(out: Tensor, bias: Tensor, row_experts: Tensor | None) -> Tensor:
    """out + bias[row_experts], in place; a row of padding gets the bias of the last expert, and nobody reads it."""
    assert row_experts is not None
    return out.add_(bias[row_experts])


def _unsupported(problem: Problem) -> str | None:
    if problem.dtype != torch.bfloat16:
        return f"takes torch.bfloat16 on every device, not {problem.dtype}"
    if not problem.sizes.num_experts:
        return "there is no expert here"
    sizes = problem.sizes
    for name, size in (
        ("hidden_size", sizes.hidden_size),
        ("intermediate_size", sizes.intermediate_size),
        ("rows of gate_up", sizes.gate_up_rows),
    ):
        if not known(2 * size % _ALIGNMENT_BYTES == 0):
            return f"reads rows of a multiple of {_ALIGNMENT_BYTES} bytes, {name} is {size}"
    return misplaced(problem)


def misplaced(problem: Problem) -> str | None:
    """Why a library that reads weights by rows or by columns of 16 bytes cannot read these, or None."""
    weights = [("gate_up", problem.gate_up), ("down", problem.down), ("up", problem.up)]
    for name, weight in weights:
        if weight is None:
            continue
        step = _ALIGNMENT_BYTES // weight.element_size()
        expert, row, column = weight.stride()
        if known(column == 1) and known(row >= weight.shape[2]):
            pitch = row
        elif known(row == 1) and known(column >= weight.shape[1]):
            pitch = column
        else:
            return f"the strides of {name} are {weight.stride()}; it reads rows or columns in one piece"
        for distance in (expert, pitch, weight.storage_offset()):
            if not known(distance % step == 0):
                return f"{name} does not lie on boundaries of {_ALIGNMENT_BYTES} bytes"
    return None


def _bytes(sizes: Sizes, itemsize: int) -> int:
    rows = sizes.rows(1)
    # The second product starts when the first is gone; a bias is gathered for each row.
    width = sizes.gate_up_rows + sizes.intermediate_size
    return rows * itemsize * max(2 * width, sizes.intermediate_size + 2 * sizes.hidden_size)


GROUPED_MM = Experts(
    "grouped_mm",
    FAMILY,
    _experts,
    "contiguous",
    "contiguous",
    apart=True,
    workspace=_bytes,
    unavailable=unavailable,
    unsupported=_unsupported,
)
EXPERTS = (GROUPED_MM,)
