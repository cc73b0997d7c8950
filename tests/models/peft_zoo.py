"""Small models with adapters of PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fusion_passes
from tests.models.zoo import build, tokens

pytest.importorskip("transformers", reason="needs the extra 'models'")
peft = pytest.importorskip("peft", reason="needs the extra 'models'")


LAYERS = 2
KINDS = ("llama", "qwen3")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config(rank: int = 8, targets: tuple[str, ...] = ALL, **options: Any) -> Any:
    defaults = {"lora_alpha": 24, "init_lora_weights": False}
    return peft.LoraConfig(r=rank, target_modules=[*targets], **{**defaults, **options})


def adapted(
    kind: str = "llama",
    adapter: str = "float32",
    scheme: str = "bf16",
    order: str = "before",
    layers: int = LAYERS,
    **options: Any,
) -> Any:
    """A model with one adapter. scheme: of its linears; order: whether they were quantized before PEFT or after."""
    model = copy.deepcopy(build(kind, scheme if order == "before" else "bf16", layers))
    torch.manual_seed(1)
    wide = adapter == "float32"
    adapted_model = peft.get_peft_model(model, config(**options), autocast_adapter_dtype=wide)
    if scheme != "bf16" and order == "after":
        fusion_passes.quantize_(adapted_model, scheme)
    assert adapted_dtype(adapted_model) is (torch.float32 if wide else torch.bfloat16)
    return adapted_model.eval()


def adapted_dtype(model: Any) -> torch.dtype:
    return next(p.dtype for name, p in model.named_parameters() if "lora_A" in name)


def everything() -> list[fusion_passes.Fusion]:
    return list(fusion_passes.registry().values())


def implementations(report: fusion_passes.Report) -> list[str]:
    return [
        i for site in report.sites if site.fusion == "lora_linear" for i in site.implementations
    ]


NAMES = ["one", "__base__", "two", "three", "one"]


def mixed(
    scheme: str = "bf16",
    adapter: str = "float32",
    saved: list[str] | None = None,
    layers: int = LAYERS,
) -> Any:
    """A model with three adapters that differ in rank, scaling and targets."""
    model = copy.deepcopy(build("llama", scheme, layers))
    wide = {"autocast_adapter_dtype": adapter == "float32"}
    torch.manual_seed(1)
    result = peft.get_peft_model(model, config(8, modules_to_save=saved), "one", **wide)
    result.add_adapter(
        "two", config(3, ("q_proj", "down_proj"), use_rslora=True, modules_to_save=saved), **wide
    )
    result.add_adapter(
        "three", config(16, ("v_proj",), lora_alpha=64, modules_to_save=saved), **wide
    )
    for name, parameter in result.named_parameters():
        if "modules_to_save" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return result.eval().requires_grad_(False)


def batch(rows: int, length: int) -> torch.Tensor:
    return torch.cat([tokens(length * rows)]).view(rows, length)


def errors(actual: torch.Tensor, expected: torch.Tensor) -> list[float]:
    """Row by row, the norm of the difference over the norm."""
    pairs = zip(actual.double(), expected.double(), strict=True)
    return [float((a - e).norm() / e.norm()) for a, e in pairs]
