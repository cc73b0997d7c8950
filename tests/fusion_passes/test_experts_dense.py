"""Experts that all tokens go through, of which all but the top-k of a token have a weight of 0.

Llama 4 is written so in transformers, and gpt-oss and Qwen3-VL-MoE were until its release 5. The blocks are written
anew after them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fusion_passes
from fusion_passes import registry
from fusion_passes.testing import fuse
from fusion_passes.testing.equivalence import Result
from tests.fusion_passes.helpers import assert_same, misses

pytestmark = pytest.mark.usefixtures("references")


@dataclass(frozen=True)
class Form:
    """How a block is written.

    weights: whether they multiply the results ("after"), or what the experts read, in 16 bits ("narrow") or in float32
    ("wide"). chosen: "zeros" (scattered into zeros) or "sigmoid" (of logits scattered into -inf). sent: how all experts
    get all tokens. back: how their results become one. apart: gate and up are weights of their own.
    """

    weights: str = "after"
    chosen: str = "zeros"
    sent: str = "repeat"
    back: str = "sum"
    activation: str = "silu_mul"
    apart: bool = False
    bias: bool = False
    turned: bool = False
    lead: tuple[int, ...] = (1, 7)
    experts: int = 6
    top_k: int = 2
    seed: int = 0
    hidden: int = 48
    width: int = 32


class Block(nn.Module):
    """Router and experts, in bfloat16."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        generator = torch.Generator().manual_seed(form.seed)

        def drawn(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

        e, h, i = form.experts, form.hidden, form.width
        self.register_buffer("gate", drawn(e, h) * 4)
        firsts = (("w1", i), ("w3", i)) if form.apart else (("w13", 2 * i),)
        for name, inner, outer in (*((name, h, out) for name, out in firsts), ("w2", i, h)):
            shape = (e, outer, inner) if form.turned else (e, inner, outer)
            self.register_buffer(name, drawn(*shape))
        self.register_buffer("b13", drawn(e, 2 * i) if form.bias else None)
        self.register_buffer("b2", drawn(e, h) if form.bias else None)

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.form.seed + 1)
        return torch.randn(*self.form.lead, self.form.hidden, generator=generator).bfloat16()

    def matrix(self, x: Tensor) -> Tensor:
        """[T, E], of scores in float32: of two that are alike a CPU takes any, and a kernel the first."""
        logits = F.linear(x.float(), self.gate.float())
        if self.form.chosen == "sigmoid":
            values, ids = torch.topk(logits, self.form.top_k, dim=1)
            spread = torch.full_like(logits, -math.inf).scatter_(1, ids, values)
            return torch.sigmoid(spread).to(x.dtype)
        values, ids = torch.topk(logits.softmax(-1, dtype=torch.float), self.form.top_k, dim=-1)
        return torch.zeros_like(logits, dtype=x.dtype).scatter_(1, ids, values.to(x.dtype))

    def sent(self, x: Tensor, matrix: Tensor) -> Tensor:
        """[E, T, H]"""
        weights, wide = matrix.transpose(0, 1), self.form.weights == "wide"
        if self.form.sent == "repeat":
            rows = x.repeat(self.form.experts, 1)
            weights = weights.reshape(-1, 1)
        else:
            rows, weights = x.unsqueeze(0), weights.unsqueeze(-1)
        if self.form.sent == "expand" and self.form.weights == "after":
            rows = rows.expand(self.form.experts, -1, -1)
        if self.form.weights != "after":
            rows = (rows.float() * weights.float()).to(x.dtype) if wide else rows * weights
        return rows.view(self.form.experts, -1, x.shape[-1]) if self.form.sent == "repeat" else rows

    def between(self, product: Callable[[Tensor], Tensor]) -> Tensor:
        if self.form.apart:
            gate, up = product(self.w1), product(self.w3)
        else:
            both = product(self.w13)
            if self.form.bias:
                both = both + self.b13[..., None, :]
            if self.form.activation == "clamped_swiglu":
                gate, up = both[..., ::2], both[..., 1::2]
            else:
                gate, up = both.chunk(2, -1)
        if self.form.activation == "gelu_tanh_mul":
            return F.gelu(gate, approximate="tanh") * up
        if self.form.activation == "silu_mul":
            return up * F.silu(gate)
        gate, up = gate.clamp(min=None, max=0.8), up.clamp(min=-0.8, max=0.8)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        matrix = self.matrix(x)
        rows = self.sent(x, matrix)
        turn = (lambda w: w.mT) if self.form.turned else (lambda w: w)
        out = torch.matmul(self.between(lambda w: torch.matmul(rows, turn(w))), turn(self.w2))
        if self.form.bias:
            out = out + self.b2[..., None, :]
        return self.total(out, matrix).reshape(shape)

    def total(self, out: Tensor, matrix: Tensor) -> Tensor:
        back, after = self.form.back, self.form.weights == "after"
        if back == "turned":
            out = out.permute(1, 0, 2)
            return (out * matrix.unsqueeze(-1) if after else out).sum(1)
        if after and back.startswith("einsum"):
            return torch.einsum(back.removeprefix("einsum "), matrix, out)
        if after:
            lead = (self.form.experts, self.form.lead[0], -1)
            weights = matrix.transpose(0, 1).view(lead)[..., None]
            out = out.view(*lead, out.shape[-1])
            out = out.float() * weights if back == "wide" else out * weights
        return out.sum(dim=0).to(matrix.dtype)


