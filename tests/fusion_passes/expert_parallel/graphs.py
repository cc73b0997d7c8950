"""Graphs with a dispatch in them, before and after their rewrite."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import custom_ops
from fusion_passes import manager, registry, settings, torch_internals
from fusion_passes.reporting import Report

NAME = "quantize_before_dispatch"


@dataclass
class Rewritten:
    """Both sides of one graph, and what they return for the inputs that it was traced with."""

    before: fx.GraphModule
    after: fx.GraphModule
    report: Report
    expected: list[Tensor]
    actual: list[Tensor]

    @property
    def reasons(self) -> list[str]:
        return [miss.reason for miss in self.report.near_misses if miss.fusion == NAME]

    def calls(self) -> list[str]:
        """The custom ops of the rewritten graph, in order."""
        targets = [str(node.target) for node in self.after.graph.nodes]
        return [t.split(".")[1] for t in targets if t.startswith("custom_ops.")]


def rewrite(
    fn: Callable[..., Any],
    *args: Any,
    only: Sequence[str] = (NAME,),
    allow_reference: bool = True,
    dynamic: bool = False,
) -> Rewritten:
    """Trace a call to its one graph and rewrite a copy of it. dynamic: for any number of tokens."""
    for tensor in args if dynamic else ():
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        (before,) = torch_internals.capture(fn, *args)
    after = fx.GraphModule(before, copy.copy(before.graph))
    after.graph = fx.Graph(after)
    after.graph.output(after.graph.graph_copy(before.graph, {}))
    chosen = settings.current().model_copy(update={"allow_reference": allow_reference})
    report = manager.run(after.graph, chosen, [registry()[name] for name in only])
    after.graph.lint()
    after.recompile()
    inputs = before.meta["inputs"]
    with torch.no_grad():
        return Rewritten(before, after, report, list(before(*inputs)), list(after(*inputs)))


def fp8_experts(count: int = 4, hidden: int = 256, inner: int = 128, seed: int = 0) -> dict:
    """Weights of block-scaled experts, as fused_moe takes them."""
    generator = torch.Generator().manual_seed(seed)
    given = {}
    for name, shape in (("gate_up", (count, 2 * inner, hidden)), ("down", (count, hidden, inner))):
        weight = torch.randn(shape, generator=generator)
        given[name] = weight.to(torch.float8_e4m3fn)
        scales = count, -(-shape[1] // 128), -(-shape[2] // 128)
        given[f"{name}_scale"] = 0.05 + 0.1 * torch.rand(scales, generator=generator)
    return given


def tokens(
    count: int, hidden: int = 256, experts: int = 4, top_k: int = 2, dtype: Any = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights; some values zero, huge or tiny."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, hidden, generator=generator)
    if count > 2:
        x[0, :128], x[1, 3], x[2] = 0, 3e4, x[2] * 1e-6
    ids = torch.rand(count, experts, generator=generator).argsort(1)[:, :top_k]
    return x.to(dtype), ids.contiguous(), torch.rand(count, top_k, generator=generator)


def layer(
    group: str, num_experts: int, given: dict, max_tokens: int = 0, **how: Any
) -> Callable[..., Tensor]:
    """dispatch in 16 bits -> fused_moe with FP8 weights -> combine."""

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows, _, local, recv_weights, _, *handle = custom_ops.ep_dispatch(
            x, None, ids, weights, num_experts, group, max_tokens=max_tokens
        )
        y = custom_ops.fused_moe(
            rows,
            given["gate_up"],
            given["down"],
            recv_weights,
            local,
            gate_up_scale=given["gate_up_scale"],
            down_scale=given["down_scale"],
            **how,
        )
        return custom_ops.ep_combine(y, *handle, group)

    return run
