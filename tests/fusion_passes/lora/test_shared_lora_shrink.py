"""The adapters of linears that read one activation shrink it once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fusion_passes import manager as pass_manager
from fusion_passes import settings, torch_internals
from fusion_passes.lora import AdapterManager
from fusion_passes.quantize import Fp8BlockLinear
from fusion_passes.reporting import Report
from tests.fusion_passes.helpers import everything, random
from tests.fusion_passes.test_fusions import few

pytestmark = pytest.mark.usefixtures("references")
WIDTHS = {"q_proj": 128, "k_proj": 256, "v_proj": 40}


class Attention(nn.Module):
    """Three projections of one activation, and one of what they make."""

    def __init__(self) -> None:
        super().__init__()
        for name, rows in (*WIDTHS.items(), ("o_proj", 128)):
            linear = nn.Linear(128, rows, bias=False, dtype=torch.bfloat16)
            setattr(self, name, Fp8BlockLinear.from_linear(linear))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q = self.q_proj(x)
        return self.k_proj(x), self.v_proj(x), self.o_proj(q)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Attention()])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.layers[0](x)


def adapter(ranks: dict[str, int], seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    tensors, rows = {}, {**WIDTHS, "o_proj": 128}
    for name, rank in ranks.items():
        stem = f"layers.0.{name}.lora_"
        tensors[f"{stem}A.weight"] = torch.randn(rank, 128, generator=generator) / 16
        tensors[f"{stem}B.weight"] = torch.randn(rows[name], rank, generator=generator)
    config = {"peft_type": "LORA", "r": 1, "rank_pattern": ranks, "lora_alpha": 8}
    return config | {"target_modules": [*ranks]}, tensors


def managed(*adapters: dict[str, int]) -> AdapterManager:
    manager = AdapterManager(
        Model().eval().requires_grad_(False),
        max_loaded=8,
        max_resident=2,
        max_rank=40,
        max_tokens=16,
    )
    for index, ranks in enumerate(adapters):
        manager.add(str(index), adapter(ranks, index))
    return manager


def rewritten(
    fn: Callable[..., Any], x: Tensor, *without: str
) -> tuple[fx.GraphModule, Report, list[Tensor]]:
    """The graph of a call after every fusion but some, the report, and what it computes."""
    (graph,) = torch_internals.capture(fn, x)
    only = [fusion for fusion in everything() if fusion.name not in without]
    allowed = settings.current().model_copy(update={"allow_reference": True})
    report = pass_manager.run(graph.graph, allowed, only)
    graph.recompile()
    with torch.no_grad():
        return graph, report, list(graph(*graph.meta["inputs"]))


def test_one_shrink_for_q_k_and_v() -> None:
    manager = managed(dict.fromkeys((*WIDTHS, "o_proj"), 8))
    with manager.step(["0", None], 3):
        graph, report, _ = rewritten(manager.model, random(2, 3, 128))
    assert report.matches["shared_lora_shrink"] == 2
    targets = [str(node.target) for node in graph.graph.nodes]
    assert targets.count("custom_ops.lora_shrink.default") == 1
    assert targets.count("custom_ops.lora_expand.default") == 3
    assert targets.count("custom_ops.lora_add.default") == 1  # o_proj reads something else
    (shrink,) = [n for n in graph.graph.nodes if "lora_shrink" in str(n.target)]
    assert len(shrink.args[1]) == 3


@few(8)
@given(
    first=st.fixed_dictionaries({}, optional=dict.fromkeys(WIDTHS, st.integers(1, 40))),
    second=st.fixed_dictionaries({}, optional=dict.fromkeys(WIDTHS, st.integers(1, 40))),
)
def test_adapters_of_any_ranks(first: dict[str, int], second: dict[str, int]) -> None:
    """Bit for bit what the linears compute one by one, also over what other adapters left in the slots."""
    stale = dict.fromkeys((*WIDTHS, "o_proj"), 40)
    manager = managed(stale, stale, first or {"q_proj": 1}, second or {"v_proj": 17})
    for name in "0123":
        manager.activate(name)
    with manager.step(["2", "3", None], 2):
        x = random(3, 2, 128)
        _, report, together = rewritten(manager.model, x)
        _, _, apart = rewritten(manager.model, x, "shared_lora_shrink")
    assert report.matches["shared_lora_shrink"] == 2
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)


def test_symbolic_tokens() -> None:
    manager, x = managed(dict.fromkeys(WIDTHS, 8)), random(2, 3, 128)
    torch._dynamo.mark_dynamic(x, 1)
    with manager.step(["0", None], 3):
        _, report, actual = rewritten(manager.model, x)
        expected = manager.model(x)
    assert report.matches["shared_lora_shrink"] == 2
    for one, other in zip(actual, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.05


def test_a_slot_that_is_made_between_the_two_is_left_alone() -> None:
    """Its shrink cannot move up to where the first one is."""
    manager = managed(dict.fromkeys(WIDTHS, 8))
    layers = manager._linears
    q, k = layers["layers.0.q_proj"], layers["layers.0.k_proj"]

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        first = q(x)
        k.lora_a = k.lora_a * first.float().mean().sign().bfloat16()
        return first, k(x)

    with manager.step(["0"], 3):
        _, report, _ = rewritten(call, random(3, 128))
    assert "shared_lora_shrink" not in report.matches
