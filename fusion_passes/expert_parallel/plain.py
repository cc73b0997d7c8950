"""Experts in float32, in plain PyTorch: what sharded float32 models run, to be compared with one rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_experts(
    stock: Any,
    rows: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """[R, H] rows, [R, K] ids (-1: none here) and weights -> [R, H].

    gate_up [E, out, H], down [E, H, I] and their biases: of the experts here. stock: the module whose activation it is.
    Every expert takes every row, as how many are its own would have to be asked of the device, which breaks graphs.
    """
    out = torch.zeros_like(rows)
    for expert in range(down.shape[0]):
        bias, last = (None if b is None else b[expert] for b in (gate_up_bias, down_bias))
        first = F.linear(rows, gate_up[expert], bias)
        between = stock._apply_gate(first) if stock.has_gate else stock.act_fn(first)
        share = torch.where(ids == expert, weights, 0.0).sum(1, keepdim=True)
        out = out + F.linear(between, down[expert], last) * share
    return out
