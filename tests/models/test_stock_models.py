"""The main job: stock models, one line, fused kernels, the same logits."""

from __future__ import annotations

import pytest
import torch

import fusion_passes
from fusion_passes import verify
from fusion_passes.testing import fuse
from tests.models.zoo import build, fp8_matches, tokens

pytest.importorskip("transformers", reason="needs the extra 'models'")
pytestmark = pytest.mark.usefixtures("references")

LAYERS = 4
MODELS = ("llama", "qwen3", "gemma3_text")
# gemma's norms after attention and MLP, and the q/k norms of both, fuse with nothing
BF16 = {
    "llama": {"add_rms_norm": 8, "rms_norm": 1, "silu_mul": 4},
    "qwen3": {"add_rms_norm": 8, "rms_norm": 9, "silu_mul": 4},
    "gemma3_text": {"add_rms_norm": 8, "rms_norm": 9, "gelu_tanh_mul": 4},
}
FP8 = {
    "llama": fp8_matches(LAYERS),
    "qwen3": fp8_matches(LAYERS) | {"rms_norm": 8},
    "gemma3_text": fp8_matches(LAYERS, silu_mul_group_quant=0, gelu_tanh_mul_group_quant=1)
    | {"rms_norm": 8},
}
EXPECTED = {"bf16": BF16, "fp8_block": FP8}


@pytest.mark.parametrize("scheme", EXPECTED)
@pytest.mark.parametrize("kind", MODELS)
def test_rewritten_graph_computes_what_eager_computes(kind: str, scheme: str) -> None:
    """Without Inductor, which drops roundings of its own: only what the fusions change is compared."""
    model = build(kind, scheme, LAYERS)
    result = fuse(model, tokens(7), use_cache=False, only=list(fusion_passes.registry().values()))
    assert result.report.matches == EXPECTED[scheme][kind], result.report
    (expected,), (actual,), (judge,) = result.expected, result.actual, result.judge
    if scheme == "bf16":
        assert verify.difference(expected, actual) is None
    ours, eagers = ((side.double() - judge).norm() / judge.norm() for side in (actual, expected))
    # one draw of rounding errors through four layers against another: they differ by chance, not by size
    assert ours <= 1.15 * eagers + 1e-3, f"{ours:.4f} from float64, eager {eagers:.4f}"


@pytest.mark.parametrize("scheme", EXPECTED)
@pytest.mark.parametrize("kind", MODELS)
def test_one_line(kind: str, scheme: str) -> None:
    torch.compiler.reset()
    model = build(kind, scheme, LAYERS)
    compiled = torch.compile(model, backend="fusion_passes", options={"fusions": "all"})
    with torch.no_grad():
        expected, actual = (
            model(tokens(7), use_cache=False).logits,
            compiled(tokens(7), use_cache=False).logits,
        )
    assert fusion_passes.report().matches == EXPECTED[scheme][kind], fusion_passes.report()
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    assert error < (0.02 if scheme == "bf16" else 0.1), f"logits differ by {error:.3%}"
    assert (actual.argmax(-1) == expected.argmax(-1)).float().mean() > 0.7


@pytest.mark.parametrize("kind", MODELS)
def test_dynamic_shapes_take_no_more_graphs_than_stock(kind: str) -> None:
    from torch._dynamo.testing import CompileCounter

    model, counter = build(kind, "fp8_block", 2), CompileCounter()
    lengths = (7, 1, 2, 129)
    with torch.no_grad():
        torch.compiler.reset()
        stock = torch.compile(model, backend=counter, dynamic=True)
        expected = {length: stock(tokens(length), use_cache=False).logits for length in lengths}
        torch.compiler.reset()
        fusion_passes.reset_reports()
        compiled = torch.compile(
            model, backend="fusion_passes", dynamic=True, options={"fusions": "all"}
        )
        for length in lengths:
            actual = compiled(tokens(length), use_cache=False).logits
            error = float(
                (actual - expected[length]).double().norm() / expected[length].double().norm()
            )
            assert error < 0.1, f"{length} tokens: logits differ by {error:.3%}"
    reports = fusion_passes.reports()
    assert len(reports) <= counter.frame_count
    per_layer = {
        name: count
        for name, count in FP8[kind].items()
        if name in ("block_scaled_linear", "shared_group_quant")
    }
    for report in reports:
        assert {name: report.matches[name] for name in per_layer} == {
            n: c // 2 for n, c in per_layer.items()
        }, report
        assert report.matches["add_rms_norm_group_quant"] == 3, report


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mistral", fp8_matches(2)),
        ("qwen2", fp8_matches(2)),  # biases on q/k/v
        ("granite", fp8_matches(2)),
        ("smollm3", fp8_matches(2)),
        ("gemma2", fp8_matches(2, silu_mul_group_quant=0, gelu_tanh_mul_group_quant=1) | {"rms_norm": 4}),
        ("phi3", fp8_matches(2, block_scaled_linear=4, shared_group_quant=0)),  # packed q/k/v and gate/up
        ("glm4", fp8_matches(2, block_scaled_linear=6, shared_group_quant=2) | {"rms_norm": 4}),
        (
            "olmo2",  # norms after the linears, weight multiplied in float32
            {"block_scaled_linear": 14, "shared_group_quant": 6, "silu_mul_group_quant": 2, "group_quant": 6}
            | {"add_rms_norm": 1, "rms_norm": 8},
        ),
        (
            "cohere2",  # LayerNorm: nothing to fuse before the quantization, which attention and MLP share
            {"block_scaled_linear": 14, "shared_group_quant": 8, "silu_mul_group_quant": 2, "group_quant": 4},
        ),
    ],
)  # fmt: skip
def test_models_that_no_pattern_was_written_for(kind: str, expected: dict[str, int]) -> None:
    result = fuse(
        build(kind, "fp8_block", 2),
        tokens(7),
        use_cache=False,
        only=list(fusion_passes.registry().values()),
    )
    assert result.report.matches == expected, result.report
    (eager,), (actual,), (judge,) = result.expected, result.actual, result.judge
    ours, eagers = ((side.double() - judge).norm() / judge.norm() for side in (actual, eager))
    assert ours <= 1.25 * eagers + 1e-3, f"{ours:.4f} from float64, eager {eagers:.4f}"
