"""Float8 products and the residual that is added to them: which become scaled_mm_add, and which stay as they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import ScalingType

from fusion_passes import manager, registry, settings, tables
from fusion_passes.testing import fuse
from tests.captures import graphs
from tests.fusion_passes.helpers import FP8, assert_same, calls, fuse_all, misses, random
from tests.fusion_passes.test_scaled_linear import codes, scales

pytestmark = pytest.mark.usefixtures("references", "fresh_reports")
NAME = "scaled_mm_add"
BF16 = torch.bfloat16
ONE = (1, 1)


class Down(torch.nn.Module):
    """The last product of an MLP as torchao writes it, and the sum behind it."""

    def __init__(self, k: int, n: int, shape=ONE, fast: bool = True, first: bool = False) -> None:
        super().__init__()
        self.fast, self.first = fast, first
        self.register_buffer("weight", codes(n, k, dtype=FP8))
        self.register_buffer("scale", scales(*shape))

    def product(self, q: torch.Tensor, scale: torch.Tensor, **more) -> torch.Tensor:
        out = torch._scaled_mm(
            q.reshape(-1, q.shape[-1]),
            self.weight.t(),
            scale,
            self.scale,
            **{"out_dtype": BF16, "use_fast_accum": self.fast} | more,
        )
        return out.reshape(*q.shape[:-1], -1)

    def forward(self, q, scale, residual):
        product = self.product(q, scale)
        return product + residual if self.first else residual + product


def judge(module: Down, q, scale, residual) -> torch.Tensor:
    weight = module.weight.double() * module.scale.double()
    return (q.double() * scale.double()) @ weight.t() + residual.double()


@given(
    lead=st.sampled_from(((5,), (1,), (2, 3), (1, 1), (1, 4))),
    k=st.sampled_from((16, 128, 256)),
    n=st.sampled_from((16, 48, 128)),
    shape=st.sampled_from((ONE, (1,), ())),
    fast=st.booleans(),
    first=st.booleans(),
    dynamic=st.booleans(),
)
def test_products_as_torchao_writes_them(lead, k, n, shape, fast, first, dynamic) -> None:
    module = Down(k, n, shape, fast, first)
    q, residual = codes(*lead, k, dtype=FP8), random(*lead, n)
    scale = scales(*lead, 1) if shape is None else scales(*shape)
    if (
        dynamic and len(lead) == 1 and lead[0] > 1
    ):  # of more, torch knows not that both products of sizes are one
        for x in (q, residual):
            torch._dynamo.mark_dynamic(x, 0)
    result = fuse_all(module, q, scale, residual, only=[NAME])
    assert result.report.matches == {NAME: 1}
    assert not [name for name in calls(result.after.graph) if "aten" in name and "_mm" in name]
    (made,) = [n for n in result.after.graph.nodes if "scaled_mm_add" in str(n.target)]
    assert made.kwargs.get("fast_sums", False) == fast
    exact = judge(module, q, scale, residual)
    ours, eager = (
        float((side[0].double() - exact).norm()) for side in (result.actual, result.expected)
    )
    assert ours <= 1.02 * eager + 1e-6 * float(exact.norm())


def test_by_the_public_function() -> None:
    module, recipe = Down(64, 32), ScalingType.TensorWise

    def total(q, scale, residual):
        product = F.scaled_mm(q, module.weight.t(), scale, recipe, module.scale, recipe)
        return residual + product

    if "2.11" in torch.__version__:
        pytest.skip("torch.compile of 2.11 breaks the graph at torch.nn.functional.scaled_mm")
    assert fuse_all(total, *inputs(), only=[NAME]).report.matches == {NAME: 1}


def test_scales_per_token_stay() -> None:
    """cuBLASLt loses more by the residual than the norm behind it wins: see the module of the fusion."""
    graph = graphs.load("torchao_float8_per_row")
    with settings.patch(fusions="all", allow_reference=True):
        report = manager.run(graph, settings.current())
    assert NAME not in report.matches
    assert NAME not in {miss.fusion for miss in report.near_misses}


def inputs(n: int = 32, dtype: torch.dtype = BF16) -> tuple[torch.Tensor, ...]:
    return codes(5, 64, dtype=FP8), scales(*ONE), random(5, n, dtype=dtype)


def test_a_product_that_is_read_elsewhere_stays() -> None:
    module = Down(64, 32)

    def both(q, scale, residual):
        product = module.product(q, scale)
        return product + residual, product

    result = fuse_all(both, *inputs(), only=[NAME])
    assert result.report.matches == {}
    assert_same(result)


def test_a_product_that_is_added_to_itself_stays() -> None:
    module = Down(64, 32)

    def twice(q, scale, residual):
        product = module.product(q, scale)
        return product + product

    result = fuse_all(twice, *inputs(), only=[NAME])
    assert result.report.matches == {}
    assert misses(result, NAME) == ["the product is added to itself"]


def test_a_residual_that_is_repeated_for_each_token_stays() -> None:
    module = Down(64, 32)
    result = fuse_all(
        lambda q, scale, residual: module.product(q, scale) + residual[:1], *inputs(), only=[NAME]
    )
    assert result.report.matches == {}
    assert_same(result)


def test_a_scaled_residual_stays() -> None:
    """alpha of add is another product."""
    module = Down(64, 32)
    result = fuse_all(
        lambda q, scale, residual: torch.add(module.product(q, scale), residual, alpha=2),
        *inputs(),
        only=[NAME],
    )
    assert result.report.matches == {}
    assert_same(result)


@pytest.mark.parametrize("fast", [False, True])
def test_a_bias_is_reported(fast: bool) -> None:
    module, bias = Down(64, 32, fast=fast), random(32)
    result = fuse_all(
        lambda q, scale, residual: module.product(q, scale, bias=bias) + residual,
        *inputs(),
        only=[NAME],
    )
    assert result.report.matches == {}
    assert misses(result, NAME) == ["a bias is added first"]


@pytest.mark.parametrize("fast", [False, True])
def test_float16_is_reported(fast: bool) -> None:
    module = Down(64, 32, fast=fast)
    result = fuse_all(
        lambda q, scale, residual: module.product(q, scale, out_dtype=torch.float16) + residual,
        *inputs(dtype=torch.float16),
        only=[NAME],
    )
    assert result.report.matches == {}
    assert misses(result, NAME) == ["out_dtype is torch.float16; accepted: torch.bfloat16"]


def test_both_sums_of_a_layer_of_torchao() -> None:
    """The norm between them reads the first, and has no sum to write any more."""
    graph = graphs.load("torchao_float8_per_tensor")
    with settings.patch(fusions="all", allow_reference=True):
        report = manager.run(graph, settings.current())
    assert report.matches[NAME] == 2
    assert "torch.ops.aten.add.Tensor" not in calls(graph)
    sites = {node.name: node for node in graph.nodes if "scaled_mm_add" in str(node.target)}
    first, second = sites.values()
    assert second.args[4] is first or first in second.args[4].all_input_nodes


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = [(16, 0.9), (256, 0.96), (1024, 1.1), (4096, 1.2)]
    rows = {name: {"on": True, "why": "ahead", "rows": []} for name in registry()}
    rows[NAME]["rows"] = [
        {"case": NAME, "tokens": tokens, "n": 48, "k": 128, "speedup": speedup}
        for tokens, speedup in measured
    ]
    monkeypatch.setattr(tables, "load", lambda: {90: {"arch": "sm_90", "fusions": rows}})
    monkeypatch.setattr(tables, "arch_of", lambda _device: "sm_90")


@pytest.mark.parametrize("tokens", [1, 16, 200, 1024, 5000])
def test_few_tokens_are_left_as_they_are(tokens: int, table: None) -> None:
    args = codes(tokens, 128, dtype=FP8), scales(*ONE), random(tokens, 48)
    result = fuse(Down(128, 48), *args)
    many = tokens >= 1024
    assert result.report.matches.get(NAME, 0) == many
    assert bool(misses(result, NAME)) == (not many)
