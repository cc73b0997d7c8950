"""Small models of linears, for quantize_."""

from __future__ import annotations

import torch
from torch import nn

import fusion_passes
from fusion_passes.testing import fuse


class Model(nn.Module):
    """Tied embeddings, a projection that keeps its bias, an output projection."""

    def __init__(self, tied: bool = False, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.embed = nn.Embedding(40, 64, dtype=dtype)
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=bool(i), dtype=dtype) for i in range(2))
        self.head = nn.Linear(64, 40, bias=False, dtype=dtype)
        self.lm_head = nn.Linear(64, 40, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(128, 128, dtype=torch.bfloat16) for _ in range(2)))


def assert_fuses(model: nn.Module, x: torch.Tensor) -> None:
    result = fuse(model, x, only=[fusion_passes.registry()["block_scaled_linear"]])
    assert result.report.matches == {"block_scaled_linear": 2}, result.report
