"""Fused kernels for stock PyTorch models: ``torch.compile(model, backend="fusion_passes")``.

Importing this package is cheap: it compiles nothing, initialises no GPU and imports no optional package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fusion_passes.after_import import after_import

if TYPE_CHECKING:
    from fusion_passes.backend import explain, inductor_options
    from fusion_passes.expert_parallel import parallelize_experts_
    from fusion_passes.fusion import (
        Constraint,
        Fusion,
        Pattern,
        Scalar,
        SizeOf,
        Tensor,
    )
    from fusion_passes.quantize import quantize_
    from fusion_passes.registered import register, registry
    from fusion_passes.reporting import NearMiss, Report, Site, report, reports, reset_reports
    from fusion_passes.warming import JitEvent, WarmupPlan, jit_events, warmup, warmup_plan

_HOMES = {
    "backend": ("explain", "inductor_options"),
    "expert_parallel": ("parallelize_experts_",),
    "fusion": (
        "Constraint",
        "Fusion",
        "Pattern",
        "Scalar",
        "SizeOf",
        "Tensor",
    ),
    "quantize": ("quantize_",),
    "registered": ("register", "registry"),
    "reporting": ("NearMiss", "Report", "Site", "report", "reports", "reset_reports"),
    "warming": ("JitEvent", "WarmupPlan", "jit_events", "warmup", "warmup_plan"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Constraint",
    "Fusion",
    "JitEvent",
    "NearMiss",
    "Pattern",
    "Report",
    "Scalar",
    "Site",
    "SizeOf",
    "Tensor",
    "WarmupPlan",
    "explain",
    "inductor_options",
    "jit_events",
    "lora",
    "parallelize_experts_",
    "quantize_",
    "register",
    "registry",
    "report",
    "reports",
    "reset_reports",
    "settings",
    "warmup",
    "warmup_plan",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"fusion_passes.{_HOME_OF[name]}"), name)
    elif name in ("lora", "settings"):
        value = importlib.import_module(f"fusion_passes.{name}")
    else:
        raise AttributeError(f"module 'fusion_passes' has no attribute {name!r}")
    globals()[name] = value
    return value


def _register_experts() -> None:
    importlib.import_module("fusion_passes.transformers_experts").register()


def _register_fp8_experts() -> None:
    importlib.import_module("fusion_passes.transformers_experts").register_fp8()


after_import("transformers.integrations.moe", _register_experts)
after_import("transformers.integrations.finegrained_fp8", _register_fp8_experts)
