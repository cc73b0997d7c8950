"""Quantization to codes that no known meaning makes, and told all the same.

clamp(round(x / scale) + zero_point, 0, 255).to(uint8)
(x / scale).to(float8_e5m2)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fusion_passes import index_map
from fusion_passes.experts.reading import number
from fusion_passes.operations import describe, is_tensor, module_path, read, shape_of, transparent
from fusion_passes.reporting import NearMiss

FUSION = "quantization"
MOST = 255
ACCEPTED = {
    torch.uint8: "int8, which is the same with 128 less in every code and zero point, and float8_e4m3fn",
    torch.float8_e5m2: "float8_e4m3fn and int8",
    torch.float8_e4m3fnuz: "float8_e4m3fn and int8",
    torch.float8_e5m2fnuz: "float8_e4m3fn and int8",
}
_CUTS = {"aten.clamp.default", "aten.clamp_max.default", "aten.minimum.default"}
_ROUND = "aten.round.default"
_ON_THE_WAY = {
    "cast", "add", "sub", _ROUND, "aten.clamp_min.default", "aten.maximum.default", *_CUTS,
}  # fmt: skip


def find(graph: fx.Graph) -> Iterator[NearMiss]:
    """One near miss for each cast of values over a scale to such codes; of whole ones, where they are rounded."""
    for node in graph.nodes:
        operation = describe(node)
        dtype = node.meta["val"].dtype if is_tensor(node) else None
        if operation is None or operation.name != "cast" or dtype not in ACCEPTED:
            continue
        if _is_quantized(node, whole=dtype is torch.uint8):
            codes = str(dtype).removeprefix("torch.")
            reason = f"{node.name} makes codes of {codes}; accepted: {ACCEPTED[dtype]}"
            yield NearMiss(FUSION, module_path(node), node.name, reason)


def _is_quantized(codes: fx.Node, whole: bool) -> bool:
    stack, seen, found = [(codes, False)], set[fx.Node](), False
    while stack:
        node, rounded = stack.pop()
        operation = describe(node)
        if node in seen or operation is None:
            continue
        seen.add(node)
        tensors = [operand for operand in operation.operands if is_tensor(operand)]
        if (step := transparent(node)) is not None:
            stack.append((step[0], rounded))
        elif operation.name in _ON_THE_WAY:
            ends = map(number, operation.operands[1:]) if operation.name in _CUTS else ()
            if whole and any(end is not None and 0 < end < MOST for end in ends):
                continue  # codes of fewer bits, which the bytes are packed of
            rounded |= operation.name == _ROUND
            stack += [(tensor, rounded) for tensor in tensors]
        elif operation.name in ("div", "mul") and (rounded or not whole):
            found |= _is_by_a_scale(node, tensors)
    return found


def _is_by_a_scale(product: fx.Node, tensors: list[Any]) -> bool:
    """Whether one factor is of several elements: not pixels by a number, and no zero point, which has a scale each."""
    size = index_map.product(shape_of(product))
    each = [index_map.product(shape_of(read(tensor, None)[-1][0])) for tensor in tensors]
    return len(each) == 2 and not all(index_map.same_size(one, size) for one in each)
