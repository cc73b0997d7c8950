"""A linear and its adapter as PEFT spells them: found in every spelling, equal to eager, and nothing else is taken."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fusion_passes import registry
from fusion_passes.quantize import Fp8BlockLinear
from fusion_passes.testing import assert_fusion_equivalent, fuse
from tests.fusion_passes.helpers import assert_same, everything, fuse_all, misses, random
from tests.fusion_passes.test_fusions import few

pytestmark = pytest.mark.usefixtures("references")

LORA = registry()["lora_linear"]
LEADING = ((1,), (2,), (7,), (1, 1), (1, 5), (3, 2), (2, 1, 3))


class Adapted(nn.Module):
    """A linear and its adapter, with the words of PEFT's forward."""

    def __init__(
        self,
        columns: int = 24,
        rows: int = 40,
        rank: int = 4,
        scaling: float = 3.0,
        dtype: torch.dtype = torch.bfloat16,
        adapter: torch.dtype | None = torch.float32,
        bias: bool = False,
        lora_bias: bool = False,
        base: Callable[[nn.Linear], nn.Module] = lambda linear: linear,
    ) -> None:
        super().__init__()
        torch.manual_seed(columns + rows + rank)
        self.base_layer = base(nn.Linear(columns, rows, bias, dtype=dtype))
        self.lora_A = nn.Linear(columns, rank, bias=False, dtype=adapter or dtype)
        self.lora_B = nn.Linear(rank, rows, bias=lora_bias, dtype=adapter or dtype)
        self.scaling = {"default": scaling}

    def forward(self, x: Tensor) -> Tensor:
        result = self.base_layer(x)
        dtype = result.dtype
        x = x.to(self.lora_A.weight.dtype)
        return (result + self.lora_B(self.lora_A(x)) * self.scaling["default"]).to(dtype)


def ops(result: Any) -> list[str]:
    names = (str(node.target) for node in result.after.graph.nodes if node.op == "call_function")
    return [name.split(".")[1] for name in names if name.startswith("custom_ops.")]


@few(12)
@given(
    lead=st.sampled_from(LEADING),
    columns=st.sampled_from((8, 24, 33)),
    rows=st.sampled_from((2, 16, 40)),
    rank=st.sampled_from((2, 3, 8, 16)),
    scaling=st.sampled_from((1.0, 0.5, 3.0, 24 / 8**0.5)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    adapter=st.sampled_from((None, torch.float32)),
    bias=st.booleans(),
)
def test_every_shape(
    lead: tuple[int, ...],
    columns: int,
    rows: int,
    rank: int,
    scaling: float,
    dtype: torch.dtype,
    adapter: torch.dtype | None,
    bias: bool,
) -> None:
    module = Adapted(columns, rows, rank, scaling, dtype, adapter, bias).eval()
    x = random(*lead, columns, dtype=dtype)
    (result,) = assert_fusion_equivalent(LORA, module, x)
    if not (
        bias and x.shape[:-1].numel() == 1
    ):  # on a CPU such a base may be no addmm in the graph
        assert ops(result) == ["lora_linear_single"]
        assert not [n for n in result.after.graph.nodes if "mm" in str(n.target)]


@pytest.mark.parametrize("scaling", [1.0, 2.0])
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["16 bit", "float32"])
def test_rank_one(scaling: float, adapter: torch.dtype | None) -> None:
    module = Adapted(rank=1, scaling=scaling, adapter=adapter).eval()
    (result,) = assert_fusion_equivalent(LORA, module, random(5, 24))
    assert ops(result) == ["lora_linear_single"]


@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["16 bit", "float32"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_over_a_block_fp8_linear(adapter: torch.dtype | None, dynamic: bool) -> None:
    module = Adapted(128, 256, 8, adapter=adapter, base=Fp8BlockLinear.from_linear).eval()
    x = random(1, 5, 128)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    result = fuse_all(module, x)
    assert result.report.matches == {"lora_linear": 1, "block_scaled_linear": 1, "group_quant": 1}
    assert sorted(ops(result)) == ["block_scaled_mm", "group_quant", "lora_add_single"]


@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["16 bit", "float32"])
def test_dynamic_true_makes_the_scaling_a_tensor(adapter: torch.dtype | None) -> None:
    (result,) = assert_fusion_equivalent(
        LORA, Adapted(adapter=adapter, bias=True).eval(), random(2, 3, 24), dynamic=True
    )
    (node,) = [n for n in result.after.graph.nodes if "lora" in str(n.target)]
    assert str(node.target) == "custom_ops.lora_linear_single.scaling_tensor"
    assert node.args[-1].meta["val"].shape == ()


def test_symbolic_tokens_add_no_guard() -> None:
    x = random(1, 5, 24)
    torch._dynamo.mark_dynamic(x, 1)
    result = fuse(Adapted().eval(), x, only=[LORA])
    assert_same(result)
    (site,) = result.report.sites
    assert "s" in site.sizes["num_tokens"]


class Several(nn.Module):
    """q, k and v on one activation, of which one cast may serve all."""

    def __init__(self, adapter: torch.dtype | None, share: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Adapted(rank=r, adapter=adapter) for r in (4, 8, 4))
        self.share = share

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.share:
            return tuple(layer(x) for layer in self.layers)
        wide = x.float()
        bases = [layer.base_layer(x) for layer in self.layers]
        deltas = [layer.lora_B(layer.lora_A(wide)) * 3.0 for layer in self.layers]
        return tuple((b + d).to(x.dtype) for b, d in zip(bases, deltas, strict=True))


