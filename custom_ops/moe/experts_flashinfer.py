"""Experts on FlashInfer's CUTLASS kernels (`pip install flashinfer-python`), for Hopper: bf16, fp16 and FP8 weights.

One call permutes, multiplies, activates and adds up; FP8 activations are quantized inside, by one scale for 128
channels. It reads the rows of up before those of gate, where models keep gate first: so a gated block needs its first
weight once more in that order, which is made at the first call and kept as long as the weight lives. FlashInfer
compiles for minutes when it first runs, which a warm-up does ahead (but for FP8, where it compiles more by itself):
inside a CUDA graph capture that is an error. No table names these experts until they have been measured, and without a
table they come last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from custom_ops import platform
from custom_ops.gemm.deep_gemm import needs_hopper
from custom_ops.gemm.reference import BLOCK
from custom_ops.moe.parts import Experts, Prepared
from custom_ops.moe.problem import Problem, Sizes
from custom_ops.platform import on_device
from custom_ops.scales import known

FAMILY = "flashinfer"
OP = "fused_moe"
UNNAMED = "FlashInfer compiles block-scaled products of experts by itself, for every shape"
_WIDTH_BYTES = 16  # TMA
_ACTIVATIONS = {"silu_mul": "Swiglu", "relu2": "Relu2"}

# What has run in this process: nothing is left to compile.
compiled: set[tuple[object, ...]] = set()


class _Kept(NamedTuple):
    """A weight in the other order, and what says that it is still of the same one."""

    storage: Any
    version: int
    weight: Tensor


_kept: dict[tuple[object, ...], _Kept] = {}


def _run(problem: Problem, prepared: Prepared) -> Tensor:
    from custom_ops.jit import flashinfer as modules
    from custom_ops.jit import tracing

    if (trace := tracing.current()) is not None:
        fp8 = problem.weights == "fp8_block"
        modules.note(trace, OP, "fused_moe_90", UNNAMED if fp8 else "")
        return torch.empty_like(problem.hidden_states, memory_format=torch.contiguous_format)
    sizes, act = problem.sizes, problem.activation
    kind = (problem.dtype, problem.weights, act.name, problem.hidden_states.device)
    on_gpu = problem.hidden_states.is_cuda
    if kind not in compiled and on_gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{OP}: FlashInfer has not run {problem.weights} weights with {act.name} yet and may have to compile or "
            "load kernels for them, which must not happen while a CUDA graph is captured; run the op once before the "
            "capture"
        )
    import flashinfer.fused_moe as library

    if kind not in compiled:
        modules.first_call(OP, "fused_moe_90")
    gate_up, scales = problem.gate_up, None
    if act.gated:
        gate_up = up_first(gate_up)
    if problem.weights == "fp8_block":
        assert problem.gate_up_scale is not None
        assert problem.down_scale is not None
        first = up_first(problem.gate_up_scale) if act.gated else problem.gate_up_scale.contiguous()
        scales = [first, problem.down_scale.contiguous()]
    out = torch.empty(
        (sizes.num_tokens, sizes.hidden_size), dtype=problem.dtype, device=gate_up.device
    )
    if out.numel():
        with on_device(out):
            library.cutlass_fused_moe(
                input=problem.hidden_states.contiguous(),
                token_selected_experts=problem.topk_ids.to(torch.int32).contiguous(),
                token_final_scales=problem.topk_weights.float().contiguous(),
                fc1_expert_weights=gate_up,
                fc2_expert_weights=problem.down,
                output_dtype=problem.dtype,
                quant_scales=scales or [],
                output=out,
                use_deepseek_fp8_block_scale=scales is not None,
                activation_type=getattr(library.ActivationType, _ACTIVATIONS[act.name]),
            )
        compiled.add(kind)
    return out


def up_first(weight: Tensor) -> Tensor:
    """[E, 2 * I, ...], or its scales, with its halves in the other order; one copy for as long as the weight lives.

    A weight that was written to since is copied anew.
    """
    for key in [key for key, kept in _kept.items() if kept.storage.expired()]:
        del _kept[key]
    key = (weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype, weight.device)
    version = 0 if weight.is_inference() else weight._version
    kept = _kept.get(key)
    if kept is None or kept.version != version:
        half = weight.shape[1] // 2
        raw = weight.view(torch.uint8) if weight.element_size() == 1 else weight
        swapped = torch.cat((raw[:, half:], raw[:, :half]), 1).view(weight.dtype)
        kept = _Kept(StorageWeakRef(weight.untyped_storage()), version, swapped)
        _kept[key] = kept
    return kept.weight


def unavailable(device: torch.device) -> str | None:
    """Why FlashInfer cannot run on a device, or None. Does not import it, which takes seconds."""
    if reason := needs_hopper(device):
        return reason
    if not platform.has_package("flashinfer"):
        return "flashinfer is not installed (pip install flashinfer-python)"
    return None


def _unsupported(problem: Problem) -> str | None:
    sizes, act = problem.sizes, problem.activation
    if not sizes.num_experts:
        return "there is no expert here"
    if act.name not in _ACTIVATIONS or act.interleaved:
        return f"activates by silu_mul of halves or relu2, the activation is {act}"
    if problem.gate_up_bias is not None or problem.down_bias is not None:
        return "takes no biases"
    if problem.expert_map is not None:
        return "takes no expert_map"
    fp8 = problem.weights == "fp8_block"
    if fp8 and (problem.scale_mode, problem.code_mode) != ("divide", "divide"):
        return f"quantizes by division, here are {problem.scale_mode!r} and {problem.code_mode!r}"
    if fp8 and (problem.dtype != torch.bfloat16 or not act.gated):
        return f"takes FP8 weights with torch.bfloat16 and silu_mul, here are {problem.dtype} and {act.name}"
    multiple = BLOCK if fp8 else _WIDTH_BYTES // 2
    for name, size in (
        ("hidden_size", sizes.hidden_size),
        ("intermediate_size", sizes.intermediate_size),
    ):
        if not known(size % multiple == 0):
            return f"needs {name} a multiple of {multiple}, it is {size}"
    for name, weight in (("gate_up", problem.gate_up), ("down", problem.down)):
        if not weight.is_contiguous():
            return f"needs {name} in one piece, its strides are {weight.stride()}"
    return None


def _bytes(sizes: Sizes, itemsize: int) -> int:
    """Rows in order, both products and the activation, in 16 bits, and indices; not the kept copy of a weight."""
    rows = sizes.rows(128)
    widths = 2 * sizes.hidden_size + sizes.gate_up_rows + sizes.intermediate_size
    return rows * (2 * itemsize * widths + 64) + (64 << 20)


def _experts(weights: str) -> Experts:
    return Experts(
        "flashinfer" if weights == "16_bit" else f"flashinfer_{weights}",
        FAMILY,
        _run,
        "tokens",
        "reduced",
        weights,
        gate_up="up_first",
        applies_topk_weights=True,
        workspace=_bytes,
        unavailable=unavailable,
        unsupported=_unsupported,
    )


EXPERTS = (_experts("16_bit"), _experts("fp8_block"))
