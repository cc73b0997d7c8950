"""`generate` on a compiled model: a cache of a fixed size, one graph for the prompt and one for all steps after it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import fusion_passes
from tests.models.zoo import build, fp8_matches

transformers = pytest.importorskip("transformers", reason="needs the extra 'models'")
pytestmark = pytest.mark.slow

STEPS = 5
HOW = {
    "max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True,
    "eos_token_id": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSION_PASSES", "all")
    monkeypatch.setenv("FUSION_PASSES_ALLOW_REFERENCE", "1")
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "triton")  # its interpreter takes minutes for a model


@pytest.mark.parametrize(("kind", "prompt"), [("llama", 6), ("qwen3", 1)])
def test_a_static_cache(kind: str, prompt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(kind, "fp8_block", 2)
    ids = torch.randint(3, 200, (2, prompt), generator=torch.Generator().manual_seed(prompt))
    eager: Any = model.generate(ids, **HOW)
    torch.compiler.reset()
    fusion_passes.reset_reports()
    compiled = torch.compile(model.forward, backend="fusion_passes", fullgraph=True)
    monkeypatch.setattr(model, "forward", compiled)
    ours: Any = model.generate(ids, cache_implementation="static", disable_compile=True, **HOW)
    torch.compiler.reset()
    assert ours.sequences.shape == eager.sequences.shape == (2, prompt + STEPS)
    same = True  # a tie may go either way, and the steps after it are of another text
    for step, (a, b) in enumerate(zip(ours.logits, eager.logits, strict=True)):
        assert not same or float((a - b).norm() / b.norm()) < 0.1
        same = same and torch.equal(a.argmax(-1), b.argmax(-1))
        assert same or step
    found = fusion_passes.reports()
    assert 1 <= len(found) <= 2
    linears = {
        k: v for k, v in fp8_matches(2).items() if k.endswith(("linear", "shared_group_quant"))
    }
    assert all(linears.items() <= report.matches.items() for report in found)
    for one, other in itertools.pairwise(found):
        assert one.matches == other.matches