@pytest.mark.parametrize("share", [False, True])
def test_several_linears_on_one_activation(share: bool) -> None:
    module, x = Several(torch.float32, share).eval(), random(2, 3, 24)
    result = fuse(module, x, only=[LORA])
    assert result.report.matches == {"lora_linear": 3}
    assert ops(result) == ["lora_linear_single"] * 3
    together = fuse_all(module, x)
    assert together.report.matches == {"lora_linear": 3, "shared_lora_shrink": 1}
    assert ops(together) == ["lora_linears_single", "lora_linear_single"]  # ranks 4, 4 and 8
    for one, other in zip(together.actual, result.actual, strict=True):
        assert torch.equal(one, other)


def test_two_adapters_at_once() -> None:
    """PEFT with two active adapters of 16 bits: the sum of the first is the base of the second."""
    first, second = Adapted(adapter=None).eval(), Adapted(adapter=None, rank=6, scaling=0.5).eval()

    def both(x: Tensor) -> Tensor:
        return first(x) + second.lora_B(second.lora_A(x)) * 0.5

    result = fuse_all(both, random(5, 24))
    assert result.report.matches == {"lora_linear": 2}
    assert ops(result) == ["lora_linear_single", "lora_add_single"]


def test_a_base_that_is_also_read_elsewhere_stays() -> None:
    module = Adapted(adapter=None).eval()

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        base = module.base_layer(x)
        return base + module.lora_B(module.lora_A(x)) * 3.0, base.sin()

    result = fuse_all(both, random(5, 24))
    assert ops(result) == ["lora_add_single"]


def test_a_base_of_another_activation() -> None:
    module = Adapted(adapter=None).eval()
    result = fuse_all(
        lambda x, y: module.base_layer(y) + module.lora_B(module.lora_A(x)) * 3.0,
        random(5, 24),
        random(5, 24, seed=1),
    )
    assert ops(result) == ["lora_add_single"]


def test_a_base_that_lost_rows() -> None:
    module = Adapted(adapter=None).eval()
    result = fuse_all(
        lambda x: module.base_layer(x)[:3] + module.lora_B(module.lora_A(x[:3])) * 3.0,
        random(5, 24),
    )
    assert "lora_linear_single" not in ops(result)


A, B, W = random(4, 24), random(40, 4), random(40, 24)


def shrink_used_elsewhere(x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.linear(x, A)
    return F.linear(x, W) + F.linear(y, B) * 2.0, y.sin()


NEAR = {
    "lora_bias": (Adapted(lora_bias=True).eval(), "lora_B of the adapter has a bias"),
    "rank 257": (Adapted(rank=257).eval(), "rank of the adapter is 257; supported: 1 to 256"),
    "subtracted": (lambda x: F.linear(x, W) - F.linear(F.linear(x, A), B) * 2.0, "sub"),
    "shrink used elsewhere": (shrink_used_elsewhere, "also used by"),
    "activation in between": (
        lambda x: F.linear(x, W) + F.relu(F.linear(F.linear(x, A), B)) * 2.0,
        "relu",
    ),
    "another dtype": (
        lambda x: (F.linear(x, W) + F.linear(F.linear(x.half(), A.half()), B.half()) * 2.0).to(
            x.dtype
        ),
        "add",  # which is float32
    ),
    "a float32 result": (
        lambda x: F.linear(x, W) + F.linear(F.linear(x.float(), A.float()), B.float()) * 2.0,
        "",
    ),
    "scaled by token": (
        lambda x: F.linear(x, W) + F.linear(F.linear(x, A), B) * x.sum(-1, keepdim=True),
        "read by mul, where the fusion expects add",
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_one_step_outside_stays_and_says_why(name: str) -> None:
    fn, words = NEAR[name]
    result = fuse_all(fn, random(5, 24), only=["lora_linear"])  # the others take what it leaves
    assert "lora_linear" not in result.report.matches
    reasons = misses(result, "lora_linear")
    assert reasons
    assert any(words in reason for reason in reasons), reasons


SILENT = {
    "no adapter": lambda x: F.linear(x, W),
    "two layers": lambda x: F.linear(F.silu(F.linear(x, A)), B),
    "a residual": lambda x: F.linear(F.linear(x, W), W.t()) + x,
}


@pytest.mark.parametrize("name", SILENT)
def test_linears_without_an_adapter_are_left_alone(name: str) -> None:
    result = fuse_all(SILENT[name], random(5, 24))
    assert result.report.matches == {}


@pytest.mark.parametrize("name", [name for name in SILENT if name != "a residual"])
def test_linears_without_an_adapter_are_no_near_miss(name: str) -> None:
    assert misses(fuse_all(SILENT[name], random(5, 24)), "lora_linear") == []


def test_verified_on_the_spot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_PASSES_VERIFY", "raise")
    for module in (Adapted(bias=True), Adapted(128, 256, base=Fp8BlockLinear.from_linear)):
        columns = module.lora_A.in_features
        result = fuse(module.eval(), random(5, columns), only=everything())
        assert result.report.matches["lora_linear"] == 1


def test_importing_imports_no_optional_package() -> None:
    code = """
import sys, fusion_passes
assert "fusion_passes.lora" not in sys.modules
fusion_passes.lora.AdapterManager
print([n for n in ("peft", "safetensors", "transformers") if n in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr
