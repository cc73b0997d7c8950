"""Graphs of real models as data: written on the machine that can build the model, read wherever the tests run.

A file holds the graph that `fusion_passes` is handed (AOTAutograd's, before any pass of Inductor), node by node,
with the shape, dtype and strides of each value, and the versions that made it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

FOLDER = Path(__file__).parent
# what a graph calls of a library that is not here: the schema of its version in the capture
FOREIGN = {
    "ao.blockwise_fp8_gemm.default": (
        "blockwise_fp8_gemm(Tensor a, Tensor a_s, Tensor b, Tensor b_s, int block_size=128) -> Tensor"
    )
}
_stand_in = torch.library.Library("ao", "FRAGMENT")
_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)


def save(graph: fx.Graph, path: Path, versions: dict[str, str], command: str) -> None:
    """Write a graph of static sizes; raises TypeError for an argument that has no spelling in JSON."""
    nodes = [
        {
            "name": node.name,
            "op": node.op,
            "target": str(node.target),
            "args": _encode(node.args),
            "kwargs": _encode(node.kwargs),
            "val": _encode_value(node.meta.get("val")),
            "module": _module(node),
        }
        for node in graph.nodes
    ]
    lines = ",\n".join(json.dumps(node) for node in nodes)
    head = json.dumps({"versions": versions, "command": command})[1:-1]
    path.write_text(f'{{{head}, "nodes": [\n{lines}\n]}}\n')


def load(name: str, device: str = "cpu") -> fx.Graph:
    """The captured graph of this name, every value on ``device``."""
    captured = json.loads((FOLDER / f"{name}.json").read_text())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for entry in captured["nodes"]:
        args, kwargs = _decode(entry["args"], made, device), _decode(entry["kwargs"], made, device)
        target = entry["target"]
        if entry["op"] == "call_function":
            target = _function(target)
        node = graph.create_node(entry["op"], target, tuple(args), kwargs, name=entry["name"])
        with mode:
            node.meta["val"] = _decode_value(entry["val"], device)
        if entry["module"]:
            node.meta["nn_module_stack"] = {"": (entry["module"], torch.nn.Module)}
        made[entry["name"]] = node
    return graph


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def _function(target: str) -> Any:
    if target == "<built-in function getitem>":
        import operator

        return operator.getitem
    namespace, packet, overload = target.split(".")
    if target in FOREIGN and not hasattr(getattr(torch.ops, namespace), packet):
        _stand_in.define(FOREIGN[target])
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, _CONSTANTS):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": True}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": {key: _encode(item) for key, item in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"an argument of {type(value)} cannot be captured: {value!r}")


def _decode(value: Any, made: dict[str, fx.Node], device: str) -> Any:
    if isinstance(value, list):
        return [_decode(item, made, device) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "node":
        return made[inner]
    if kind == "torch":
        return getattr(torch, inner)
    if kind == "device":
        return torch.device(device)
    return {key: _decode(item, made, device) for key, item in inner.items()}


def _encode_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {
            "shape": list(value.shape),
            "stride": list(value.stride()),
            "dtype": str(value.dtype).removeprefix("torch."),
        }
    if isinstance(value, (list, tuple)):
        return [_encode_value(item) for item in value]
    return value if isinstance(value, (bool, int, float)) else None


def _decode_value(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return tuple(_decode_value(item, device) for item in value)
    if not isinstance(value, dict):
        return value
    return torch.empty_strided(
        value["shape"], value["stride"], dtype=getattr(torch, value["dtype"]), device=device
    )
