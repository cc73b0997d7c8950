"""The operations that models spell out in plain PyTorch, with every spelling that real graphs showed.

Each meaning is a function that stands in the graph for as long as the passes run (Inductor never sees it); it
computes what the custom op of its name defines, so a rewrite can be run and checked. Sources of the spellings:
transformers 5.17 to 5.23 (Llama, Qwen2, Qwen3, Mistral, Gemma, OLMo2), torch.nn.RMSNorm, and the quantization of
DeepSeek-V3 as written in plain PyTorch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor as T

import custom_ops
from fusion_passes.fusion import Constraint, Fusion, Pattern, Scalar, SizeOf, Tensor
from fusion_passes.rewriting import Rewrite

FP8_MAX = 448.0


def _meaning(
    kind: str, fake: Callable[..., Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def mark(fn: Callable[..., Any]) -> Callable[..., Any]:
        fn.meaning_kind, fn.fake = kind, fake  # type: ignore[attr-defined]
        return fn

    return mark


@_meaning(
    "rowwise",
    lambda x, weight, eps, weight_mode: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
def rms_norm(x: T, weight: T, eps: float | T, weight_mode: str) -> T:
    return custom_ops.ops()["rms_norm"].reference(x, weight, float(eps), weight_mode=weight_mode)


def _fake_group_quant(x: T, group_size: int, min_amax: float) -> tuple[T, T]:
    q = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return q, torch.empty(
        (*x.shape[:-1], x.shape[-1] // group_size), dtype=torch.float32, device=x.device
    )


@_meaning("rowwise", _fake_group_quant)
def group_quant(x: T, group_size: int, min_amax: float) -> tuple[T, T]:
    reference = custom_ops.ops()["group_quant"].reference
    return reference(x, group_size, scale_layout="row_major", min_amax=float(min_amax))


@_meaning(
    "pointwise", lambda gate, up: torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
)
def silu_mul(gate: T, up: T) -> T:
    return custom_ops.ops()["silu_mul"].reference(gate, up)


def _norm(x: T, eps: float) -> T:
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


def _norm_pattern(
    name: str, mode: str, fn: Callable[[T, T, float], T], weight_dtype: torch.dtype | None = None
) -> Pattern:
    inputs: dict[str, Any] = {
        "x": Tensor("num_tokens", "hidden_size"),
        "weight": Tensor("hidden_size", dtype=weight_dtype),
        "eps": Scalar(),
    }
    return Pattern(fn, inputs, {"weight_mode": mode}, name)


def _rounded(x: T, weight: T, eps: float) -> T:
    return weight * _norm(x, eps).to(x.dtype)


def _promoted(x: T, weight: T, eps: float) -> T:
    return (_norm(x, eps) * weight).to(x.dtype)


def _cast(x: T, weight: T, eps: float) -> T:
    return (_norm(x, eps) * weight.float()).to(x.dtype)


def _plus_one(x: T, weight: T, eps: float) -> T:
    return (_norm(x, eps) * (1.0 + weight.float())).to(x.dtype)


NORMS = (
    # Llama, Qwen, Mistral: the normalized value is rounded, then multiplied in the activation dtype
    _norm_pattern("rounded", "rounded", _rounded),
    # Gemma: one plus the weight, in float32; before the others, which would take the sum for a float32 weight
    _norm_pattern("gemma", "float32_plus_one", _plus_one),
    _norm_pattern("gemma, float32 weight", "float32_plus_one", _plus_one, torch.float32),
    # torch.nn.RMSNorm, OLMo2: a 16-bit weight, promoted in a float32 product
    _norm_pattern("float32", "float32", _promoted),
    _norm_pattern("float32, cast weight", "float32", _cast),
    _norm_pattern("float32 weight", "float32", _promoted, torch.float32),
)


def _quant_pattern(
    clamp_amax: bool, clamp_codes: bool, amax_first: bool, by_tensor: bool
) -> Pattern:
    """Without the clamp of the codes the meaning is the same: |x / scale| never rounds to more than 448."""

    def spelling(x: T, group_size: int, min_amax: float = 0.0) -> tuple[T, T]:
        groups = x.unflatten(-1, (-1, group_size))
        if amax_first:  # the largest magnitude is exact in either dtype
            amax = groups.abs().amax(-1, keepdim=True).float()
        else:
            amax = groups.float().abs().amax(-1, keepdim=True)
        amax = amax.clamp(min=min_amax) if clamp_amax else amax
        scale = amax / (amax.new_full((), FP8_MAX) if by_tensor else FP8_MAX)
        codes = groups.float() / scale
        codes = codes.clamp(-FP8_MAX, FP8_MAX) if clamp_codes else codes
        return codes.to(torch.float8_e4m3fn), scale

    inputs: dict[str, Any] = {
        "x": Tensor("num_tokens", "num_groups * group_size"),
        "group_size": SizeOf("group_size"),
    }
    if clamp_amax:
        inputs["min_amax"] = Scalar()
    said = {
        "clamped amax": clamp_amax,
        "clamped codes": clamp_codes,
        "16-bit amax": amax_first,
        "divided by a tensor": by_tensor,
    }
    words = [word for word, on in said.items() if on]
    return Pattern(spelling, inputs, {"by_tensor": by_tensor}, ", ".join(words) or "plain")


# Eager on a GPU divides by a number as it multiplies by the rounded reciprocal. The scales are one rounding off
# then, and as 16-bit values over one another often lie on a tie, one code in a thousand: another meaning.
_DIVIDES = Constraint(
    holds=lambda match: match.device.type == "cpu" or match.constants["by_tensor"],
    reason=lambda match: (
        "amax / 448.0 on a GPU is eager's amax * (1 / 448), which rounds differently; "
        "amax / amax.new_full((), 448.0) divides"
    ),
)


def _rewrite_norm(m: Rewrite) -> tuple[Any, ...]:
    return (
        m.emit(
            rms_norm,
            m.tensor("x"),
            m.tensor("weight"),
            m.match.scalars["eps"],
            m.constants["weight_mode"],
        ),
    )


def _rewrite_quant(m: Rewrite) -> tuple[Any, ...]:
    node = m.emit(
        group_quant, m.tensor("x"), m.size("group_size"), m.match.scalars.get("min_amax", 0.0)
    )
    return m.outputs_of(node, 2)


_GATED = {name: Tensor("num_tokens", "intermediate_size") for name in ("gate", "up")}
_QUANT_FLAGS = itertools.product((True, False), (True, False), (False, True), (True, False))

MEANINGS = (
    Fusion(
        "rms_norm",
        "RMSNorm",
        0,
        patterns=NORMS,
        rewrite=_rewrite_norm,
        signature="aten.rsqrt.default",
    ),
    Fusion(
        "silu_mul",
        "SiLU of the gate, times the up projection",
        0,
        patterns=(Pattern(lambda gate, up: F.silu(gate) * up, _GATED, name="silu_mul"),),
        rewrite=lambda m: (m.emit(silu_mul, m.tensor("gate"), m.tensor("up")),),
        signature="aten.exp.default",
    ),
    Fusion(
        "group_quant",
        "Dynamic quantization to float8 per token and group",
        0,
        patterns=tuple(_quant_pattern(*flags) for flags in _QUANT_FLAGS),
        rewrite=_rewrite_quant,
        constraints=(_DIVIDES,),
        signature="cast",
    ),
)
