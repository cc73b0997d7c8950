"""The main job on a GPU: the fused kernels themselves, against eager there."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fusion_passes
from fusion_passes import verify
from fusion_passes.testing import assert_fusion_equivalent, fuse, model_fragments
from tests.models.zoo import build, fp8_matches, tokens

pytestmark = pytest.mark.gpu
pytest.importorskip("transformers", reason="needs the extra 'models'")

SIZES = {
    "num_groups": 4,
    "experts": 60,
    "group_size": 128,
    "hidden_size": 512,
    "intermediate_size": 640,
    "out_features": 384,
    "num_blocks": 3,
    "rank": 16,
    "num_row_blocks": 3,
    "num_column_blocks": 4,
}
INT_MM_TOKENS = 17
"""What torch._int_mm takes at least on a GPU."""
PATTERNED = [fusion for fusion in fusion_passes.registry().values() if fusion.patterns]


@pytest.mark.parametrize("fusion", PATTERNED, ids=lambda fusion: fusion.name)
@given(
    num_tokens=st.sampled_from((1, 2, 7, 64, 129)),
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
)
def test_fusions_equal_eager(
    fusion: fusion_passes.Fusion, num_tokens: int, dtype: torch.dtype
) -> None:
    firing = tuple(pattern for pattern in fusion.patterns if "refused" not in pattern.constants)
    fusion = dataclasses.replace(fusion, patterns=firing)
    if fusion.name.endswith("tensor_quant"):
        num_tokens += 1  # the whole of one token is what token_quant has for its subject
    if fusion.name == "scaled_int_mm":
        num_tokens = max(num_tokens, INT_MM_TOKENS)
    assert_fusion_equivalent(
        fusion, sizes=SIZES | {"num_tokens": num_tokens}, dtype=dtype, device="cuda"
    )


@given(model_fragments(device="cuda"))
def test_fragments(drawn) -> None:
    result = fuse(drawn.module, *drawn.inputs, only=list(fusion_passes.registry().values()))
    assert result.report.matches == drawn.module.expected, result.report
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert verify.difference(expected, actual, accumulated=True) is None


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_one_line(kind: str, mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, the kernels that ran, and no synchronization: the second call runs under a CUDA graph in one mode."""
    from fusion_passes.backend import fusion_passes as backend

    torch.compiler.reset()
    model = copy.deepcopy(build(kind, "fp8_block", 2)).cuda()
    ids = tokens(64).cuda()
    monkeypatch.setenv("FUSION_PASSES", "all")  # torch.compile takes a mode or options
    compiled = torch.compile(model, backend=backend, mode=mode)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for _ in range(3):
            actual = compiled(ids, use_cache=False).logits.clone()
    gated = (
        {"silu_mul_group_quant": 0, "gelu_tanh_mul_group_quant": 1} if kind == "gemma3_text" else {}
    )
    assert fusion_passes.report().matches.items() >= fp8_matches(2, **gated).items(), (
        fusion_passes.report()
    )
    chosen = {name for site in fusion_passes.report().sites for name in site.implementations}
    assert not any(name.endswith(":reference") for name in chosen), chosen
    error = float((actual.double() - expected.double()).norm() / expected.double().norm())
    assert error < 0.1, f"logits differ by {error:.3%}"


def test_verified_on_the_spot() -> None:
    """``verify="raise"`` runs every rewrite of a model against eager on the GPU."""
    from fusion_passes.backend import fusion_passes as backend

    torch.compiler.reset()
    model = copy.deepcopy(build("llama", "fp8_block", 2)).cuda()
    with torch.no_grad():
        torch.compile(model, backend=backend, options={"fusions": "all", "verify": "raise"})(
            tokens(64).cuda(), use_cache=False
        )
    assert fusion_passes.report().matches == fp8_matches(2)


ANOTHER_PROCESS = """
import torch
from torch._dynamo.utils import counters
import fusion_passes
from fusion_passes.backend import fusion_passes as backend
from tests.models.zoo import build, tokens

torch.manual_seed(0)
model, ids = build("llama", "fp8_block", 2).cuda(), tokens(64).cuda()
with torch.no_grad():
    logits = torch.compile(model, backend=backend)(ids, use_cache=False).logits
hits = counters["inductor"]["fxgraph_cache_hit"]
print(hits, sum(fusion_passes.report().matches.values()), float(logits.double().norm()))
"""


def test_a_second_process_runs_the_cached_graph(tmp_path: Path) -> None:
    """The kernels that a cached graph calls by name are there, though the pass never ran in that process."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "FUSION_PASSES": "all"}
    runs = [
        subprocess.run(
            [sys.executable, "-c", ANOTHER_PROCESS],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        for _ in range(2)
    ]
    for run in runs:
        assert run.returncode == 0, run.stderr[-2000:]
    (cold, matches, norm), (warm, *again) = (run.stdout.split()[-3:] for run in runs)
    assert int(cold) == 0
    assert int(warm) > 0
    assert int(matches) > 0
    assert [matches, norm] == again
