"""Every combination of parts that the declarations allow equals the reference; every other is refused by name."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_ops.moe import choice, parts
from custom_ops.moe.finalize import FINALIZES
from custom_ops.moe.parts import Experts, Finalize, Pipeline, Prepare, count_tokens, join
from custom_ops.moe.prepare import PREPARES
from custom_ops.moe.reference import local_experts
from tests.custom_ops.helpers import DEVICE, assert_same_bits
from tests.custom_ops.moe import plain_experts
from tests.custom_ops.moe.problems import ROUTINGS, WEIGHTS, Shape, assert_as_good, shapes

INPUT_FORMATS = ("tokens", "indexed", "contiguous", "batched")
OUTPUT_FORMATS = ("pairs", "contiguous", "batched", "reduced")
EVERY = (*choice.EXPERTS, *plain_experts.EXPERTS)
LEGAL = {p.name: p for p in parts.pipelines(PREPARES, EVERY, FINALIZES)}
ILLEGAL = {
    f"{p.name} -> {e.name} -> {f.name}": (p, e, f)
    for p, e, f in itertools.product(PREPARES, EVERY, FINALIZES)
    if f"{p.name} -> {e.name} -> {f.name}" not in LEGAL
}
# The interpreter takes seconds for what a GPU does in microseconds.
EXAMPLES = 12 if DEVICE == "cpu" else 60


def runnable(pipeline: Pipeline) -> Pipeline:
    if reason := pipeline.experts.unavailable(torch.device(DEVICE)):
        pytest.skip(f"{pipeline.experts.name}: {reason}")
    return pipeline


@pytest.mark.parametrize("name", LEGAL)
def test_every_legal_combination_equals_the_reference(name):
    pipeline = runnable(LEGAL[name])
    ran = 0
    words = {
        "weights": pipeline.experts.weights,
        "tokens": [1, 2, 7, 33],
        "experts": [1, 3, 8],
        "hidden": [128, 256, 136],
        "intermediate": [128, 256, 136],
    }
    if "triton_decode" in name:  # which takes few pairs, of many experts: all that is drawn
        words |= {"tokens": [1, 2], "top_k": [1, 2], "experts": 64}
        words |= {"hidden": [128, 136], "intermediate": [128, 136]}

    @settings(max_examples=EXAMPLES)
    @given(shapes(**words))
    def check(shape):
        nonlocal ran
        problem = shape.problem(DEVICE)
        if pipeline.unsupported(problem) is None:
            ran += 1
            assert_as_good(pipeline(problem), problem)

    check()
    assert ran, "no example that these parts take was drawn"


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", LEGAL)
def test_every_routing(name, routing):
    """What the drawn examples must not miss by chance: one token, and each routing."""
    pipeline = runnable(LEGAL[name])
    for tokens, elsewhere in ((1, False), (17, True)):
        shape = Shape(
            tokens, 2, 4, 128, 128, routing, weights=pipeline.experts.weights, elsewhere=elsewhere
        )
        problem = shape.problem(DEVICE)
        if pipeline.unsupported(problem) is None:
            assert_as_good(pipeline(problem), problem)


@pytest.mark.parametrize("name", ILLEGAL)
def test_every_other_combination_is_refused_with_both_names(name):
    prepare, experts, finalize = ILLEGAL[name]
    with pytest.raises(ValueError, match=f"Experts '{experts.name}'") as refusal:
        join(prepare, experts, finalize)
    assert f"'{prepare.name}'" in str(refusal.value) or f"'{finalize.name}'" in str(refusal.value)


def test_the_top_k_weights_are_applied_once():
    twice = Finalize("twice", lambda *_: torch.empty(0), "reduced", applies_topk_weights=True)
    decode = next(e for e in EVERY if e.applies_topk_weights)
    with pytest.raises(
        ValueError, match=f"Experts '{decode.name}' and Finalize 'twice' both apply"
    ):
        join(PREPARES[0], decode, twice)
    never = dataclasses.replace(decode, name="never", applies_topk_weights=False)
    with pytest.raises(
        ValueError, match=r"neither Experts 'never' nor Finalize .* applies the top-k"
    ):
        join(PREPARES[0], never, FINALIZES[0])


def test_declarations_use_the_vocabulary():
    for part in (*PREPARES, *EVERY):
        assert part.activation_format in INPUT_FORMATS
        assert part.quantization in (None, "fp8_group")
    for experts in EVERY:
        assert experts.output_format in OUTPUT_FORMATS
        assert experts.weights in WEIGHTS
        assert experts.gate_up in ("gate_first", "up_first")
    assert {f.activation_format for f in FINALIZES} == set(OUTPUT_FORMATS)
    for group in (PREPARES, EVERY, FINALIZES):
        assert len({part.name for part in group}) == len(group)


def test_every_part_is_of_use():
    """No Experts without a Prepare and a Finalize, and the other way around."""
    legal = LEGAL.values()
    assert {p.prepare for p in legal} == set(PREPARES)
    assert {p.experts for p in legal} == set(EVERY)
    assert {p.finalize for p in legal} == set(FINALIZES)
    assert set(choice.pipelines()) == {e.name for e in choice.EXPERTS}


def test_parts_that_see_all_tokens_are_not_cut(monkeypatch):
    pipeline = next(p for p in LEGAL.values() if p.experts in plain_experts.EXPERTS)
    whole = dataclasses.replace(
        pipeline, experts=dataclasses.replace(pipeline.experts, chunkable=False)
    )
    problem = Shape(8, 2, 4, 128, 128).problem("cpu")
    assert whole.unsupported(problem) is None
    monkeypatch.setenv(parts.CHUNK_VARIABLE, "4")
    assert "cannot be chunked (CUSTOM_OPS_MOE_CHUNK_TOKENS is 4)" in str(whole.unsupported(problem))


@given(st.integers(1, 10**6), st.integers(1, 10**5))
def test_chunks_cover_all_tokens_in_order_and_are_alike(tokens, most):
    found = list(parts.chunks(tokens, most))
    assert found[0][0] == 0
    assert found[-1][1] == tokens
    assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
    lengths = [stop - start for start, stop in found]
    assert max(lengths) <= most
    assert max(lengths) - min(lengths) <= 1
    assert len(found) == -(-tokens // most)


@given(shapes(tokens=[0, 1, 33]))
def test_counts(shape):
    problem = shape.problem(DEVICE)
    local = local_experts(problem.topk_ids, shape.experts, problem.expert_map)
    counts = count_tokens(local, shape.experts)
    assert counts.dtype == torch.int32
    assert counts.tolist() == [int((local == e).sum()) for e in range(shape.experts)]


@given(shapes(weights=["16_bit", "fp8_block"], hidden=[128, 256], tokens=[1, 7, 33]))
def test_prepared_rows_are_the_tokens(shape):
    """Whose row is whose, for the formats that say so; codes and scales are those of group_quant."""
    problem = shape.problem(DEVICE)
    experts = local_experts(problem.topk_ids, shape.experts, problem.expert_map).flatten()
    codes, scale = torch.ops.custom_ops.group_quant(problem.hidden_states, 128)
    for prepare in PREPARES:
        if prepare.activation_format not in ("contiguous", "batched"):
            continue
        taker = next(e for e in plain_experts.EXPERTS if fits(prepare, e))
        x, x_scale, metadata = prepare.run(problem, taker)
        assert metadata.row_of_pair is not None
        rows = metadata.row_of_pair.long()
        assert torch.equal(rows >= 0, experts >= 0)
        token = torch.arange(len(rows), device=rows.device)[rows >= 0] // shape.top_k
        rows = rows[rows >= 0]
        assert len(rows.unique()) == len(rows)
        flat = x.reshape(-1, x.shape[-1])
        if prepare.quantization is None:
            assert_same_bits(flat[rows], problem.hidden_states[token])
        else:
            assert x_scale is not None
            raw = flat.view(torch.uint8)[rows].view(codes.dtype)
            assert_same_bits(raw, codes.view(torch.uint8)[token].view(codes.dtype))
            assert torch.equal(x_scale.reshape(-1, x_scale.shape[-1])[rows], scale[token])


def fits(prepare: Prepare, experts: Experts) -> bool:
    return (prepare.activation_format, prepare.quantization) == (
        experts.activation_format,
        experts.quantization,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", choice.pipelines())
@pytest.mark.parametrize("tokens", [1, 64, 1024])
def test_a_part_allocates_no_more_than_it_declares(name, tokens):
    pipeline = runnable(choice.pipelines()[name])
    shape = Shape(tokens, 4, 16, 1024, 512, weights=pipeline.experts.weights)
    problem = shape.problem("cuda")
    if reason := pipeline.unsupported(problem):
        pytest.skip(reason)
    pipeline(problem)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pipeline(problem)
    torch.cuda.synchronize()
    used = torch.cuda.max_memory_allocated() - before
    # the allocator rounds each tensor up to 512 bytes
    assert used <= pipeline.workspace(problem.sizes, 2) + 32 * 512
