"""Experts whose gate and up are two weights: found in every form, and the same."""

from __future__ import annotations

from dataclasses import replace

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
from tests.fusion_passes.apart_code import Block, Form, run
from tests.fusion_passes.helpers import assert_same

pytestmark = pytest.mark.usefixtures("references")


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


@pytest.mark.usefixtures("empty_caches")
@pytest.mark.parametrize("name", ["torchtitan", "torchtitan, weights first", "torchtune"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_to_the_end(name, dynamic, monkeypatch):
    """What a rewrite writes, Inductor has code for: of its last graph it decomposes nothing any more."""
    from fusion_passes.backend import fusion_passes as backend

    monkeypatch.setenv("FUSION_PASSES_ALLOW_REFERENCE", "1")
    torch.compiler.reset()
    form = replace(PUBLIC[name], tokens=5)
    block, x = Block(form), Block(form).inputs()
    with torch.no_grad():
        expected = block(x)
        options = {"fusions": "fused_moe"}
        actual = torch.compile(block, backend=backend, options=options, dynamic=dynamic)(x)
    report = fusion_passes.report()
    assert report.matches == {"fused_moe": 1}, report
    assert float((actual - expected).norm()) < 0.02 * float(expected.norm())


@pytest.mark.parametrize("form", ["grouped", "einsum", "batched"])
def test_gate_is_the_one_that_is_activated(form):
    """Whichever was made first, and on whichever side of the product it is."""

    class Swapped(Block):
        def between(self, gate, up):
            return gate * F.silu(up)

    form = Form(form)
    assert_fused(run(form, Swapped(form)), form)


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
