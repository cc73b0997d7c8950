"""A decoder layer of the shape of Llama-3-8B whose linears torchao has quantized, against stock `torch.compile` of it.

Needs torchao and a GPU (compute capability 8.9 or newer); without torchao there are no cases.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.case import Case, Inputs, Target, activation, close
from bench.suites.layer import FULL, models

TOKENS = (1, 16, 256, 4096)
SCHEMES = ("float8_per_row", "float8_per_tensor", "float8_per_block", "int8", "int8_asymmetric")
"""Each is a part of its case's name: `bench run --suite torchao --case int8( --tokens 16` selects one."""


def schemes() -> dict[str, Callable[[], Any]]:
    """Constructors of torchao's configurations, by the name of the case."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig as Float8
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig as Int8
    from torchao.quantization import MappingType, PerRow, PerTensor
    from torchao.quantization.granularity import PerBlock

    return {
        "float8_per_tensor": lambda: Float8(granularity=PerTensor()),
        "float8_per_row": lambda: Float8(granularity=PerRow()),
        "float8_per_block": lambda: Float8(granularity=[PerBlock([1, 128]), PerBlock([128, 128])]),
        "int8": Int8,
        "int8_asymmetric": lambda: Int8(act_mapping_type=MappingType.ASYMMETRIC, version=2),
    }


@lru_cache(maxsize=1)
def quantized(scheme: str, device: torch.device) -> nn.Module:
    """The layer, and Inductor as torchao sets it up but for the tuning by coordinate descent.

    That takes 20 seconds a layer on either side.
    """
    import torch._inductor.config as inductor
    from torchao.quantization import quantize_

    model = copy.deepcopy(models(device, False)[1])
    quantize_(model, schemes()[scheme]())
    inductor.coordinate_descent_tuning = False
    return model.requires_grad_(False)


def decoder_layer(model: nn.Module, hidden_states: Tensor) -> Tensor:
    return model(hidden_states)


def _inputs(device: torch.device, scheme: str, tokens: int) -> Inputs:
    return quantized(scheme, device), activation(device, 1, tokens, FULL["hidden"])


def cases(tiny: bool = False) -> Iterator[Case]:
    if tiny or importlib.util.find_spec("torchao") is None:
        return
    hidden, intermediate = FULL["hidden"], FULL["intermediate"]
    kv = hidden * FULL["kv_heads"] // FULL["heads"]
    parameters = hidden * (2 * hidden + 2 * kv) + 3 * hidden * intermediate
    for scheme in SCHEMES:
        for tokens in TOKENS:
            yield Case(
                name=f"llama_layer_torchao_{scheme}",
                sizes={"tokens": tokens, "hidden": hidden, "intermediate": intermediate},
                inputs=partial(_inputs, scheme=scheme, tokens=tokens),
                plain=decoder_layer,
                check=close(5e-2),
                moved_bytes=parameters + 4 * tokens * hidden,
                flops=2 * tokens * parameters,
                targets=(Target("of_inductor", 1.15 if tokens == 4096 else 0.97),),
            )
