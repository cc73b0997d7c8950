"""Mixtures of experts on a GPU: the kernels themselves, against eager there."""

from __future__ import annotations

import copy

import pytest
import torch

import fusion_passes
from fusion_passes import registry
from fusion_passes.testing import fuse
from tests.models.moe_zoo import build, tokens
from tests.models.test_moe import FUSIONS, IMPLEMENTATIONS, ROUTERS, routes

pytestmark = pytest.mark.gpu
pytest.importorskip("transformers", reason="needs the extra 'models'")

LAYERS = 2
KINDS = {**ROUTERS, "minimax_m2": "topk_sigmoid"}


def errors(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of each token: where two experts have nearly one score, either may be taken, and that token is another one."""
    return (actual.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)


def share_of_far(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """How many tokens went another way altogether."""
    return float((errors(actual, expected) > 0.5).double().mean())


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its embeddings off by at most one rounding, which is as good a model as it is."""
    model = copy.deepcopy(model)
    weight = model.get_input_embeddings().weight
    generator = torch.Generator(weight.device).manual_seed(1)
    noise = torch.rand(weight.shape, generator=generator, device=weight.device) - 0.5
    weight.data = (weight.data.float() * (1 + noise * 2.0**-7)).to(weight.dtype)
    return model


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_line(
    kind: str, scheme: str, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, and that no reference ran; the later calls run under a CUDA graph in one mode.

    How many tokens may go to other experts than eager's depends on how near the scores of a random router are: those of
    MiniMax-M2 send a tenth of them elsewhere for one rounding in the embeddings, and so does stock torch.compile. So
    the bound is 3 tokens more than eager itself has for such a rounding.
    """
    from fusion_passes.backend import fusion_passes as backend

    torch.compiler.reset()
    model = copy.deepcopy(build(kind, "grouped_mm", scheme, LAYERS)).cuda()
    ids = tokens(64).cuda()
    monkeypatch.setenv("FUSION_PASSES", "all")  # torch.compile takes a mode or options
    compiled = torch.compile(model, backend=backend, mode=mode)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        unsteady = share_of_far(moved(model)(ids, use_cache=False).logits, expected)
        for _ in range(3):
            actual = compiled(ids, use_cache=False).logits.clone()
    report = fusion_passes.report()
    assert report.matches.items() >= {KINDS[kind]: LAYERS, "fused_moe": LAYERS}.items(), report
    chosen = {name for site in report.sites for name in site.implementations}
    assert not any(name.endswith(":reference") for name in chosen), chosen
    far = errors(actual, expected)
    assert float(far.median()) < (0.05 if scheme == "bf16" else 0.15), far
    assert share_of_far(actual, expected) <= 0.05 + unsteady, (unsteady, far)


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_go_to_the_experts_that_eager_sends_them_to(kind: str, scheme: str) -> None:
    model = copy.deepcopy(build(kind, "grouped_mm", scheme, LAYERS)).cuda()
    only = [registry()[name] for name in FUSIONS]
    result = fuse(model, tokens(129).cuda(), use_cache=False, only=only)
    top_k = model.config.num_experts_per_tok
    inputs = result.before.meta["inputs"]
    before, after = (routes(side, inputs, top_k) for side in (result.before, result.after))
    flipped = float((before != after).any(-1).float().mean())
    assert flipped <= (0.01 if scheme == "bf16" else 0.05), f"{flipped:.1%} of the tokens"


def clamped(rows: torch.Tensor) -> torch.Tensor:
    """The gate of DeepSeek-V4, which not every transformers has, with a limit within the values."""
    gate, up = rows.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate.clamp(max=0.5)) * up.clamp(min=-0.5, max=0.5)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "fusion_passes"])
@pytest.mark.parametrize("count", [1, 16, 300])
@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
def test_a_clamped_gate(scheme: str, count: int, implementation: str) -> None:
    """As near to eager as another gate is, which one without the limit would not be."""
    from fusion_passes.backend import fusion_passes as backend

    torch.compiler.reset()
    model = copy.deepcopy(build("qwen3_moe", "grouped_mm", scheme, 1)).cuda()
    block = model.model.layers[0].mlp
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(1, count, model.config.hidden_size, generator=generator).bfloat16().cuda()

    def first(result):
        return result[0] if isinstance(result, tuple) else result

    with torch.no_grad():
        unclamped = first(block(x))
        getattr(block.experts, "stock", block.experts)._apply_gate = clamped
        expected = first(block(x))
        model.config._experts_implementation = implementation
        compiled = torch.compile(block, backend=backend, options={"fusions": "all"}, dynamic=False)
        actual = first(compiled(x))
    if implementation != "fusion_passes":  # where nothing is left to find
        report = fusion_passes.report()
        (site,) = [site for site in report.sites if site.fusion == "fused_moe"]
        assert "clamped_silu_mul" in site.pattern
        assert not any(name.endswith(":reference") for name in site.implementations)
    far = errors(actual, expected)
    assert float(far.median()) < (0.01 if scheme == "bf16" else 0.05), far
    assert float(errors(unclamped, expected).median()) > 0.2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("count", [1, 16, 300])
@pytest.mark.parametrize("scheme", ["bf16", "fp8_block"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_block_waits_for_nothing(
    kind: str, scheme: str, count: int, implementation: str
) -> None:
    """One layer's block against eager, then once more where any synchronization is an error."""
    from fusion_passes.backend import fusion_passes as backend

    torch.compiler.reset()
    model = copy.deepcopy(build(kind, implementation, scheme, 1)).cuda()
    block = model.model.layers[0].mlp
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(1, count, model.config.hidden_size, generator=generator).bfloat16().cuda()

    def first(result):
        return result[0] if isinstance(result, tuple) else result

    compiled = torch.compile(block, backend=backend, options={"fusions": "all"}, dynamic=False)
    with torch.no_grad():
        expected = first(block(x))
        compiled(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            actual = first(compiled(x))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    report = fusion_passes.report()
    assert report.matches["fused_moe"] == report.matches[KINDS[kind]] == 1, report
    far = errors(actual, expected)
    assert float(far.median()) < (0.01 if scheme == "bf16" else 0.05), far
