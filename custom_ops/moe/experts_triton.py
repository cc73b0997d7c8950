"""Experts in Triton: the grouped kernels behind an index, and two for few pairs that need none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from custom_ops.gemm.reference import BLOCK
from custom_ops.implementation import _no_triton as unavailable
from custom_ops.moe import tiles
from custom_ops.moe.parts import Experts, Prepared
from custom_ops.moe.problem import Problem, Sizes

FAMILY = "triton"
MOST_ROWS = 64
"""Pairs that a program without an index multiplies at a time, at most."""


def _block_size(problem: Problem) -> int:
    from custom_ops.moe import triton_experts

    sizes = problem.sizes
    return triton_experts.block_size(
        sizes.num_tokens, sizes.top_k, problem.gate_up, problem.down, problem.everywhere
    )


def _grouped(problem: Problem, prepared: Prepared) -> Tensor:
    from custom_ops.moe import triton_experts

    aligned, quantized = prepared.metadata.aligned, prepared.scale is not None
    act: Any = triton_experts.gate_up(
        prepared.x,
        problem.gate_up,
        aligned,
        problem.sizes.top_k,
        activation=problem.activation,
        up=problem.up,
        bias=problem.gate_up_bias,
        x_scale=prepared.scale,
        w_scale=problem.gate_up_scale,
        quantize=quantized,
        dtype=problem.dtype,
        **problem.quantization,
    )
    codes, scale = act if quantized else (act, None)
    return triton_experts.down(
        codes,
        problem.down,
        aligned,
        problem.sizes.pairs,
        bias=problem.down_bias,
        act_scale=scale,
        w_scale=problem.down_scale,
        dtype=problem.dtype,
    )


def _direct(problem: Problem, prepared: Prepared) -> Tensor:
    from custom_ops.moe import triton_direct

    return triton_direct.experts(
        prepared.x,
        problem.gate_up,
        problem.down,
        problem.topk_ids,
        _tiles_of_few(problem),
        activation=problem.activation,
        up=problem.up,
        x_scale=prepared.scale,
        gate_up_bias=problem.gate_up_bias,
        down_bias=problem.down_bias,
        gate_up_scale=problem.gate_up_scale,
        down_scale=problem.down_scale,
        expert_map=problem.expert_map,
        dtype=problem.dtype,
        **problem.quantization,
    )


def _tiles_of_few(problem: Problem) -> tiles.Choice:
    """With blocks of so many pairs as the tables say, but a program has no more of them than there may be."""
    sizes = problem.sizes
    here = max(1, sizes.pairs * sizes.num_experts // problem.everywhere)
    shape = (sizes.num_experts, sizes.hidden_size, sizes.intermediate_size)
    chosen = tiles.choose(problem.gate_up, shape, here)
    return replace(
        chosen,
        block_size=min(chosen.block_size, MOST_ROWS),
        gate_up=replace(chosen.gate_up, roles=False),
        down=replace(chosen.down, roles=False),
    )


def _few(problem: Problem, prepared: Prepared) -> Tensor:
    from custom_ops.moe import triton_decode

    return triton_decode.moe_decode(
        prepared.x,
        problem.gate_up,
        problem.down,
        problem.topk_weights,
        problem.topk_ids,
        activation=problem.activation,
        up=problem.up,
        gate_up_bias=problem.gate_up_bias,
        down_bias=problem.down_bias,
        gate_up_scale=problem.gate_up_scale,
        down_scale=problem.down_scale,
        expert_map=problem.expert_map,
        **problem.quantization,
    )


def _too_many(problem: Problem) -> str | None:
    sizes = problem.sizes
    if not isinstance(sizes.num_tokens, int):
        return "the number of tokens is not known yet"
    from custom_ops.moe import triton_decode

    if not triton_decode.fits(sizes.num_tokens, sizes.top_k, problem.gate_up, problem.down):
        return f"its kernels are for a few pairs, here are {sizes.pairs}"
    return None


def _too_many_ids(problem: Problem) -> str | None:
    sizes = problem.sizes
    if not isinstance(sizes.num_tokens, int):
        return "the number of tokens is not known yet"
    from custom_ops.moe.triton_direct import MOST_PAIRS

    if sizes.pairs > MOST_PAIRS:
        return f"each program reads all ids, of at most {MOST_PAIRS} pairs, here are {sizes.pairs}"
    chosen = _tiles_of_few(problem)
    if chosen.gate_up.n % BLOCK and problem.weights == "fp8_block":
        return f"the tables have no tile of whole groups of {BLOCK} for it"
    return None


def _not_alike(problem: Problem) -> str | None:
    if not problem.sizes.num_experts:
        return "there is no expert here"
    strides = [weight.stride() for weight in problem.first_weights]
    if strides[0] != strides[-1]:
        return f"reads gate and up in the same strides, here are {strides[0]} and {strides[1]}"
    return None


def _grouped_bytes(sizes: Sizes, itemsize: int) -> int:
    groups = -(-sizes.intermediate_size // BLOCK)
    act = sizes.rows(128) * (sizes.intermediate_size * itemsize + 4 * groups)
    return act + sizes.pairs * sizes.hidden_size * itemsize


def _direct_bytes(sizes: Sizes, itemsize: int) -> int:
    groups = -(-sizes.intermediate_size // BLOCK)
    act = sizes.intermediate_size * itemsize + 4 * groups
    return sizes.pairs * (act + sizes.hidden_size * itemsize)


def _few_bytes(sizes: Sizes, itemsize: int) -> int:
    # Partial sums of split channels are float32.
    width = sizes.gate_up_rows + sizes.intermediate_size + sizes.hidden_size
    return 4 * sizes.pairs * width + 16 * sizes.num_tokens * sizes.hidden_size


def _experts(weights: str, quantization: str | None) -> tuple[Experts, ...]:
    suffix = "" if weights == "16_bit" else f"_{weights}"
    few = Experts(
        f"triton_decode{suffix}",
        FAMILY,
        _few,
        "tokens",
        "reduced",
        weights,
        apart=True,
        applies_topk_weights=True,
        workspace=_few_bytes,
        unavailable=unavailable,
        unsupported=lambda problem: _not_alike(problem) or _too_many(problem),
    )
    direct = Experts(
        f"triton_direct{suffix}",
        FAMILY,
        _direct,
        "tokens",
        "pairs",
        weights,
        quantization,
        apart=True,
        workspace=_direct_bytes,
        unavailable=unavailable,
        unsupported=lambda problem: _not_alike(problem) or _too_many_ids(problem),
    )
    grouped = Experts(
        f"triton{suffix}",
        FAMILY,
        _grouped,
        "indexed",
        "pairs",
        weights,
        quantization,
        apart=True,
        align=_block_size,
        workspace=_grouped_bytes,
        unavailable=unavailable,
        unsupported=_not_alike,
    )
    return few, grouped, direct


EXPERTS = (
    *_experts("16_bit", None),
    *_experts("fp8_block", "fp8_group"),
    *_experts("int8_channel", None),
)
