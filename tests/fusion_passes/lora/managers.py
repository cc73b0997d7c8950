"""Managers with a few adapters, what the rows of a batch then see, and adapters whose outputs can be counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fusion_passes.lora import AdapterManager
from tests.fusion_passes.lora.adapters import merged, model, source

SOURCES = {
    "small": source(3, targets=("q_proj",), seed=1),
    "wide": source(20, seed=2, lora_alpha=10, use_rslora=True),
    "two": source(8, targets=("v_proj", "down_proj"), seed=3),
    "head": source(
        4,
        targets=("down_proj",),
        seed=4,
        modules_to_save=["score"],
        saved={
            "score.weight": torch.linspace(-1, 1, 160).view(5, 32),
            "score.bias": torch.arange(5.0),
        },
    ),
}


def managed(resident: int = 4, **options: Any) -> AdapterManager:
    defaults = {"max_loaded": 8, "max_rank": 20, "max_tokens": 64, "modules_to_save": ["score"]}
    manager = AdapterManager(model(), **{**defaults, "max_resident": resident, **options})
    for name, given_ in SOURCES.items():
        manager.add(name, given_)
    return manager


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 20, (rows, length), generator=torch.Generator().manual_seed(seed))


def expected(name: str | None, ids: torch.Tensor) -> torch.Tensor:
    base = model()
    wide = base.double() if name is None else merged(base, SOURCES[name])
    return wide(ids)


def assert_close(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """Within a few roundings to bfloat16 of float64; see below for how far apart adapters are."""
    error = float((actual.double() - exact).norm() / exact.norm())
    assert error < 0.06, f"{error:.2%} from float64"


class Counting(nn.Module):
    """Adapter ``k`` makes every element of both outputs exactly ``k``: half an adapter shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(64, 256, bias=False, dtype=torch.bfloat16) for _ in range(2)
        )
        for layer in self.layers:
            nn.init.zeros_(layer.weight)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers[0](x), self.layers[1](x)


def counting(value: int) -> Any:
    tensors = {}
    for index in range(2):
        tensors[f"layers.{index}.lora_A.weight"] = torch.full((4, 64), 1 / 64)
        tensors[f"layers.{index}.lora_B.weight"] = torch.full((256, 4), value / 4)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["layers.0", "layers.1"],
    }
    return config, tensors
