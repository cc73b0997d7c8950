"""Float8 products with a scale per token and channel: which become scaled_mm, and which stay torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import ScalingType

from fusion_passes import registry, settings, tables
from fusion_passes.operations import describe
from fusion_passes.testing import fuse
from tests.fusion_passes.helpers import (
    FP8,
    NEEDS_ROWS,
    assert_same,
    calls,
    fuse_all,
    misses,
    random,
    takes_rows,
)
from tests.fusion_passes.test_scaled_linear import codes, scales

pytestmark = pytest.mark.usefixtures("references", "fresh_reports")
NAME = "rowwise_scaled_mm"


def by_scaled_mm(q, weight, scale, weight_scale, *, bias=None, out_dtype, use_fast_accum=False):
    """As torch._scaled_mm with a scale per row, by the public function: aten._scaled_mm_v2 in a graph."""
    return F.scaled_mm(
        q,
        weight,
        scale,
        ScalingType.RowWise,
        weight_scale,
        ScalingType.RowWise,
        bias=bias,
        output_dtype=out_dtype,
        use_fast_accum=use_fast_accum,
    )


CALLS = {"torch._scaled_mm": torch._scaled_mm, "torch.nn.functional.scaled_mm": by_scaled_mm}
"""Two ways to write the product; the second since torch 2.10."""

calls_of = pytest.mark.parametrize("call", CALLS)
eager_takes_rows = pytest.mark.skipif(not takes_rows(), reason=NEEDS_ROWS)


class Linear(torch.nn.Module):
    """As torchao's float8 PerRow writes it: tokens flattened, the weight and its scales transposed."""

    def __init__(
        self,
        k: int,
        n: int,
        biased: bool = False,
        fast: bool = True,
        call: str = "torch._scaled_mm",
    ) -> None:
        super().__init__()
        self.fast, self.call = fast, call
        self.register_buffer("weight", codes(n, k, dtype=FP8))
        self.register_buffer("scale", scales(n, 1))
        self.register_buffer("bias", random(n) if biased else None)

    def quantized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = (x.abs().amax(-1, keepdim=True) / 448.0).float()
        return (x.float() / scale).clamp(-448.0, 448.0).to(FP8), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, scale = self.quantized(x)
        out = CALLS[self.call](
            q.reshape(-1, q.shape[-1]),
            self.weight.t(),
            scale.reshape(-1, 1),
            self.scale.t(),
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=self.fast,
        )
        return out.reshape(*x.shape[:-1], -1)


@eager_takes_rows
@given(
    lead=st.sampled_from(((5,), (1,), (2, 3), (1, 1), (2, 1, 3))),
    k=st.sampled_from((16, 128, 256)),
    n=st.sampled_from((16, 48, 128)),
    biased=st.booleans(),
    fast=st.booleans(),
    dynamic=st.booleans(),
    call=st.sampled_from(sorted(CALLS)),
)
def test_products_as_torchao_writes_them(lead, k, n, biased, fast, dynamic, call) -> None:
    module, x = Linear(k, n, biased, fast, call), random(*lead, k)
    for dim in [dim for dim, size in enumerate(lead) if dynamic and size > 1]:
        torch._dynamo.mark_dynamic(x, dim)
    result = fuse_all(module, x, only=[NAME])
    assert result.report.matches == {NAME: 1}
    assert not [name for name in calls(result.after.graph) if "aten._scaled_mm" in name]
    q, scale = module.quantized(x)
    judge = (q.double() * scale) @ (module.weight.double() * module.scale).t()
    judge = judge if module.bias is None else judge + module.bias
    ours, eager = (
        float((side[0].double() - judge).norm()) for side in (result.actual, result.expected)
    )
    assert ours <= 1.02 * eager + 1e-6 * float(judge.norm())


def others() -> dict[str, Any]:
    q, w = codes(5, 64, dtype=FP8), codes(32, 64, dtype=FP8)
    rows, columns, one = scales(5, 1), scales(32, 1), scales(1)
    wide = {"out_dtype": torch.float32}
    return {
        "one scale for each operand": lambda: torch._scaled_mm(
            q, w.t(), one, one, out_dtype=torch.bfloat16
        ),
        "float32 out of them": lambda: torch._scaled_mm(q, w.t(), one, one, **wide),
        "a scale of the result": lambda: torch._scaled_mm(
            q, w.t(), rows, columns.t(), scale_result=one, out_dtype=torch.bfloat16
        ),
        "one scale for each operand, by the public function": lambda: F.scaled_mm(
            q, w.t(), one, ScalingType.TensorWise, one, ScalingType.TensorWise
        ),
    }


@pytest.mark.parametrize("name", sorted(others()))
def test_what_is_no_such_product_stays(name: str) -> None:
    call = others()[name]
    try:
        call()
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"this version of torch does not compute it on a CPU: {error}")
    assert fuse_all(call, only=[NAME]).report.matches == {}


