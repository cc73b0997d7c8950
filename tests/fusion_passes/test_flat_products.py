"""Linears of activations that are no view of rows are fused as all others, and are what they were where nothing is."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from fusion_passes import registry
from fusion_passes.quantize import SCHEMES, Fp8BlockLinear, quantize_
from fusion_passes.testing import Result, fuse
from tests.fusion_passes.helpers import fuse_all, random

pytestmark = pytest.mark.usefixtures("references")
aten = torch.ops.aten


class Patches(nn.Module):
    """As a vision tower: what a convolution makes is transposed, and so is all that is added to it."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, 128, 4, 4)
        self.q, self.k = (nn.Linear(128, 128, bias=bias) for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        patches = self.cut(image).flatten(2).transpose(1, 2)
        return self.q(patches) + self.k(patches)


def targets(graph: fx.Graph) -> Counter[str]:
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_function")


def work(graph: fx.Graph) -> Counter[str]:
    """What a graph computes and copies: all but its views."""
    return Counter(
        {
            name: count
            for name, count in targets(graph).items()
            if not name.startswith(("aten.view", "aten.reshape", "aten.sym_size", "aten.expand"))
        }
    )


def assert_no_further(result: Result) -> None:
    for actual, eager, judge in zip(result.actual, result.expected, result.judge, strict=True):
        ours, eagers = (float((side.double() - judge.double()).norm()) for side in (actual, eager))
        assert ours <= 1.05 * eagers + 1e-6 * float(judge.double().norm())
        assert (actual.shape, actual.dtype, actual.stride()) == (
            eager.shape,
            eager.dtype,
            eager.stride(),
        )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("images", [1, 3])
def test_linears_of_patches_are_fused(images: int, scheme: str, bias: bool) -> None:
    torch.manual_seed(0)
    model = quantize_(Patches(bias).to(torch.bfloat16), scheme)
    result = fuse(model, random(images, 3, 16, 16), only=list(registry().values()))
    assert targets(result.before.graph)["aten.bmm.default"] == 2
    product = "block_scaled_linear" if scheme == "fp8_block" else "scaled_linear"
    assert result.report.matches[product] == 2, result.report
    assert targets(result.after.graph)["aten.bmm.default"] == 0
    assert_no_further(result)


def test_any_number_of_patches() -> None:
    model = quantize_(Patches().to(torch.bfloat16), "fp8_block")
    image = random(2, 3, 16, 16)
    torch._dynamo.mark_dynamic(image, 0)
    torch._dynamo.mark_dynamic(image, 2)
    result = fuse(model, image, only=list(registry().values()))
    assert result.report.matches["block_scaled_linear"] == 2
    assert any("s" in site.sizes.get("num_tokens", "") for site in result.report.sites)
    assert_no_further(result)


@given(
    batch=st.integers(1, 4),
    rows=st.integers(1, 5),
    features=st.sampled_from((1, 64, 130)),
    width=st.sampled_from((1, 96, 256)),
    cut=st.booleans(),
    dynamic=st.sampled_from((None, True)),
)
def test_what_no_fusion_takes_is_what_it_was(batch, rows, features, width, cut, dynamic) -> None:
    x = random(batch, width, rows).transpose(1, 2)
    x = x[:, : max(1, rows - 1)] if cut else x
    weight = random(features, width)
    result = fuse_all(lambda x, weight: nn.functional.linear(x, weight), x, weight, dynamic=dynamic)
    assert result.report.matches == {}
    assert work(result.after.graph) == work(result.before.graph)
    for actual, expected in zip(result.actual, result.expected, strict=True):
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()


@pytest.mark.parametrize("dims", [3, 4])
def test_a_weight_of_each_batch_is_no_linear(dims: int) -> None:
    """As attention, and as the experts of one token: only a weight that was expanded is one weight."""
    lead = (1,) * (dims - 2)
    left, right = random(*lead, 5, 64), random(*lead, 64, 7)
    result = fuse_all(lambda a, b: a @ b, left, right)
    assert work(result.after.graph) == work(result.before.graph)
    assert torch.equal(result.actual[0], result.expected[0])


def test_a_weight_that_differs_by_row_is_no_linear() -> None:
    """expand() of [B, 1, N] repeats the rows of each weight, not one weight."""
    left, right = random(2, 5, 64).transpose(1, 2).contiguous().transpose(1, 2), random(2, 1, 7)
    result = fuse_all(lambda a, b: torch.bmm(a, b.expand(2, 64, 7)), left, right)
    assert work(result.after.graph) == work(result.before.graph)
    assert torch.equal(result.actual[0], result.expected[0])


@pytest.mark.parametrize("lead", [(3,), (2, 3), (1, 2, 2)])
@pytest.mark.parametrize("width", [96, 200])
def test_a_width_that_no_group_divides_is_named(lead: tuple[int, ...], width: int) -> None:
    """However many dimensions x has: the padding is cut off again, which makes a view of no rows."""
    model = nn.Sequential(Fp8BlockLinear.from_linear(nn.Linear(width, 128).bfloat16()))
    result = fuse_all(model, random(*lead, width))
    (miss,) = [m for m in result.report.near_misses if m.fusion == "block_scaled_linear"]
    assert f"{width}] of [" in miss.reason
    assert targets(result.before.graph)["aten.bmm.default"] == 0


@pytest.mark.parametrize("wide", [False, True], ids=["16-bit adapters", "float32 adapters"])
@pytest.mark.parametrize("images", [1, 3])
def test_adapters_of_patches_are_fused(images: int, wide: bool) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra 'models'")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=["q", "k"], init_lora_weights=False)
    adapted = peft.get_peft_model(
        Patches(bias=True).to(torch.bfloat16), config, autocast_adapter_dtype=wide
    )
    result = fuse(
        adapted.base_model.model.eval(), random(images, 3, 16, 16), only=list(registry().values())
    )
    assert result.report.matches["lora_linear"] == 2, result.report
    assert_no_further(result)
