"""Experts whose gate and up are two weights, as libraries other than transformers write them.

The blocks are written anew after gpt-fast's Mixtral, torchtitan, torchtune and Meta's Llama 4.
"""

from __future__ import annotations

import re
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

FUSIONS = ("topk_softmax", "topk_sigmoid", "fused_moe")


@dataclass(frozen=True)
class Form:
    """How a block is written.

    form: "grouped" (rows sorted by expert), "einsum" (all matrices of a token at once) or "batched" (one a row).
    transposed: weights are kept as [E, in, out]. before: the top-k weights multiply what the experts read, and how:
    "wide" in float32, "narrow" in 16 bits. back: how results become one. rows: how sorted rows are taken.
    """

    form: str = "grouped"
    activation: str = "silu_mul"
    tokens: int = 5
    top_k: int = 2
    experts: int = 6
    transposed: bool = False
    before: str = ""
    back: str = "unsorted"
    rows: str = "index"
    scoring: str = "softmax"
    up_first: bool = False
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
            value = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            if len(shape) == 3 and form.transposed:
                value = value.transpose(1, 2).contiguous()
            return value.bfloat16()

        e, h, i = form.experts, form.hidden, form.width
        self.register_buffer("gate", drawn(e, h))
        self.register_buffer("w1", drawn(e, i, h))
        self.register_buffer("w2", drawn(e, h, i))
        self.register_buffer("w3", drawn(e, i, h))

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.form.seed + 1)
        shape = (1, self.form.tokens, self.form.hidden)
        return torch.randn(shape, generator=generator).bfloat16()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, self.gate).float()
        scores = logits.softmax(-1) if self.form.scoring == "softmax" else logits.sigmoid()
        return torch.topk(scores, self.form.top_k, dim=-1)

    def between(self, gate: Tensor, up: Tensor) -> Tensor:
        activation = self.form.activation
        if activation == "silu_mul":
            return F.silu(gate) * up
        if activation == "gelu_tanh_mul":
            return F.gelu(gate, approximate="tanh") * up
        gate, up = gate.clamp(max=0.8), up.clamp(min=-0.8, max=0.8)
        if activation == "clamped_silu_mul":
            return F.silu(gate) * up
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))

    def both(self, product) -> tuple[Tensor, Tensor]:
        """Gate and up, in whichever order the code makes them."""
        if self.form.up_first:
            up = product(self.w3)
            return product(self.w1), up
        return product(self.w1), product(self.w3)

    def forward(self, x: Tensor) -> Tensor:
        shape, x = x.shape, x.view(-1, x.shape[-1])
        weights, ids = self.route(x)
        how = {"grouped": self.grouped, "einsum": self.einsum, "batched": self.batched}
        return how[self.form.form](x, weights, ids).view(shape)

    def einsum(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """As gpt-fast has it for few tokens."""
        names = (
            ("ti,tkio->tko", "tko,tkoi->tki")
            if self.form.transposed
            else ("ti,tkoi->tko", "tko,tkio->tki")
        )
        gate, up = self.both(lambda w: torch.einsum(names[0], x, w[ids]))
        out = torch.einsum(names[1], self.between(gate, up), self.w2[ids])
        return torch.einsum("tki,tk->ti", out, weights.to(x.dtype))

    def weighted(self, rows: Tensor, weights: Tensor) -> Tensor:
        if self.form.before == "wide":
            return (rows.float() * weights.reshape(-1, 1)).to(rows.dtype)
        if self.form.before == "narrow":
            return rows * weights.reshape(-1, 1).to(rows.dtype)
        return rows

    def batched(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        rows = self.weighted(x.repeat_interleave(self.form.top_k, 0), weights).unsqueeze(-1)
        turn = (lambda w: w.transpose(1, 2)) if self.form.transposed else (lambda w: w)
        gate, up = self.both(lambda w: torch.bmm(turn(w)[flat], rows))
        out = torch.bmm(turn(self.w2)[flat], self.between(gate, up)).view(*ids.shape, -1)
        if self.form.before:
            return out.sum(1)
        return (out * weights.unsqueeze(-1)).sum(1).to(x.dtype)

    def grouped(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """As torchtitan and torchtune have it, the latter with transposed weights."""
        flat, top_k = ids.reshape(-1), self.form.top_k
        # its code counts the ids themselves, which no CPU does
        counts = torch.histc(flat.float(), self.form.experts, 0, self.form.experts)
        offsets = counts.cumsum(0, dtype=torch.int32)
        order = torch.argsort(flat, stable=True)
        spread = (order // top_k).reshape(-1, 1).expand(-1, x.shape[1])
        rows = x[order // top_k] if self.form.rows == "index" else torch.gather(x, 0, spread)
        rows = self.weighted(rows, weights.reshape(-1)[order])
        turn = (lambda w: w) if self.form.transposed else (lambda w: w.transpose(-2, -1))
        gate, up = self.both(lambda w: torch._grouped_mm(rows, turn(w), offs=offsets))
        out = torch._grouped_mm(self.between(gate, up), turn(self.w2), offs=offsets)
        if self.form.back == "scatter_add":
            if not self.form.before:
                out = (out.float() * weights.reshape(-1)[order].reshape(-1, 1)).to(x.dtype)
            return torch.zeros_like(x).scatter_add(0, spread, out)
        pairs = x.new_zeros(x.shape[0] * top_k, x.shape[1])
        pairs[order] = out
        pairs = pairs.reshape(-1, top_k, x.shape[1])
        if self.form.before:
            return pairs.sum(1)
        return torch.bmm(weights.unsqueeze(1), pairs.float()).squeeze(1).to(x.dtype)


def run(form: Form, block: nn.Module | None = None) -> Result:
    block = Block(form) if block is None else block
    x = Block(form).inputs()
    return fuse(block, x, only=[registry()[name] for name in FUSIONS])


def assert_fused(result: Result, form: Form) -> None:
    router = "topk_softmax" if form.scoring == "softmax" else "topk_sigmoid"
    assert result.report.matches == {"fused_moe": 1, router: 1}, result.report
    (site,) = (site for site in result.report.sites if site.fusion == "fused_moe")
    assert "gate and up apart" in site.pattern
    assert form.activation in site.pattern
    (fused,) = (n for n in result.after.graph.nodes if "fused_moe" in str(n.target))
    assert fused.kwargs["up"].meta["val"].shape == (form.experts, form.width, form.hidden)
    left = {str(node.target) for node in result.after.graph.nodes}
    assert not left & {"aten._grouped_mm.default", "aten.bmm.default", "aten.cat.default"}, left
    assert_same(result)


PUBLIC = {
    "gpt-fast": Form("einsum"),
    "torchtitan": Form(),
    "torchtitan, weights first": Form(before="wide"),
    "torchtitan, one expert, weights first": Form(before="wide", top_k=1, scoring="sigmoid"),
    "torchtune": Form(transposed=True, before="narrow", top_k=1, rows="gather", back="scatter_add", scoring="sigmoid"),
    "torchtune, transposed": Form(transposed=True, rows="gather"),
    "a matrix for each row": Form("batched"),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("tokens", [1, 5])
def test_blocks_of_public_libraries(name, tokens):
    form = replace(PUBLIC[name], tokens=tokens)
    assert_fused(run(form), form)


@st.composite
def forms(draw) -> Form:
    form = draw(st.sampled_from(["grouped", "einsum", "batched"]))
    top_k = draw(st.sampled_from([1, 2, 4]))
    before = draw(st.sampled_from(["", "wide", "narrow"])) if form != "einsum" else ""
    return Form(
        form,
        draw(st.sampled_from(["silu_mul", "gelu_tanh_mul", "clamped_swiglu", "clamped_silu_mul"])),
        draw(st.sampled_from([1, 2, 7])),
        top_k,
        draw(st.sampled_from([4, 6])),
        draw(st.booleans()),
        before,
        draw(st.sampled_from(["unsorted", "scatter_add"])) if before and top_k <= 2 else "unsorted",
        draw(st.sampled_from(["index", "gather"])),
        draw(st.sampled_from(["softmax", "sigmoid"])),
        draw(st.booleans()),
        draw(st.integers(0, 1000)),
    )


@settings(max_examples=40)
@given(forms())
def test_any_form_is_fused_and_the_same(form):
    assert_fused(run(form), form)


@pytest.mark.parametrize("form", ["grouped", "einsum", "batched"])
def test_halves_of_one_weight(form):
    """As two views of one tensor, which is not copied."""

    class Halves(Block):
        def __init__(self, form: Form) -> None:
            super().__init__(form)
            self.register_buffer("w13", torch.cat([self.w1, self.w3], 1))

        def both(self, product):
            gate, up = self.w13.chunk(2, 1)
            return product(gate), product(up)

    form = Form(form)
    assert_fused(run(form, Halves(form)), form)


@pytest.mark.parametrize("before", ["", "wide"])
def test_a_symbolic_number_of_tokens(before):
    form = Form(before=before)
    result = fuse(Block(form), Block(form).inputs(), only=[registry()["fused_moe"]], dynamic=True)
    assert result.report.matches == {"fused_moe": 1}, result.report
    assert_same(result)


def test_two_blocks_one_after_the_other():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(Form()), Block(Form(seed=3))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    result = fuse(Two(), Block(Form()).inputs(), only=[registry()["fused_moe"]])
    assert result.report.matches == {"fused_moe": 2}, result.report
    assert_same(result)


def test_weights_first_are_no_worse_than_eager():
    """Each pair is a token with one expert, and the sum over them is that of eager."""
    for before in ("wide", "narrow"):
        result = run(Form(before=before, top_k=4, tokens=33))
        (expected,), (actual,), (judge,) = result.expected, result.actual, result.judge
        ours, eagers = (float((side.double() - judge).norm()) for side in (actual, expected))
        assert ours <= 1.02 * eagers + 1e-6 * float(judge.norm())


# ---- one step outside ---------------------------------------------------------------------------------------------


class OtherRows(Block):
    def both(self, product):
        gate = product(self.w1)
        return gate, product(self.w3.roll(1, 0)) * 2 + gate


class Third(Block):
    """The activation reads a third product as well."""

    def between(self, gate, up):
        return super().between(gate, up) * gate


class Biased(Block):
    def grouped(self, x, weights, ids):
        flat = ids.reshape(-1).sort().values
        self.bias = self.w1[:, :, 0][flat]
        return super().grouped(x, weights, ids)

    def both(self, product):
        gate, up = super().both(product)
        return gate + self.bias, up


class Turned(Block):
    """Up lies the other way around in memory."""

    def __init__(self, form):
        super().__init__(form)
        self.register_buffer("turned", self.w3.transpose(1, 2).contiguous())

    def both(self, product):
        return product(self.w1), product(self.turned.transpose(1, 2))


class Linear(Block):
    """Up is no product of the experts."""

    def both(self, product):
        gate = product(self.w1)
        return gate, torch.cat([gate, gate], -1)[..., ::2].contiguous()


class Doubled(Block):
    """Gate is up as well."""

    def both(self, product):
        gate = product(self.w1)
        return gate, gate


class UpClamped(Block):
    def between(self, gate, up):
        return F.silu(gate) * up.clamp(min=-0.8, max=0.8)


class Biased3(Biased):
    """Of up alone."""

    def both(self, product):
        gate, up = Block.both(self, product)
        return gate, up + self.bias


class TwoActivations(Block):
    def between(self, gate, up):
        return F.silu(gate) * F.silu(up)


class Relu(Block):
    def between(self, gate, up):
        return up * F.relu(gate)


class Wide(Block):
    """Rounds once, where eager's SiLU in 16 bits and the op round twice."""

    def between(self, gate, up):
        return (F.silu(gate.float()) * up.float()).to(gate.dtype)


OUTSIDE = {
    "gate is up": (Doubled, Form(), "is both gate and up"),
    "a clamp of up alone": (UpClamped, Form(), "clamps gate or up before they are multiplied"),
    "a bias of up alone": (Biased3, Form(), "are products of their own with a bias"),
    "two activations": (TwoActivations, Form(), "the activation reads .*, where a product is expected"),
    "relu": (Relu, Form("batched"), "none of the activations that are fused: silu_mul, "),
    "float32 between": (Wide, Form("einsum"), "in torch.float32 and rounded to torch.bfloat16 once"),
    "other rows": (OtherRows, Form(), "not in pairs: experts are fused that are two each"),
    "a third factor": (Third, Form(), "before the second product is none of the activations"),
    "a bias": (Biased, Form(), "are products of their own with a bias: it is fused where one weight has both"),
    "strides": (Turned, Form(), "differ in their sizes or in how they lie in memory"),
    "no product": (Linear, Form(), "gate or up, is not a half of the product's channels"),
    "many rows in 16 bits": (Block, Form(before="wide", top_k=4, back="scatter_add"), "adds up 4 rows a token"),
    "weighted rows in 16 bits": (Block, Form(back="scatter_add"), "rounds each weighted row to torch.bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_one_step_outside(name):
    kind, form, reason = OUTSIDE[name]
    result = run(form, kind(form))
    assert "fused_moe" not in result.report.matches, result.report
    reasons = misses(result, "fused_moe")
    assert any(re.search(reason, found) for found in reasons), reasons
    assert_same(result)


@pytest.mark.parametrize("form", ["grouped", "einsum", "batched"])
def test_gate_is_the_one_that_is_activated(form):
    """Whichever was made first, and on whichever side of the product it is."""

    class Swapped(Block):
        def between(self, gate, up):
            return gate * F.silu(up)

    form = Form(form)
    assert_fused(run(form, Swapped(form)), form)


def test_up_by_other_ids():
    class OtherIds(Block):
        def batched(self, x, weights, ids):
            flat, other = ids.reshape(-1), ids.flip(1).reshape(-1)
            rows = x.repeat_interleave(2, 0).unsqueeze(-1)
            between = F.silu(torch.bmm(self.w1[flat], rows)) * torch.bmm(self.w3[other], rows)
            out = torch.bmm(self.w2[flat], between).view(*ids.shape, -1)
            return (out * weights.unsqueeze(-1)).sum(1).to(x.dtype)

    form = Form("batched")
    result = run(form, OtherIds(form))
    assert "fused_moe" not in result.report.matches
    assert any("different top-k ids" in reason for reason in misses(result, "fused_moe"))


def test_weights_before_and_after_are_named():
    def both(x, w1, w2, w3, weights, ids):
        flat = ids.reshape(-1)
        rows = (x.repeat_interleave(2, 0) * weights.reshape(-1, 1)).unsqueeze(-1)
        between = F.silu(torch.bmm(w1[flat], rows)) * torch.bmm(w3[flat], rows)
        out = torch.bmm(w2[flat], between).view(*ids.shape, -1)
        return (out * weights.unsqueeze(-1)).sum(1)

    block = Block(Form())
    x = block.inputs()[0]
    weights, ids = block.route(x)
    given = (x, block.w1, block.w2, block.w3, weights.bfloat16(), ids)
    result = fuse(both, *given, only=[registry()["fused_moe"]])
    assert result.report.matches == {}
    assert "more than one top-k weight was applied to" in misses(result, "fused_moe")[0]


def test_quantize_leaves_them_and_says_so():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(128, 128, dtype=torch.bfloat16)
            self.experts = nn.Module()
            for name in ("w1", "w2", "w3"):
                weight = nn.Parameter(torch.zeros(4, 128, 128, dtype=torch.bfloat16))
                self.experts.register_parameter(name, weight)

    model = Model()
    with pytest.warns(
        UserWarning, match="leaves experts as it is: it has matrices like those of experts"
    ):
        fusion_passes.quantize_(model, "fp8_block")
    assert model.experts.w1.dtype is torch.bfloat16
    assert type(model.proj) is not nn.Linear


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 300])
@pytest.mark.parametrize("name", PUBLIC)
def test_compiled_on_a_gpu(name, tokens):
    """In a CUDA graph, by kernels that read both weights where they are."""
    from fusion_passes.backend import fusion_passes as backend

    torch.compiler.reset()
    form = replace(PUBLIC[name], tokens=tokens, hidden=256, width=384, experts=8)
    block, x = Block(form).cuda(), Block(form).inputs().cuda()
    with torch.no_grad():
        expected = block(x)
        compiled = torch.compile(block, backend=backend, options={"fusions": "all"}, dynamic=False)
        for _ in range(2):
            actual = compiled(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = compiled(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph.replay()
        torch.cuda.synchronize()
    report = fusion_passes.report()
    assert report.matches["fused_moe"] == 1, report
    (site,) = (site for site in report.sites if site.fusion == "fused_moe")
    assert "gate and up apart" in site.pattern
    assert not any(name.endswith(":reference") for name in site.implementations)
    for found in (actual, captured):
        rows = (found.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
        assert float(rows.median()) < 0.01, rows  # a token with two scores alike may go another way