class KeptTransposed(Linear):
    """The weight as [K, N], of which each column lies in one piece."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("columns", self.weight.t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, scale = self.quantized(x)
        return CALLS[self.call](
            q,
            self.columns,
            scale,
            self.scale.t(),
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=self.fast,
        )


@eager_takes_rows
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("fast", [False, True])
@calls_of
def test_a_weight_that_is_kept_transposed_is_reported(biased: bool, fast: bool, call: str) -> None:
    result = fuse_all(KeptTransposed(64, 32, biased, fast, call), random(5, 64), only=[NAME])
    assert result.report.matches == {}
    (reason,) = misses(result, NAME)
    assert reason.startswith("the weight is kept transposed")


@eager_takes_rows
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("fast", [False, True])
@calls_of
def test_float16_results_are_reported(biased: bool, fast: bool, call: str) -> None:
    layer, bias = Linear(64, 32), random(32, dtype=torch.float16) if biased else None

    def product(x: torch.Tensor) -> torch.Tensor:
        q, scale = layer.quantized(x)
        return CALLS[call](
            q,
            layer.weight.t(),
            scale,
            layer.scale.t(),
            bias=bias,
            out_dtype=torch.float16,
            use_fast_accum=fast,
        )

    result = fuse_all(product, random(5, 64, dtype=torch.float16), only=[NAME])
    assert result.report.matches == {}
    assert misses(result, NAME) == ["out_dtype is torch.float16; accepted: torch.bfloat16"]


@eager_takes_rows
def test_three_products_of_one_quantization_are_three() -> None:
    """q, k and v: the codes and their scales are read by each, and by the model itself."""
    layers = [Linear(64, n, biased=n == 48) for n in (32, 48, 32)]

    def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, scale = layers[0].quantized(x)
        made = [
            torch._scaled_mm(
                q,
                layer.weight.t(),
                scale,
                layer.scale.t(),
                bias=layer.bias,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
            for layer in layers
        ]
        return *made, q.float() * scale, made[0].t()

    assert fuse_all(call, random(7, 64), only=[NAME]).report.matches == {NAME: 3}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = [(16, 1.5), (64, 1.2), (256, 0.8), (4096, 0.7)]
    rows = {name: {"on": True, "why": "ahead", "rows": []} for name in registry()}
    rows[NAME]["rows"] = [
        {"case": NAME, "tokens": tokens, "n": 48, "k": 128, "speedup": speedup}
        for tokens, speedup in measured
    ]
    monkeypatch.setattr(tables, "load", lambda: {90: {"arch": "sm_90", "fusions": rows}})
    monkeypatch.setattr(tables, "arch_of", lambda _device: "sm_90")


@eager_takes_rows
@pytest.mark.parametrize("tokens", [1, 16, 64, 100, 200, 5000])
def test_many_tokens_are_left_to_torch(tokens: int, table: None) -> None:
    x = random(tokens, 128)
    result = fuse(Linear(128, 48), x)
    assert_same(result)
    few = tokens <= 100
    assert result.report.matches.get(NAME, 0) == few
    assert bool(misses(result, NAME)) == (not few)
    with settings.patch(fusions=NAME):
        assert fuse(Linear(128, 48), x).report.matches == {NAME: 1}


@eager_takes_rows
def test_a_graph_for_any_number_of_tokens_is_left_to_torch(table: None) -> None:
    """It runs for many as well as for few, and is one product for all of them."""
    x = random(16, 128)
    torch._dynamo.mark_dynamic(x, 0)
    assert NAME not in fuse(Linear(128, 48), x).report.matches


@eager_takes_rows
@pytest.mark.parametrize("biased", [False, True])
def test_the_fp8_linear_of_transformers(biased: bool) -> None:
    """CompressedTensorsFP8Linear calls the public function; its weight's scale is [1, out_features]."""
    integration = pytest.importorskip(
        "transformers.integrations.compressed_tensors", reason="needs the extra 'models'"
    )
    if not hasattr(integration, "CompressedTensorsFP8Linear"):
        pytest.skip("needs a transformers with CompressedTensorsFP8Linear (5.20 or newer)")
    linear = integration.CompressedTensorsFP8Linear(64, 48, has_bias=biased)
    linear = linear.eval().requires_grad_(False)
    linear.weight.data, linear.weight_scale.data = codes(48, 64, dtype=FP8), scales(1, 48)
    if biased:
        linear.bias.data = random(48)
    result = fuse_all(linear, random(2, 3, 64), only=[NAME])
    assert result.report.matches == {NAME: 1}
    assert not [name for name in calls(result.after.graph) if "aten._scaled_mm" in name]


ROWS, WHOLE, BLOCKS = [1], [0], [4]
"""Recipes of aten._scaled_mm_v2: a scale per row, one for all, 1 x 128 blocks."""


@pytest.mark.parametrize(
    ("recipes", "rest", "same"),
    [
        ((ROWS, ROWS), (), True),
        ((WHOLE, WHOLE), (), True),
        ((ROWS, ROWS), ([], False), True),
        ((ROWS, ROWS), ([], True), True),
        ((ROWS, WHOLE), (), False),
        ((BLOCKS, BLOCKS), (), False),
        ((ROWS, ROWS), ([1, 0],), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("swizzle", [[], [0], [1]], ids=str)
def test_which_calls_of_the_later_operator_are_the_earlier(recipes, rest, same, swizzle) -> None:
    """Without swizzled scales or another contraction; what fast sums are called for stays called for."""
    graph = torch.fx.Graph()
    a, b, a_scale, b_scale = (graph.placeholder(name) for name in ("a", "b", "a_scale", "b_scale"))
    left, right = ([a_scale], recipes[0], swizzle), ([b_scale], recipes[1], swizzle)
    node = graph.call_function(
        torch.ops.aten._scaled_mm_v2.default,
        (a, b, *left, *right, None, torch.bfloat16, *rest),
    )
    node.meta["val"] = torch.empty(3, 4, dtype=torch.bfloat16)
    operation = describe(node)
    if not same or swizzle == [1]:
        assert operation.name == "aten._scaled_mm_v2.default"
        return
    fast = (True,) if rest == ([], True) else ()
    assert operation.name == "aten._scaled_mm.default"
    assert operation.operands == (a, b, a_scale, b_scale, None, None, torch.bfloat16, *fast)
