"""Captures the graphs of torchao's quantized linears: `python -m tests.captures.capture FOLDER` on a GPU.

The model is one decoder layer of a small Llama from transformers, with widths that every scheme accepts.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from bench.suites import torchao
from tests.captures import graphs


def schemes() -> dict[str, Callable[[], Any]]:
    """Constructors of the torchao configurations, by the name of the capture."""
    return {f"torchao_{name}": make for name, make in torchao.schemes().items()}


def layer(scheme: Callable[[], Any], device: str, **sizes: int) -> nn.Module:
    """A Llama of one layer without its embedding, its linears quantized by torchao; takes [1, tokens, hidden]."""
    from torchao.quantization import quantize_
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=32,
        num_hidden_layers=1,
        **{
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
        | sizes,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaModel(config).to(torch.bfloat16).eval()
    quantize_(model, scheme())
    return model


def captured(model: nn.Module, hidden_states: torch.Tensor) -> fx.Graph:
    """The first graph that the pass is handed while the model compiles; nothing is compiled."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor import config

    found: list[fx.Graph] = []

    def keep(graph: fx.Graph) -> None:
        found.append(graph)
        raise StopIteration("captured")

    torch.compiler.reset()
    patched = config.patch(joint_custom_pre_pass=keep, fx_graph_cache=False)
    with torch.no_grad(), patched, suppress(BackendCompilerFailed):
        torch.compile(model, dynamic=False)(inputs_embeds=hidden_states, use_cache=False)
    return found[0]


def main(folder: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ("torch", "torchao", "transformers")
    versions = {name: importlib.metadata.version(name) for name in names}
    versions["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    for name, scheme in schemes().items():
        x = torch.randn(2, 16, 512, dtype=torch.bfloat16, device=device)
        graph = captured(layer(scheme, device), x)
        path = Path(folder) / f"{name}.json"
        graphs.save(graph, path, versions, "python -m tests.captures.capture")
        print(f"{path.name}: {len(graph.nodes)} nodes")


if __name__ == "__main__":
    main(sys.argv[1])
