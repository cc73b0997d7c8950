"""The adapters of linears that read one activation shrink it once: those of a batch, and PEFT's."""

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
from fusion_passes.testing import fuse
from tests.fusion_passes.helpers import everything, fuse_all, random
from tests.fusion_passes.lora.test_lora_linear import Adapted
from tests.fusion_passes.test_fusions import few

pytestmark = pytest.mark.usefixtures("references")
WIDTHS = {"q_proj": 128, "k_proj": 256, "v_proj": 40}


class Attention(nn.Module):
    """Three projections of one activation, and one of what they make. plain: in 16 bits, not block-FP8."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        for name, rows in (*WIDTHS.items(), ("o_proj", 128)):
            linear = nn.Linear(128, rows, bias=plain and name == "k_proj", dtype=torch.bfloat16)
            setattr(self, name, linear if plain else Fp8BlockLinear.from_linear(linear))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q = self.q_proj(x)
        return self.k_proj(x), self.v_proj(x), self.o_proj(q)


class Model(nn.Module):
    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Attention(plain)])

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


def managed(*adapters: dict[str, int], plain: bool = False) -> AdapterManager:
    manager = AdapterManager(
        Model(plain).eval().requires_grad_(False),
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


def test_one_op_for_plain_q_k_and_v() -> None:
    manager = managed(dict.fromkeys((*WIDTHS, "o_proj"), 8), plain=True)
    with manager.step(["0", None], 3):
        graph, report, _ = rewritten(manager.model, random(2, 3, 128))
    assert report.matches["shared_lora_shrink"] == 2
    targets = [str(node.target) for node in graph.graph.nodes]
    assert targets.count("custom_ops.lora_linears.default") == 1
    assert targets.count("custom_ops.lora_linear.default") == 1  # o_proj reads something else


@pytest.mark.parametrize("plain", [False, True])
@few(8)
@given(
    first=st.fixed_dictionaries({}, optional=dict.fromkeys(WIDTHS, st.integers(1, 40))),
    second=st.fixed_dictionaries({}, optional=dict.fromkeys(WIDTHS, st.integers(1, 40))),
)
def test_adapters_of_any_ranks(plain: bool, first: dict[str, int], second: dict[str, int]) -> None:
    """Bit for bit what the linears compute one by one, also over what other adapters left in the slots."""
    stale = dict.fromkeys((*WIDTHS, "o_proj"), 40)
    ranks = first or {"q_proj": 1}, second or {"v_proj": 17}
    manager = managed(stale, stale, *ranks, plain=plain)
    for name in "0123":
        manager.activate(name)
    with manager.step(["2", "3", None], 2):
        x = random(3, 2, 128)
        _, report, together = rewritten(manager.model, x)
        _, _, apart = rewritten(manager.model, x, "shared_lora_shrink")
    assert report.matches["shared_lora_shrink"] == 2
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("plain", [False, True])
def test_symbolic_tokens(plain: bool) -> None:
    manager, x = managed(dict.fromkeys(WIDTHS, 8), plain=plain), random(2, 3, 128)
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


# PEFT's layers


class Layers(nn.Module):
    """Layers on one activation, some of them after something else was done to it."""

    def __init__(self, ranks: list[int], adapter: torch.dtype | None, biases: list[bool]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Adapted(24, 8 * (index + 1), rank, 0.5 * (index + 1), adapter=adapter, bias=bias)
            for index, (rank, bias) in enumerate(zip(ranks, biases, strict=True))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


def merged(result: Any) -> list[fx.Node]:
    return [n for n in result.after.graph.nodes if "lora_linears_single" in str(n.target)]


@few(12)
@given(
    ranks=st.lists(st.sampled_from((2, 4, 8)), min_size=1, max_size=4),
    adapter=st.sampled_from((None, torch.float32)),
    lead=st.sampled_from(((5,), (2, 3))),
    data=st.data(),
)
def test_layers_of_peft_with_one_rank_become_one_op(
    ranks: list[int], adapter: torch.dtype | None, lead: tuple[int, ...], data: Any
) -> None:
    biases = [data.draw(st.booleans()) for _ in ranks]
    module = Layers(ranks, adapter, biases).eval()
    x = random(*lead, 24)
    result = fuse_all(module, x)
    apart = fuse(module, x, only=[f for f in everything() if f.name != "shared_lora_shrink"])
    alike = [ranks.count(rank) for rank in set(ranks) if ranks.count(rank) > 1]
    assert sorted(len(node.args[1]) for node in merged(result)) == sorted(alike)
    assert result.report.matches.get("shared_lora_shrink", 0) == sum(alike) - len(alike)
    for one, other in zip(result.actual, apart.actual, strict=True):
        assert torch.equal(one, other)


def test_symbolic_tokens_of_peft() -> None:
    x = random(1, 5, 24)
    torch._dynamo.mark_dynamic(x, 1)
    result = fuse_all(Layers([4, 4], torch.float32, [False, True]).eval(), x)
    (node,) = merged(result)
    assert len(node.args[1]) == 2
    assert [n.args for n in result.after.graph.nodes if "getitem" in str(n.target)] == [
        (node, 0),
        (node, 1),
    ]


def other_input(module: Layers, x: Tensor) -> tuple[Tensor, ...]:
    first, second = module.layers
    return first(x), second(x.sin())


def weight_made_in_between(module: Layers, x: Tensor) -> tuple[Tensor, ...]:
    first, second = module.layers
    out = first(x)
    wide = second.lora_B.weight * out.float().mean().sign()
    delta = torch.nn.functional.linear(second.lora_A(x), wide.bfloat16()) * 0.5
    return out, second.base_layer(x) + delta


@pytest.mark.parametrize("call", [other_input, weight_made_in_between])
def test_layers_of_peft_that_share_nothing_stay(call: Callable[..., Any]) -> None:
    module = Layers([4, 4], None, [False, False]).eval()
    result = fuse_all(lambda x: call(module, x), random(5, 24))
    assert result.report.matches["lora_linear"] == 2
    assert "shared_lora_shrink" not in result.report.matches


def test_adapters_of_two_dtypes_stay_apart() -> None:
    module = Layers([4, 4], None, [False, False]).eval()
    module.layers[1].lora_A.float()
    module.layers[1].lora_B.float()
    result = fuse_all(module, random(5, 24))
    assert result.report.matches["lora_linear"] == 2
    assert "shared_lora_shrink" not in result.report.matches


# PEFT's layers over linears that are no plain ones


class Fp8Layers(nn.Module):
    """PEFT's layers over block-FP8 linears: q, k, v of one activation, and one of what they make."""

    def __init__(self, ranks: list[int], adapter: torch.dtype | None) -> None:
        super().__init__()
        options: Any = {"adapter": adapter, "base": Fp8BlockLinear.from_linear}
        self.layers = nn.ModuleList(
            Adapted(128, 128 * (index + 1), rank, 0.5 * (index + 1), **options)
            for index, rank in enumerate(ranks)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first, *others = self.layers
        out = first(x)
        # the others come after something was made of the first, as rotary embeddings are
        return out.sin(), *(layer(x) for layer in others)


def counts(graph: fx.Graph) -> tuple[list[int], int, int]:
    """The slices of each merged shrink, the expands, and what stayed alone."""
    nodes = {
        name: [n for n in graph.nodes if str(n.target) == f"custom_ops.{name}.default"]
        for name in ("lora_shrink_single", "lora_expand_single", "lora_add_single")
    }
    shrinks, expands, alone = nodes.values()
    return sorted(len(node.args[1]) for node in shrinks), len(expands), len(alone)


@few(8)
@given(
    ranks=st.lists(st.sampled_from((2, 8)), min_size=1, max_size=4),
    adapter=st.sampled_from((None, torch.float32)),
    lead=st.sampled_from(((5,), (2, 3))),
)
def test_layers_of_peft_over_block_fp8_linears(
    ranks: list[int], adapter: torch.dtype | None, lead: tuple[int, ...]
) -> None:
    module, x = Fp8Layers(ranks, adapter).eval().requires_grad_(False), random(*lead, 128)
    graph, report, together = rewritten(module, x)
    _, _, apart = rewritten(module, x, "shared_lora_shrink")
    alike = sorted(ranks.count(rank) for rank in set(ranks) if ranks.count(rank) > 1)
    assert counts(graph.graph) == (alike, sum(alike), len(ranks) - sum(alike))
    assert report.matches.get("shared_lora_shrink", 0) == sum(alike) - len(alike)
    for one, other in zip(together, apart, strict=True):
        assert torch.equal(one, other)


def test_symbolic_tokens_of_peft_over_block_fp8_linears() -> None:
    module, x = Fp8Layers([4, 4, 4], torch.float32).eval().requires_grad_(False), random(2, 3, 128)
    torch._dynamo.mark_dynamic(x, 1)
    graph, _, actual = rewritten(module, x)
    assert counts(graph.graph) == ([3], 3, 0)
    for one, other in zip(actual, module(x), strict=True):
        assert float((one - other).norm() / other.norm()) < 0.05


def test_a_shrink_of_what_is_made_in_between_stays() -> None:
    """Its matrix is not there yet where the first one shrinks."""
    first, second = Fp8Layers([4, 4], None).eval().requires_grad_(False).layers

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        out = first(x)
        a = second.lora_A.weight * out.float().mean().sign().bfloat16()
        delta = torch.nn.functional.linear(torch.nn.functional.linear(x, a), second.lora_B.weight)
        return out, second.base_layer(x) + delta * 0.5

    graph, report, _ = rewritten(call, random(5, 128))
    assert report.matches["lora_linear"] == 2
    assert counts(graph.graph) == ([], 0, 2)