def run(form: Form, block: nn.Module | None = None, **kwargs: object) -> Result:
    block = Block(form) if block is None else block
    names = ("fused_moe", "topk_softmax", "topk_sigmoid")
    return fuse(block, Block(form).inputs(), only=[registry()[name] for name in names], **kwargs)


def assert_fused(result: Result, form: Form) -> None:
    router = "topk_softmax" if form.chosen == "zeros" else "topk_sigmoid"
    assert result.report.matches == {"fused_moe": 1, router: 1}, result.report
    (site,) = (site for site in result.report.sites if site.fusion == "fused_moe")
    assert site.pattern.startswith("dense")
    assert form.activation in site.pattern
    assert ("weights first" in site.pattern) == (form.weights != "after")
    left = {str(node.target) for node in result.after.graph.nodes}
    assert not left & {"aten.bmm.default", "aten.scatter.src", "aten.repeat.default"}, left
    assert_same(result)


PUBLIC = {
    "Llama 4": Form("narrow", "sigmoid", top_k=1),
    "gpt-oss, transformers 4": Form(activation="clamped_swiglu", bias=True),
    "Qwen3-VL-MoE, transformers 4": Form(),
}


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("lead", [(1, 1), (1, 7), (2, 3), (6, 1)])
def test_blocks_of_public_models(name, lead):
    form = replace(PUBLIC[name], lead=lead)
    assert_fused(run(form), form)


@st.composite
def forms(draw) -> Form:
    weights = draw(st.sampled_from(["after", "narrow", "wide"]))
    apart = draw(st.booleans())
    return Form(
        weights,
        draw(st.sampled_from(["zeros", "sigmoid"])),
        draw(st.sampled_from(["repeat", "expand"])),
        draw(st.sampled_from(["sum", "turned", "wide", "einsum te,eth->th"])),
        draw(st.sampled_from(["silu_mul", "gelu_tanh_mul", "clamped_swiglu"])),
        apart,
        weights == "after" and not apart and draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from([(1, 1), (1, 2), (1, 6), (1, 7), (3, 2)])),
        draw(st.sampled_from([4, 6])),
        draw(st.sampled_from([1, 2])),
        draw(st.integers(0, 1000)),
    )


@settings(max_examples=40)
@given(forms())
def test_any_form_is_fused_and_the_same(form):
    assert_fused(run(form), form)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_symbolic_number_of_tokens(name):
    """The clamps of gpt-oss are numbers known only at run time there, where all sizes and numbers are symbolic."""
    form = replace(PUBLIC[name], activation="silu_mul")
    assert_fused(run(form, dynamic=True), form)


FLOAT32 = {
    "einsum": Form(back="einsum te,eth->th", experts=16, top_k=4, seed=1),
    "rows in float32": Form(back="wide", experts=16, top_k=4, seed=1),
}


@pytest.mark.parametrize("name", [*PUBLIC, *FLOAT32])
def test_no_worse_than_eager(name):
    """Weights of 16 bits may be multiplied in float32."""
    form = replace((PUBLIC | FLOAT32)[name], lead=(1, 64))
    result = run(form)
    assert result.report.matches["fused_moe"] == 1
    (expected,), (actual,), (judge,) = result.expected, result.actual, result.judge
    ours, eagers = (float((side.double() - judge).norm()) for side in (actual, expected))
    assert ours <= 1.02 * eagers + 1e-6 * float(judge.norm())


@pytest.mark.usefixtures("empty_caches")
@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_to_the_end(name, dynamic):
    """Verified on random inputs, of which those of the router are random and its choice is real."""
    form = replace(PUBLIC[name], activation="silu_mul") if dynamic else PUBLIC[name]
    torch.compiler.reset()
    block, x = Block(form), Block(form).inputs()
    options = {"allow_reference": True, "verify": "raise"}
    compiled = torch.compile(block, backend="fusion_passes", dynamic=dynamic, options=options)
    expected, actual = block(x), compiled(x)
    assert fusion_passes.report().matches["fused_moe"] == 1
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


