"""The operations that models spell out in plain PyTorch, with every spelling that real graphs showed.

Each meaning is a function that stands in the graph for as long as the passes run (Inductor never sees it); it
computes what the custom op of its name defines, so a rewrite can be run and checked. Sources of the spellings:
transformers 5.17 to 5.23 (Llama, Qwen2, Qwen3, Mistral, Gemma, OLMo2, gpt-oss) and torch.nn.RMSNorm. Quantizations
have a module of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor as T

import custom_ops
from fusion_passes import index_map
from fusion_passes.canonical.asymmetric_quantizations import ASYMMETRIC
from fusion_passes.canonical.marks import meaning
from fusion_passes.canonical.quantizations import (
    BLOCKS,
    CALIBRATED,
    DYNAMIC,
    POWER_OF_TWO,
    STATIC,
)
from fusion_passes.fusion import Constraint, Fusion, Pattern, Scalar, Tensor
from fusion_passes.matching import Match
from fusion_passes.operations import is_tensor, readers, shape_of
from fusion_passes.rewriting import Rewrite


@meaning(
    "rowwise",
    lambda x, weight, eps, weight_mode: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
def rms_norm(x: T, weight: T, eps: float | T, weight_mode: str) -> T:
    return custom_ops.ops()["rms_norm"].reference(x, weight, float(eps), weight_mode=weight_mode)


@meaning(
    "pointwise", lambda gate, up: torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
)
def silu_mul(gate: T, up: T) -> T:
    return custom_ops.ops()["silu_mul"].reference(gate, up)


@meaning(
    "pointwise", lambda gate, up: torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
)
def gelu_tanh_mul(gate: T, up: T) -> T:
    return custom_ops.ops()["gelu_tanh_mul"].reference(gate, up)


@meaning(
    "pointwise",
    lambda gate, up, alpha, limit: torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
)
def clamped_swiglu(gate: T, up: T, alpha: float, limit: float) -> T:
    return custom_ops.ops()["clamped_swiglu"].reference(gate, up, float(alpha), float(limit))


def clamped_swiglu_as_spelt(gate: T, up: T, alpha: float, limit: float, lower: float) -> T:
    """As gpt-oss writes it; lower is -limit."""
    gate, up = gate.clamp(max=limit), up.clamp(min=lower, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * alpha))


def _rewrite_clamped_swiglu(m: Rewrite) -> tuple[Any, ...]:
    numbers = (m.match.scalars["alpha"], m.match.scalars["limit"])
    return (m.emit(clamped_swiglu, m.tensor("gate"), m.tensor("up"), *numbers),)


def _norm(x: T, eps: float) -> T:
    # a cast for each reader: code that has one for both of them has the same node twice
    return x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)


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


def _unwidened(x: T, eps: float) -> T:
    """As T5 writes it: the product with the float32 root widens x, which is the same number in float32."""
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)


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
    _norm_pattern(
        "rounded, not cast",
        "rounded",
        lambda x, weight, eps: weight * _unwidened(x, eps).to(x.dtype),
    ),
    _norm_pattern(
        "float32, not cast",
        "float32",
        lambda x, weight, eps: (_unwidened(x, eps) * weight).to(x.dtype),
    ),
)


# F.rms_norm without a weight (nanochat, the value norms of Gemma 4): a meaning of its own, tried after those with one,
# whose first part it is. Times one is exact in every mode.
_WEIGHTLESS = tuple(
    Pattern(
        lambda x, eps, norm=norm: norm(x, eps).to(x.dtype),
        {"x": Tensor("num_tokens", "hidden_size"), "eps": Scalar()},
        {"weight_mode": "rounded"},
        name,
    )
    for name, norm in (("no weight", _norm), ("no weight, not cast", _unwidened))
)


def _has_a_weight(match: Match) -> bool:
    """Whether what would be a norm without a weight is multiplied by one, in a way that no norm with one has."""
    (output,) = match.outputs
    found = list(readers(output))
    if len(found) != 1 or found[0].target is not torch.ops.aten.mul.Tensor:
        return False
    width = match.sizes["hidden_size"]
    return any(
        index_map.same_size(index_map.product(shape_of(operand)), width)
        for operand in filter(is_tensor, found[0].args)
    )


def _rewrite_weightless(m: Rewrite) -> tuple[Any, ...]:
    x = m.tensor("x")
    ones = m.full(x, (m.size("hidden_size"),), 1.0)
    return (m.emit(rms_norm, x, ones, m.match.scalars["eps"], m.constants["weight_mode"]),)


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


def _silu_by_sigmoid(gate: T, up: T) -> T:
    """As torch.export decomposes it: one float32 rounding more than x / (1 + exp(-x)), before that to 16 bits."""
    return (gate.float() * torch.sigmoid(gate.float())).to(gate.dtype) * up


def _gelu_written_out(gate: T, up: T) -> T:
    """As NewGELUActivation of transformers; eager's pow(x, 3) is x * x * x too."""
    x = gate.float()
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return (0.5 * x * (1.0 + torch.tanh(inner))).to(gate.dtype) * up


