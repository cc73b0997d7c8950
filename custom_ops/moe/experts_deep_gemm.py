"""Experts on DeepGEMM (`pip install sgl-deep-gemm`), for Hopper: contiguous and masked grouped products, bf16 and FP8.

A contiguous product skips blocks of padding, so its rows are a bound that needs no data; a masked one reads how many
rows each expert has on the device. DeepGEMM compiles a kernel when it first meets one: inside a CUDA graph capture a
problem that has not run yet is an error, and after a warm-up what it compiles is counted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from custom_ops import monitor, platform
from custom_ops.gemm import deep_gemm as gemm
from custom_ops.gemm.reference import BLOCK
from custom_ops.moe.experts_grouped_mm import add_bias, misplaced
from custom_ops.moe.parts import Experts, Prepared
from custom_ops.moe.problem import Problem, Sizes
from custom_ops.platform import on_device
from custom_ops.scales import known, pitch_of

FAMILY = "deep_gemm"
OP = "fused_moe"
ALIGN = 128  # get_mk_alignment_for_contiguous_layout() of 0.1.4, checked when it is loaded
_WIDTH_BYTES = 16  # TMA
_MAX_BATCH_BYTES = 1 << 30

_QUANTIZING = (
    "silu_mul",
    "gelu_tanh_mul",
    "clamped_swiglu",
)  # activations with an op that quantizes

# What has run in this process: nothing is left to compile.
compiled: set[tuple[object, ...]] = set()


def _contiguous(problem: Problem, prepared: Prepared) -> Tensor:
    x, scale, metadata = prepared
    first = _grouped(x, scale, problem.gate_up, problem.gate_up_scale, metadata.row_experts)
    act, act_scale = _activated(problem, first, metadata.row_experts, scale is not None)
    out = _grouped(act, act_scale, problem.down, problem.down_scale, metadata.row_experts)
    if problem.down_bias is not None:
        add_bias(out, problem.down_bias, metadata.row_experts)
    return out


def _activated(
    problem: Problem, x: Tensor, row_experts: Tensor | None, quantize: bool
) -> tuple[Tensor, Tensor | None]:
    """The activation of x with its bias, of the rows that are somebody's where there is Triton."""
    assert row_experts is not None
    if platform.has_triton():
        from custom_ops.moe.triton_rows import activate_rows

        return activate_rows(
            x,
            row_experts,
            problem.activation,
            bias=problem.gate_up_bias,
            quantize=quantize,
            **problem.quantization,
        )
    if problem.gate_up_bias is not None:
        add_bias(x, problem.gate_up_bias, row_experts)
    return quantized_activation(problem, x) if quantize else (problem.activation(x), None)