# ---- one step away ------------------------------------------------------------------------------------------------


class _Away(Block):
    """A block of which one method is written otherwise."""

    def __init__(self, form: Form, name: str, method: Callable[..., Tensor]) -> None:
        super().__init__(form)
        self.name, self.method = name, method

    def matrix(self, x: Tensor) -> Tensor:
        return self.method(self, x) if self.name == "matrix" else super().matrix(x)

    def total(self, out: Tensor, matrix: Tensor) -> Tensor:
        own = self.name == "total"
        return self.method(self, out, matrix) if own else super().total(out, matrix)


def _all(self, x):
    return F.linear(x, self.gate).softmax(-1)


def _background(self, x):
    logits = F.linear(x, self.gate)
    values, ids = torch.topk(logits, 2, dim=-1)
    return torch.full_like(logits, 0.01).scatter_(1, ids, values)


def _half(self, x):
    """sigmoid(0) is not 0."""
    logits = F.linear(x, self.gate)
    values, ids = torch.topk(logits, 2, dim=-1)
    return torch.zeros_like(logits).scatter_(1, ids, values).sigmoid()


def _by_token(self, x):
    """The top tokens of each expert, as expert choice has them."""
    logits = F.linear(x, self.gate)
    values, ids = torch.topk(logits, 2, dim=0)
    return torch.zeros_like(logits).scatter_(0, ids, values)


def _given_ids(self, x):
    """The same expert may be named twice."""
    logits = F.linear(x, self.gate)
    values, _ = torch.topk(logits, 2, dim=-1)
    ids = (x[:, :2].float().abs() * 4).long() % self.form.experts
    return torch.zeros_like(logits).scatter_(1, ids, values)


def _swapped_ids(self, x):
    """Weights go by another top-k than ids do: legal, and the weights are those of their places."""
    logits = F.linear(x, self.gate)
    values, _ = torch.topk(logits.sin(), 2, dim=-1)
    return torch.zeros_like(logits).scatter_(1, torch.topk(logits, 2, dim=-1)[1], values)


def _mean(self, out, matrix):
    return (out * matrix.t().unsqueeze(-1)).mean(0)


def _not_turned(self, out, matrix):
    """The matrix is read as [E, T] without being turned."""
    return (out * matrix.reshape(self.form.experts, -1, 1)).sum(0)


def _over_tokens(self, out, matrix):
    return (out * matrix.t().unsqueeze(-1)).sum(1).repeat(2, 1)[: out.shape[1]]


def _rounded(self, out, matrix):
    return (out.float() * matrix.t().unsqueeze(-1)).bfloat16().sum(0)


def _twice(self, out, matrix):
    return (out * matrix.t().unsqueeze(-1) * matrix.t().unsqueeze(-1)).sum(0)


def _some(self, out, matrix):
    return (out * matrix.t().unsqueeze(-1))[:3].sum(0)


def _some_twice(self, out, matrix):
    """Experts 0 to 2 stand for 3 to 5, too."""
    half = out.shape[0] // 2
    out = out[:half].expand(2, -1, -1, -1).reshape(out.shape).float()
    return (out * matrix.t().unsqueeze(-1)).sum(0).to(matrix.dtype)


def _no_dimension(self, out, matrix):
    total = torch.sum(out * matrix.t().unsqueeze(-1), dim=None, keepdim=True)
    return (total[0] + matrix[:, :1]).expand(-1, out.shape[-1])


def _background_of_bool(self, x):
    """-inf is True, which is 1, of which the sigmoid is not 0."""
    logits = F.linear(x, self.gate)
    values, ids = torch.topk(logits, 2, dim=-1)
    base = torch.full(logits.shape, -math.inf).bool().to(x.dtype)
    return base.scatter(1, ids, values).sigmoid()