_GATED = {name: Tensor("num_tokens", "intermediate_size") for name in ("gate", "up")}

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
        "rms_norm",
        "RMSNorm without a weight",
        0,
        patterns=_WEIGHTLESS,
        rewrite=_rewrite_weightless,
        constraints=(
            Constraint(
                lambda match: not _has_a_weight(match),
                lambda match: f"what reads {match.outputs[0].name} multiplies it by a weight",
            ),
        ),
        signature="aten.rsqrt.default",
    ),
    Fusion(
        "silu_mul",
        "SiLU of the gate, times the up projection",
        0,
        patterns=(
            Pattern(lambda gate, up: F.silu(gate) * up, _GATED, name="silu_mul"),
            Pattern(_silu_by_sigmoid, _GATED, name="silu_mul, by a sigmoid"),
        ),
        rewrite=lambda m: (m.emit(silu_mul, m.tensor("gate"), m.tensor("up")),),
        signature="aten.exp.default aten.sigmoid.default",
    ),
    Fusion(
        "gelu_tanh_mul",
        "GELU (tanh) of the gate, times the up projection",
        0,
        patterns=(
            Pattern(
                lambda gate, up: F.gelu(gate, approximate="tanh") * up, _GATED, name="gelu_tanh_mul"
            ),
            Pattern(_gelu_written_out, _GATED, name="gelu_tanh_mul, written out"),
        ),
        rewrite=lambda m: (m.emit(gelu_tanh_mul, m.tensor("gate"), m.tensor("up")),),
        signature="aten.tanh.default",
    ),
    Fusion(
        "clamped_swiglu",
        "The clamped SwiGLU of gpt-oss",
        0,
        patterns=(
            Pattern(
                clamped_swiglu_as_spelt,
                _GATED | {"alpha": Scalar(), "limit": Scalar(), "lower": Scalar()},
                name="clamped_swiglu",
            ),
        ),
        rewrite=_rewrite_clamped_swiglu,
        constraints=(
            Constraint(
                lambda match: (
                    all(isinstance(value, (int, float)) for value in match.scalars.values())
                    and match.scalars["lower"] == -match.scalars["limit"]
                ),
                lambda match: (
                    f"up is clamped to {match.scalars['lower']} .. {match.scalars['limit']}, "
                    "which is not symmetric, or not known while compiling"
                ),
            ),
        ),
        signature="aten.sigmoid.default",
    ),
    ASYMMETRIC,
    POWER_OF_TWO,
    DYNAMIC,
    STATIC,
    BLOCKS,
)
SHORT_CUTS = (CALIBRATED,)
"""What is recognized before MEANINGS to spare their patterns; that a place is in part one of these is no news."""
