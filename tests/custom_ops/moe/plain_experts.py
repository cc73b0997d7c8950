"""Experts in plain PyTorch for every format and quantization: they hold each Prepare and Finalize to its format.

They read whose rows are whose from the metadata alone, on the host, and leave NaN in every row that is nobody's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.gemm.reference import block_scaled_mm, dequantize_rows
from custom_ops.moe import reference
from custom_ops.moe.parts import Experts, Prepared
from custom_ops.moe.problem import Problem

ALIGN = 16


def contiguous(problem: Problem, prepared: Prepared) -> Tensor:
    row_experts, offsets = prepared.metadata.row_experts, prepared.metadata.offsets
    assert row_experts is not None
    assert offsets is not None
    out = _nowhere(problem, prepared.x.shape[0])
    assert not (offsets % ALIGN).any()
    for expert in range(problem.sizes.num_experts):
        rows = (row_experts == expert).nonzero().flatten()
        inside = torch.arange(int(offsets[expert]), int(offsets[expert + 1]))
        assert set(rows.tolist()) <= set(inside.tolist())
        out[rows] = _expert(problem, expert, *_take(prepared, rows))
    return out


def batched(problem: Problem, prepared: Prepared) -> Tensor:
    counts = prepared.metadata.counts
    assert counts is not None
    experts, size = prepared.x.shape[:2]
    out = _nowhere(problem, experts * size)
    for expert, count in enumerate(counts.tolist()):
        x = prepared.x[expert, :count]
        scale = None if prepared.scale is None else prepared.scale[expert, :count]
        out[expert * size : expert * size + count] = _expert(problem, expert, x, scale)
    return out.view(experts, size, -1)


def indexed(problem: Problem, prepared: Prepared) -> Tensor:
    ids, block_experts, num_padded, block_size = prepared.metadata.aligned
    sizes = problem.sizes
    out = _nowhere(problem, sizes.pairs)
    for block, expert in enumerate(block_experts.tolist()):
        assert (expert >= 0) == (block * block_size < int(num_padded))
        pairs = ids[block * block_size : (block + 1) * block_size].long()
        pairs = pairs[pairs < sizes.pairs]
        if expert >= 0:
            out[pairs] = _expert(problem, expert, *_take(prepared, pairs // sizes.top_k))
    return out


def tokens(problem: Problem, prepared: Prepared) -> Tensor:
    assert prepared.x is problem.hidden_states
    args, kwargs = problem.arguments()
    return reference.fused_moe(*args, **kwargs)


def _nowhere(problem: Problem, rows: int) -> Tensor:
    shape = rows, problem.sizes.hidden_size
    return problem.hidden_states.new_full(shape, float("nan"), dtype=problem.dtype)


def _take(prepared: Prepared, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    raw = prepared.x.view(torch.uint8) if prepared.scale is not None else prepared.x
    scale = None if prepared.scale is None else prepared.scale[rows]
    return raw[rows].view(prepared.x.dtype), scale


def _expert(problem: Problem, expert: int, x: Tensor, scale: Tensor | None) -> Tensor:
    def of(name: str) -> Tensor | None:
        tensor = getattr(problem, name)
        return None if tensor is None else tensor[expert]

    if scale is None:
        first = reference.linear(
            x,
            problem.gate_up[expert],
            of("gate_up_bias"),
            of("gate_up_scale"),
            **problem.quantization,
        )
    else:
        assert dequantize_rows(x, scale).isfinite().all()
        w_scale, bias = of("gate_up_scale"), of("gate_up_bias")
        assert w_scale is not None
        first = block_scaled_mm(x, scale, problem.gate_up[expert], w_scale, out_dtype=problem.dtype)
        first = first if bias is None else first + bias
    return reference.linear(
        problem.activation.reference(first),
        problem.down[expert],
        of("down_bias"),
        of("down_scale"),
        **problem.quantization,
    )


def _of(
    name: str, run, formats: tuple[str, str], weights: str, quantization: str | None
) -> Experts:
    return Experts(
        f"plain_{name}_{weights}",
        "plain",
        run,
        *formats,
        weights,
        quantization,
        align=lambda problem: ALIGN,
        applies_topk_weights=formats[1] == "reduced",
    )


EXPERTS = tuple(
    _of(name, run, formats, weights, quantization)
    for weights, quantization in (
        ("16_bit", None),
        ("fp8_block", "fp8_group"),
        ("int8_channel", None),
    )
    for name, run, formats in (
        ("contiguous", contiguous, ("contiguous", "contiguous")),
        ("batched", batched, ("batched", "batched")),
        ("indexed", indexed, ("indexed", "pairs")),
    )
) + tuple(
    _of("tokens", tokens, ("tokens", "reduced"), weights, None)
    for weights in ("16_bit", "fp8_block", "int8_channel")
)