def quantized_activation(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of the activation, with scales as DeepGEMM reads them in place."""
    ops, activation = torch.ops.custom_ops, problem.activation
    how: dict[str, Any] = {"scale_layout": "column_major_tma", **problem.quantization}
    if activation.name not in _QUANTIZING:
        return ops.group_quant(activation(x), BLOCK, **how)
    gate, up = activation.halves(x)
    if activation.name == "clamped_swiglu":
        constants = (activation.alpha, activation.limit)
        return ops.clamped_swiglu_group_quant(gate, up, *constants, BLOCK, **how)
    return getattr(ops, f"{activation.name}_group_quant")(gate, up, BLOCK, **how)


def _grouped(
    x: Tensor, scale: Tensor | None, weight: Tensor, w_scale: Tensor | None, experts: Tensor | None
) -> Tensor:
    from custom_ops.jit import deep_gemm_grouped

    assert experts is not None
    out = x.new_empty(x.shape[0], weight.shape[1], dtype=torch.bfloat16)
    if scale is not None:
        assert w_scale is not None
        with on_device(out):
            deep_gemm_grouped.contiguous((x, scale), (weight, w_scale.contiguous()), out, experts)
    elif weight.stride(1) == 1 and weight.stride(2) != 1:
        transposed = weight.transpose(1, 2)
        _run("m_grouped_bf16_gemm_nn_contiguous", x, transposed, out, experts)
    else:
        _run("m_grouped_bf16_gemm_nt_contiguous", x, weight, out, experts)
    return out


def _masked(problem: Problem, prepared: Prepared) -> Tensor:
    x, scale, metadata = prepared
    sizes = problem.sizes
    # What DeepGEMM picks its tile by: the mean of what the experts have, of the real counts where those are known.
    pairs = sizes.pairs if metadata.host_counts is None else sum(metadata.host_counts)
    expected = max(1, -(-pairs // sizes.num_experts))
    args = (metadata.counts, expected)
    first = _batched(x, scale, problem.gate_up, problem.gate_up_scale, *args)
    if problem.gate_up_bias is not None:
        first += problem.gate_up_bias.unsqueeze(1)
    if scale is None:
        act, act_scale = problem.activation(first), None
    else:
        act, act_scale = torch.ops.custom_ops.silu_mul_group_quant_masked(
            first, metadata.counts, BLOCK, **problem.quantization
        )
    out = _batched(act, act_scale, problem.down, problem.down_scale, *args)
    return out if problem.down_bias is None else out.add_(problem.down_bias.unsqueeze(1))


def _batched(
    x: Tensor,
    scale: Tensor | None,
    weight: Tensor,
    w_scale: Tensor | None,
    counts: Tensor | None,
    expected: int,
) -> Tensor:
    from custom_ops.jit import deep_gemm_grouped

    assert counts is not None
    out = x.new_empty(*x.shape[:2], weight.shape[1], dtype=torch.bfloat16)
    if scale is not None:
        assert w_scale is not None
        with on_device(out):
            deep_gemm_grouped.masked(
                (x, scale), (weight, w_scale.contiguous()), out, counts, expected
            )
    else:
        _run("m_grouped_bf16_gemm_nt_masked", x, weight, out, counts, expected)
    return out


def _run(function: str, x: Tensor, weight: Tensor, out: Tensor, *rest: Any) -> None:
    """One of the products in 16 bits; the first time in this process with an eye on what it compiles."""
    from custom_ops.jit import tracing

    if (trace := tracing.current()) is not None:
        trace.uncovered("DeepGEMM's 16-bit grouped products")
        return
    import deep_gemm

    numbers = tuple(each for each in rest if isinstance(each, int))
    problem = (function, out.device.index, tuple(x.shape), tuple(weight.shape), numbers)
    first = contextlib.nullcontext() if problem in compiled else _first_call(problem)
    with first, on_device(out):
        getattr(deep_gemm, function)(x, weight, out, *rest)
    compiled.add(problem)


@contextlib.contextmanager
def _first_call(problem: tuple[object, ...]) -> Iterator[None]:
    from custom_ops.jit import deep_gemm as jit

    function, _, rows, weight, _ = problem
    sizes = f"{function} of {rows} by {weight}"
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{OP}: DeepGEMM has not run {sizes} yet and may have to compile or load a kernel for it, which must "
            "not happen while a CUDA graph is captured; run the op once with these sizes before the capture"
        )
    if not monitor.armed():
        yield
        return
    folder = jit.cache() / "cache"
    before = set(os.listdir(folder)) if folder.is_dir() else set()
    yield
    for name in sorted(set(os.listdir(folder) if folder.is_dir() else ()) - before):
        monitor.record(OP, FAMILY, sizes, name)


def unavailable(device: torch.device) -> str | None:
    """Why DeepGEMM cannot run on a device, or None."""
    if reason := gemm.unavailable(device):
        return reason
    import deep_gemm

    missing = [name for name in _FUNCTIONS if not hasattr(deep_gemm, name)]
    if missing:
        return f"deep_gemm {getattr(deep_gemm, '__version__', '')} has no {', '.join(missing)}"
    if (align := deep_gemm.get_mk_alignment_for_contiguous_layout()) != ALIGN:
        return f"deep_gemm pads experts to {align} rows, wanted {ALIGN}"
    return None


_FUNCTIONS = (
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nt_contiguous",
    "m_grouped_bf16_gemm_nn_contiguous",
    "fp8_m_grouped_gemm_nt_masked",
    "m_grouped_bf16_gemm_nt_masked",
    "get_mk_alignment_for_contiguous_layout",
)


def _unsupported(problem: Problem) -> str | None:
    sizes = problem.sizes
    if problem.dtype != torch.bfloat16:
        return f"writes torch.bfloat16, hidden_states are {problem.dtype}"
    if not sizes.num_experts:
        return "there is no expert here"
    fp8 = problem.weights == "fp8_block"
    multiple = BLOCK if fp8 else _WIDTH_BYTES // 2
    for name, size in (
        ("hidden_size", sizes.hidden_size),
        ("intermediate_size", sizes.intermediate_size),
    ):
        if not known(size % multiple == 0):
            return f"needs {name} a multiple of {multiple}, it is {size}"
    if fp8 and not (problem.gate_up.stride(2) == problem.down.stride(2) == 1):
        return "reads FP8 weights by rows only, these are transposed"
    return _not_packed(problem) or misplaced(problem)


def _not_packed(problem: Problem) -> str | None:
    """Its grouped products read experts that lie one after the other, without a gap."""
    for name, weight in (("gate_up", problem.gate_up), ("down", problem.down)):
        if not (weight.is_contiguous() or weight.transpose(1, 2).is_contiguous()):
            return f"needs experts in one piece, the strides of {name} are {weight.stride()}"
    return None


def _masked_unsupported(problem: Problem) -> str | None:
    sizes = problem.sizes
    if not isinstance(sizes.num_tokens, int):
        return "the number of tokens is not known yet"
    fp8 = problem.weights == "fp8_block"
    if fp8 and (problem.activation.name != "silu_mul" or problem.activation.interleaved):
        return f"quantizes silu_mul of halves, the activation is {problem.activation}"
    if not problem.gate_up.is_contiguous() or not problem.down.is_contiguous():
        return "reads weights by rows only, these are transposed"
    needed = _masked_bytes(sizes, 2)
    if needed > _MAX_BATCH_BYTES:
        return f"a batch for the worst routing takes {needed >> 20} MiB, accepted: {_MAX_BATCH_BYTES >> 20}"
    return _unsupported(problem)


def _contiguous_bytes(sizes: Sizes, itemsize: int) -> int:
    rows = sizes.rows(ALIGN)
    widths = sizes.gate_up_rows + sizes.intermediate_size + sizes.hidden_size
    scales = 4 * pitch_of(rows, "column_major_tma") * -(-sizes.intermediate_size // BLOCK)
    return rows * itemsize * (widths + max(sizes.gate_up_rows, sizes.hidden_size)) + scales


def _masked_bytes(sizes: Sizes, itemsize: int) -> int:
    rows = sizes.num_experts * sizes.batch_rows()
    widths = sizes.gate_up_rows + sizes.intermediate_size + sizes.hidden_size
    return rows * (itemsize * widths + 4 * -(-sizes.intermediate_size // BLOCK))


def _experts(weights: str, quantization: str | None) -> tuple[Experts, Experts]:
    suffix = "" if weights == "16_bit" else f"_{weights}"
    return (
        Experts(
            f"deep_gemm{suffix}",
            FAMILY,
            _contiguous,
            "contiguous",
            "contiguous",
            weights,
            quantization,
            align=lambda problem: ALIGN,
            workspace=_contiguous_bytes,
            unavailable=unavailable,
            unsupported=_unsupported,
        ),
        Experts(
            f"deep_gemm_masked{suffix}",
            FAMILY,
            _masked,
            "batched",
            "batched",
            weights,
            quantization,
            workspace=_masked_bytes,
            unavailable=unavailable,
            unsupported=_masked_unsupported,
        ),
    )


EXPERTS = (*_experts("16_bit", None), *_experts("fp8_block", "fp8_group"))
