"""What several fusions share: specs of their inputs and the choice of a scale layout."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

import custom_ops
from custom_ops.scales import GROUP_SIZES
from fusion_passes.canonical import meanings
from fusion_passes.fusion import Constraint, Pattern, Scalar, SizeOf, Tensor
from fusion_passes.matching import Match
from fusion_passes.operations import readers
from fusion_passes.rewriting import Rewrite

WEIGHT_MODES = ("rounded", "float32", "float32_plus_one")
HIDDEN = Tensor("num_tokens", "hidden_size")
QUANTIZED = Tensor("num_tokens", "num_groups * group_size")
GROUP: dict[str, Any] = {"group_size": SizeOf("group_size"), "min_amax": Scalar()}

SUPPORTED_GROUPS = Constraint(
    holds=lambda match: match.sizes["group_size"] in GROUP_SIZES,
    reason=lambda match: (
        f"groups of {match.sizes['group_size']}; supported: {', '.join(map(str, GROUP_SIZES))}"
    ),
)
FINITE_MIN_AMAX = Constraint(
    holds=lambda match: (
        isinstance(match.scalars["min_amax"], (int, float)) and match.scalars["min_amax"] >= 0
    ),
    reason=lambda match: (
        f"the lower bound of a group's largest magnitude is {match.scalars['min_amax']}, not a number >= 0"
    ),
)


def scale_layout(match: Match) -> str:
    """The layout for the quantization's scales: the GEMM's when only block-scaled GEMMs read them, else row-major."""
    scale = match.outputs[1]
    gemm = custom_ops.ops()["block_scaled_mm"].overload
    reading = list(readers(scale))
    if reading and all(reader.target is gemm for reader in reading):
        return custom_ops.gemm.preferred_scale_layout(match.device)
    return "row_major"


def quant_arguments(m: Rewrite) -> dict[str, Any]:
    return {"scale_layout": scale_layout(m.match), "min_amax": m.scalar("min_amax")}


def quantized(
    x: torch.Tensor, group_size: int, min_amax: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Group quantization in plain PyTorch, as a pattern spells it."""
    groups = x.float().unflatten(-1, (-1, group_size))
    amax = groups.abs().amax(-1, keepdim=True).clamp(min=min_amax)
    scale = amax / amax.new_full((), meanings.FP8_MAX)
    codes = (groups / scale).clamp(-meanings.FP8_MAX, meanings.FP8_MAX).to(torch.float8_e4m3fn)
    return codes.flatten(-2), scale.squeeze(-1)


def norm_patterns(
    name: str,
    fn: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    rest: Mapping[str, Any] | None = None,
) -> tuple[Pattern, ...]:
    """One pattern for each meaning of a norm: its roundings, and the dtype of its weight.

    fn takes the tensors, ``weight``, ``eps``, the rest, and ``norm``: the norm to use, in plain PyTorch.
    """
    seen: dict[tuple[str, Any], Pattern] = {}
    last = next(iter(tensors.values())).shape[-1]
    for spelling in meanings.NORMS:
        mode, dtype = spelling.constants["weight_mode"], spelling.inputs["weight"].dtype  # type: ignore[union-attr]
        inputs = {**tensors, "weight": Tensor(last, dtype=dtype), "eps": Scalar(), **(rest or {})}
        label = f"{name}, {mode}" + (", float32 weight" if dtype else "")
        seen.setdefault(
            (mode, dtype),
            Pattern(functools.partial(fn, norm=spelling.fn), inputs, spelling.constants, label),
        )
    return tuple(seen.values())
