"""Small models, adapters as PEFT's files hold them, and what both compute, spelt out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, OUT = 32, 48
PROJECTIONS = {"q_proj": (WIDTH, OUT), "v_proj": (WIDTH, 16), "down_proj": (OUT, WIDTH)}
Source = tuple[dict[str, Any], dict[str, Tensor]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (columns, rows) in PROJECTIONS.items():
            linear = nn.Linear(columns, rows, bias=name == "q_proj", dtype=torch.bfloat16)
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.v_proj(x)).sum(-1, keepdim=True)
        return x + self.down_proj(self.q_proj(x) * gate)


class Model(nn.Module):
    """Embedding, blocks and a head; takes [rows, tokens] of ids."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH, dtype=torch.bfloat16)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.score = nn.Linear(WIDTH, 5, dtype=torch.bfloat16)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.score(x)


def model(blocks: int = 2, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(blocks).eval().requires_grad_(False)


def source(
    rank: int = 4,
    *,
    blocks: int = 2,
    targets: Sequence[str] = tuple(PROJECTIONS),
    seed: int = 0,
    prefix: str = "base_model.model.",
    saved: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Source:
    """A configuration and tensors as ``save_pretrained`` writes them; ``saved``: whole parameters, by name."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"{prefix}{name}": value for name, value in (saved or {}).items()}
    for block in range(blocks):
        for target in targets:
            columns, rows = PROJECTIONS[target]
            stem = f"{prefix}layers.{block}.{target}"
            tensors[f"{stem}.lora_A.weight"] = 0.3 * torch.randn(rank, columns, generator=generator)
            tensors[f"{stem}.lora_B.weight"] = 0.3 * torch.randn(rows, rank, generator=generator)
    base = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": [*targets],
        "bias": "none",
    }
    return base | config, tensors


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def merged(base: Model, source: Source) -> nn.Module:
    """The model in float64 with an adapter added to its weights: what a token of it should see."""
    config, tensors = source
    wide = model(len(base.layers))
    wide.load_state_dict(base.state_dict())
    wide = wide.double()
    parameters = dict(wide.named_parameters())
    for name, value in tensors.items():
        path = name.removeprefix("base_model.model.")
        if path in parameters:
            parameters[path].data.copy_(value)
        if path.endswith(".lora_A.weight"):
            stem = path.removesuffix(".lora_A.weight")
            a, b = value, tensors[name.replace("lora_A", "lora_B")]
            rank = a.shape[0]
            scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
            # as the slots hold them: rounded to 16 bits
            delta = b.bfloat16().double() @ a.bfloat16().double() * scaling
            parameters[f"{stem}.weight"].data += delta
    return wide
