"""Which modules of a model take adapters."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fusion_passes.lora.layers import ACTIVATION_DTYPES, compute_dtype, is_linear

__all__ = ["chosen", "one_of_each", "replace"]


def chosen(
    model: nn.Module, target_modules: Sequence[str] | None, modules_to_save: Sequence[str]
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The linears that get slots and the modules that may be replaced, by name."""
    named = dict(model.named_modules())
    # nobody has layers of PEFT who did not import it
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")
    for name, module in named.items() if peft else ():
        if isinstance(module, peft.BaseTunerLayer):
            raise ValueError(
                f"{name} has adapters of PEFT; accepted: a model without them, or from_peft(model), which keeps them"
            )
    saved = {
        name: module
        for name, module in named.items()
        if any(ends_in(wanted, name) for wanted in modules_to_save)
    }
    for name, module in saved.items():
        if type(module) not in (nn.Linear, nn.Embedding):
            raise ValueError(
                f"modules_to_save names {name}, a {type(module).__name__}; accepted: torch.nn.Linear and Embedding"
            )
    linears = {
        name: module
        for name, module in named.items()
        if is_linear(module)
        and name not in saved
        and (
            any(part.isdigit() for part in name.split("."))
            if target_modules is None
            else any(ends_in(wanted, name) for wanted in target_modules)
        )
    }
    for argument, wanted, found in (
        ("target_modules", target_modules or (), linears),
        ("modules_to_save", modules_to_save, saved),
    ):
        for suffix in wanted:
            if not any(ends_in(suffix, name) for name in found):
                kinds = sorted({type(m).__name__ for n, m in named.items() if ends_in(suffix, n)})
                what = f"a {kinds[0]}" if kinds else "no module of the model"
                raise ValueError(
                    f"{argument} names {suffix!r}, which is {what}; accepted: the end of a linear's name"
                )
    if not linears:
        raise ValueError(
            "the model has no torch.nn.Linear or Conv1D that could take an adapter; see target_modules"
        )
    return linears, saved


def one_of_each(linears: Mapping[str, nn.Module]) -> tuple[torch.dtype, torch.device]:
    first = next(iter(linears))
    dtype, device = compute_dtype(linears[first]), _device(linears[first])
    for name, linear in linears.items():
        found = compute_dtype(linear)
        if found not in ACTIVATION_DTYPES or found != dtype:
            accepted = dtype if dtype in ACTIVATION_DTYPES else "torch.bfloat16, torch.float16"
            raise ValueError(f"{name} computes in {found}; accepted: {accepted}")
        if _device(linear) != device:
            raise ValueError(
                f"{name} is on {_device(linear)}, {first} on {device}; accepted: one device"
            )
    return dtype, device


def _device(linear: nn.Module) -> torch.device:
    return linear.weight.device  # type: ignore[return-value]


def ends_in(suffix: str, name: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