def _channels(self, out, matrix):
    """[E] of a token's weights are taken for [H] channels, which are as many."""
    return (out * matrix.repeat(1, out.shape[-1] // matrix.shape[1])).sum(0)


ONE_STEP_AWAY = {
    "all experts have a weight": ("matrix", _all, "not what a scatter by top-k ids wrote"),
    "a background": ("matrix", _background, "leaves weights that are not 0"),
    "a half elsewhere": ("matrix", _half, "leaves weights that are not 0"),
    "expert choice": ("matrix", _by_token, "does not write the weights of each token"),
    "ids of no top-k": ("matrix", _given_ids, "does not write the weights of each token"),
    "a mean": ("total", _mean, "where the product with a weight of each, or their sum"),
    "not turned": ("total", _not_turned, "where the product with a weight of each, or their sum"),
    "over tokens": ("total", _over_tokens, "where the product with a weight of each, or their sum"),
    "rounded rows": ("total", _rounded, "where the product with a weight of each, or their sum"),
    "weights twice": ("total", _twice, "where the product with a weight of each, or their sum"),
    "some experts": ("total", _some, "reads only some of"),
    "some experts twice": ("total", _some_twice, "reads only some of"),
    "a sum without a dimension": ("total", _no_dimension, ""),
    "a background in bool": ("matrix", _background_of_bool, "leaves weights that are not 0"),
    "weights of channels": ("total", _channels, "where the product with a weight of each, or"),
}


@pytest.mark.parametrize("name", ONE_STEP_AWAY)
def test_one_step_away(name):
    where, method, reason = ONE_STEP_AWAY[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as of a walk that raises
        result = run(Form(), _Away(Form(), where, method))
    assert "fused_moe" not in result.report.matches, result.report
    found = misses(result, "fused_moe")
    assert any(reason in each for each in found), found
    assert_same(result)


def test_integers_may_be_weights():
    def ones(self, x):
        ids = torch.topk(F.linear(x, self.gate), 2, dim=-1)[1]
        return torch.zeros(x.shape[0], 6, dtype=torch.long).scatter(1, ids, torch.ones_like(ids))

    def total(out, matrix):
        return (out * matrix.t().unsqueeze(-1)).sum(0)

    block = _Away(Form(), "matrix", ones)
    block.total = total
    result = run(Form(), block)
    assert result.report.matches["fused_moe"] == 1, result.report
    assert_same(result)


@pytest.mark.parametrize("tokens", [1, 7])
def test_a_bias_that_is_a_product(tokens):
    """The rows of the experts are not those of what their bias is made of."""
    other = torch.randn(6, 48, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    y = torch.randn(1, 48, generator=torch.Generator().manual_seed(3)).bfloat16()

    class Biased(Block):
        def __init__(self, form: Form) -> None:
            super().__init__(form)
            self.register_buffer("other", other)
            self.register_buffer("y", y)

        def between(self, product: Callable[[Tensor], Tensor]) -> Tensor:
            bias = torch.einsum("eh,ehf->ef", self.y.expand(6, 48), self.other)
            gate, up = (product(self.w13) + bias.unsqueeze(1)).chunk(2, -1)
            return F.silu(gate) * up

    form = Form(lead=(1, tokens))
    result = run(form, Biased(form))
    assert "fused_moe" not in result.report.matches
    assert_same(result)


def test_rows_rounded_to_fp8_before_they_are_weighted():
    class Rounded(Block):
        def sent(self, x: Tensor, matrix: Tensor) -> Tensor:
            rows = x.to(torch.float8_e4m3fn).unsqueeze(0).float()
            return (rows * matrix.t().unsqueeze(-1).float()).to(x.dtype)

    result = run(Form("wide"), Rounded(Form("wide")))
    assert "fused_moe" not in result.report.matches
    assert_same(result)


def test_weights_of_another_choice():
    result = run(Form(), _Away(Form(), "matrix", _swapped_ids))
    assert result.report.matches["fused_moe"] == 1, result.report
    assert_same(result)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (Form("narrow", bias=True), "with a bias they do not make 0 of 0"),
        (Form(experts=6, top_k=4), "4 of 6 experts are chosen"),
    ],
)
def test_what_would_not_be_right_or_faster(form, reason):
    result = run(form)
    assert "fused_moe" not in result.report.matches
    assert any(reason in found for found in misses(result, "fused_moe"))
    assert_same(result)


def test_weighted_twice_is_left():
    """What the experts read is multiplied, and their results are, too."""

    class Twice(Block):
        def total(self, out: Tensor, matrix: Tensor) -> Tensor:
            return (out * matrix.t().unsqueeze(-1)).sum(0)

    result = run(Form("narrow"), Twice(Form("narrow")))
    assert "fused_moe" not in result.report.matches
    assert any("by two such weights" in reason for reason in misses(result, "fused_moe"))
    assert_same(result)


def test_experts_of_no_weight_are_left():
    class Bare(Block):
        def total(self, out: Tensor, matrix: Tensor) -> Tensor:
            return out.sum(0)

    result = run(Form(), Bare(Form()))
    assert "fused_moe" not in result.report.matches
    assert any("by no weight of a token" in reason for reason in misses(result, "fused_moe"))
    assert_same(result)
