"""Prepare: tokens into the format that experts take, quantized where they take codes."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.gemm.reference import BLOCK
from custom_ops.moe.parts import Experts, ExpertTokensMetadata, Prepare, Prepared, count_tokens
from custom_ops.moe.problem import Problem, Sizes
from custom_ops.moe.reference import local_experts
from custom_ops.moe.tiles import Aligned
from custom_ops.scales import empty_scale, known, pitch_of, quant_spec

_INT, _FLOAT = 4, 4
SORTED_BY_ONE = 512  # pairs, up to which one block of threads sorts them all


def _as_is(problem: Problem, experts: Experts) -> Prepared:
    return Prepared(problem.hidden_states, None, ExpertTokensMetadata())


def _index(problem: Problem, experts: Experts) -> Prepared:
    return Prepared(problem.hidden_states, None, _aligned(problem, experts))


def _index_quantized(problem: Problem, experts: Experts) -> Prepared:
    if _beside_each_other(problem, experts):
        from custom_ops.moe.experts_hopper import op

        block_size = experts.align(problem)
        x, scale, sorted_ids, block_experts, num_padded = op("moe_align_group_quant")(
            problem.hidden_states,
            problem.topk_ids,
            block_size,
            problem.sizes.num_experts,
            BLOCK,
            expert_map=problem.expert_map,
            **problem.quantization,
        )
        aligned = Aligned(sorted_ids, block_experts, num_padded, block_size)
        return Prepared(x, scale, ExpertTokensMetadata(aligned=aligned))
    x, scale = _codes(problem)
    return Prepared(x, scale, _aligned(problem, experts))


def _beside_each_other(problem: Problem, experts: Experts) -> bool:
    """Whether sorting pairs and quantizing tokens are both for CUDA C++, where a GPU does them at the same time.

    A Qwen3-30B-A3B block on an H100 then takes 477 microseconds of 483 for 4096 tokens and 244 of 247 for 512, but 223
    of 222 for 64, whose pairs one block of threads sorts.
    """
    from custom_ops.jit import tracing

    x, hidden = problem.hidden_states, problem.sizes.hidden_size
    if problem.hidden_scale is not None or x.device.type != "cuda" or hidden % BLOCK:
        return False
    if tracing.current() is not None or problem.sizes.pairs <= SORTED_BY_ONE:
        return False
    align = (problem.topk_ids, experts.align(problem), problem.sizes.num_experts)
    choices = (
        library.explain("group_quant", x, BLOCK, **problem.quantization),
        library.explain("moe_align_block_size", *align, expert_map=problem.expert_map),
    )
    return all(choice.implementation and choice.implementation.name == "cuda" for choice in choices)


def _quantize(problem: Problem, experts: Experts) -> Prepared:
    x, scale = _codes(problem)
    return Prepared(x, scale, ExpertTokensMetadata())


def _codes(problem: Problem) -> tuple[Tensor, Tensor]:
    """Each token is quantized once, whatever the number of its experts; the last group may be cut."""
    if problem.hidden_scale is not None:
        return problem.hidden_states, problem.hidden_scale
    x, width = problem.hidden_states, problem.sizes.hidden_size
    if width % BLOCK:
        x = torch.nn.functional.pad(x, (0, -width % BLOCK))
    codes, scale = torch.ops.custom_ops.group_quant(x, BLOCK, **problem.quantization)
    return codes[:, :width], scale


def _aligned(problem: Problem, experts: Experts) -> ExpertTokensMetadata:
    block_size = experts.align(problem)
    ids, block_experts, num_padded = torch.ops.custom_ops.moe_align_block_size(
        problem.topk_ids, block_size, problem.sizes.num_experts, expert_map=problem.expert_map
    )
    return ExpertTokensMetadata(aligned=Aligned(ids, block_experts, num_padded, block_size))


def _permute(problem: Problem, experts: Experts) -> Prepared:
    rows, row_of_pair, row_experts, offsets = torch.ops.custom_ops.moe_permute(
        problem.hidden_states,
        problem.topk_ids,
        problem.sizes.num_experts,
        align=experts.align(problem),
        expert_map=problem.expert_map,
    )
    metadata = ExpertTokensMetadata(
        row_of_pair=row_of_pair, row_experts=row_experts, offsets=offsets
    )
    return Prepared(rows, None, metadata)


def _permute_quantized(problem: Problem, experts: Experts) -> Prepared:
    if problem.hidden_scale is not None:
        return _permute_codes(problem, problem.hidden_scale, experts)
    codes, scale, row_of_pair, row_experts, offsets = torch.ops.custom_ops.moe_permute_group_quant(
        problem.hidden_states,
        problem.topk_ids,
        problem.sizes.num_experts,
        BLOCK,
        align=experts.align(problem),
        expert_map=problem.expert_map,
        scale_layout="column_major_tma",
        **problem.quantization,
    )
    metadata = ExpertTokensMetadata(
        row_of_pair=row_of_pair, row_experts=row_experts, offsets=offsets
    )
    return Prepared(codes, scale, metadata)


def _permute_codes(problem: Problem, scale: Tensor, experts: Experts) -> Prepared:
    """Tokens that are quantized: two codes are 16 bits to an op that only moves them."""
    sizes = problem.sizes
    words, row_of_pair, row_experts, offsets = torch.ops.custom_ops.moe_permute(
        problem.hidden_states.contiguous().view(torch.bfloat16),
        problem.topk_ids,
        sizes.num_experts,
        align=experts.align(problem),
        expert_map=problem.expert_map,
    )
    codes = words.view(problem.hidden_states.dtype)
    scales = empty_scale(codes.shape[:1], scale.shape[1], "column_major_tma", codes.device)
    # with one row past the end for pairs that are elsewhere
    rows = scale.new_empty(len(codes) + 1, scale.shape[1])
    targets = torch.where(row_of_pair < 0, len(codes), row_of_pair).long()
    rows.index_copy_(0, targets, scale.repeat_interleave(sizes.top_k, 0))
    metadata = ExpertTokensMetadata(
        row_of_pair=row_of_pair, row_experts=row_experts, offsets=offsets
    )
    return Prepared(codes, scales.copy_(rows[:-1]), metadata)


def _batch(problem: Problem, experts: Experts) -> Prepared:
    targets, metadata = _places(problem)
    return Prepared(_scatter(problem, problem.hidden_states, targets), None, metadata)


def _batch_quantized(problem: Problem, experts: Experts) -> Prepared:
    """Codes, and scales in the layout of each expert on its own that DeepGEMM reads."""
    targets, metadata = _places(problem)
    codes, scale = problem.hidden_states, problem.hidden_scale
    if scale is None:
        codes, scale = torch.ops.custom_ops.group_quant(codes, BLOCK, **problem.quantization)
    batch = _scatter(problem, codes.view(torch.uint8), targets).view(codes.dtype)
    spec = quant_spec(codes.dtype, (1, BLOCK), "float32", "column_major_tma")
    _, scales = spec.empty_of_experts(batch.shape, batch.device)
    return Prepared(batch, scales.copy_(_scatter(problem, scale, targets)), metadata)


def _places(problem: Problem) -> tuple[Tensor, ExpertTokensMetadata]:
    """The row of each pair in the flattened batch, with one row past its end for those that are elsewhere."""
    sizes = problem.sizes
    size = sizes.batch_rows()
    experts = local_experts(problem.topk_ids, sizes.num_experts, problem.expert_map).flatten()
    counts = count_tokens(experts, sizes.num_experts)
    # A stable sort keeps the order of the pairs, so that a batch has one order.
    order = torch.argsort(torch.where(experts < 0, sizes.num_experts, experts), stable=True)
    starts = torch.cumsum(counts, 0) - counts
    sorted_experts = experts[order]
    rank = torch.arange(order.numel(), device=order.device) - starts[sorted_experts.clamp(min=0)]
    rows = torch.where(sorted_experts < 0, -1, sorted_experts * size + rank)
    row_of_pair = torch.empty_like(rows).scatter_(0, order, rows)
    targets = torch.where(row_of_pair < 0, sizes.num_experts * size, row_of_pair)
    return targets, ExpertTokensMetadata(counts=counts, row_of_pair=row_of_pair.int())


def _scatter(problem: Problem, tokens: Tensor, targets: Tensor) -> Tensor:
    sizes = problem.sizes
    size, width = sizes.batch_rows(), tokens.shape[-1]
    rows = tokens.new_empty(sizes.num_experts * size + 1, width)
    rows.index_copy_(0, targets, tokens.repeat_interleave(sizes.top_k, 0))
    return rows[:-1].view(sizes.num_experts, size, width)


def _needs_groups(problem: Problem) -> str | None:
    hidden = problem.sizes.hidden_size
    if not known(hidden % BLOCK == 0):
        return f"quantizes hidden_states in groups of {BLOCK}, hidden_size is {hidden}"
    return None


def _index_bytes(sizes: Sizes, itemsize: int) -> int:
    # sorted_ids and block_experts for blocks of at most 128 rows
    return 2 * _INT * sizes.rows(128)


def _codes_bytes(rows: int, width: int) -> int:
    groups = -(-width // BLOCK)
    return rows * width + _FLOAT * groups * pitch_of(rows, "column_major_tma")


def _quantized_bytes(sizes: Sizes, itemsize: int) -> int:
    width = -(-sizes.hidden_size // BLOCK) * BLOCK
    padded = 0 if width == sizes.hidden_size else sizes.num_tokens * width * itemsize
    return _codes_bytes(sizes.num_tokens, width) + padded


def _index_quantized_bytes(sizes: Sizes, itemsize: int) -> int:
    return _index_bytes(sizes, itemsize) + _quantized_bytes(sizes, itemsize)


def _permute_bytes(sizes: Sizes, itemsize: int) -> int:
    rows = sizes.rows(128)
    return rows * sizes.hidden_size * itemsize + 3 * _INT * (rows + sizes.pairs)


def _permute_quantized_bytes(sizes: Sizes, itemsize: int) -> int:
    rows = sizes.rows(128)
    return 2 * _codes_bytes(rows, sizes.hidden_size) + 3 * _INT * (rows + sizes.pairs)


def _batch_bytes(sizes: Sizes, itemsize: int) -> int:
    rows = sizes.num_experts * sizes.batch_rows() + 1
    return (rows + sizes.pairs) * sizes.hidden_size * itemsize + 64 * sizes.pairs


def _batch_quantized_bytes(sizes: Sizes, itemsize: int) -> int:
    rows = sizes.num_experts * (sizes.batch_rows() + 3) + sizes.pairs + sizes.num_tokens
    return 3 * _codes_bytes(rows, sizes.hidden_size) + 64 * sizes.pairs


AS_IS = Prepare("as_is", _as_is, "tokens")
QUANTIZE = Prepare("quantize", _quantize, "tokens", "fp8_group", workspace=_quantized_bytes)
INDEX = Prepare("index", _index, "indexed", workspace=_index_bytes)
INDEX_QUANTIZED = Prepare(
    "index_quantized",
    _index_quantized,
    "indexed",
    "fp8_group",
    workspace=_index_quantized_bytes,
)
PERMUTE = Prepare("permute", _permute, "contiguous", workspace=_permute_bytes)
PERMUTE_QUANTIZED = Prepare(
    "permute_quantized",
    _permute_quantized,
    "contiguous",
    "fp8_group",
    workspace=_permute_quantized_bytes,
    unsupported=_needs_groups,
)
BATCH = Prepare("batch", _batch, "batched", workspace=_batch_bytes)
BATCH_QUANTIZED = Prepare(
    "batch_quantized",
    _batch_quantized,
    "batched",
    "fp8_group",
    workspace=_batch_quantized_bytes,
    unsupported=_needs_groups,
)
PREPARES = (
    AS_IS,
    QUANTIZE,
    INDEX,
    INDEX_QUANTIZED,
    PERMUTE,
    PERMUTE_QUANTIZED,
    BATCH,
    BATCH_QUANTIZED,
)
