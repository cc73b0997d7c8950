"""Gate and up as two weights: the bits of the one that has both, by every way that takes two."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import custom_ops
from custom_ops import platform
from custom_ops.moe import choice, parts, reference
from custom_ops.moe.activation import NAMES
from custom_ops.moe.parts import Pipeline
from custom_ops.moe.problem import Problem
from tests.custom_ops.helpers import DEVICE, assert_refused, assert_same_bits
from tests.custom_ops.moe.problems import ROUTINGS, WEIGHTS, Shape, assert_as_good, shapes

PLAIN = Shape(tokens=7, top_k=2, experts=5, hidden=128, intermediate=128, apart=True)
GATED = [name for name in NAMES if name != "relu2"]
TAKERS = {name: p for name, p in choice.pipelines().items() if p.experts.apart}
EXAMPLES = 6 if DEVICE == "cpu" else 25


def packed(problem: Problem) -> Problem:
    """The same with one weight for both, which lies as they do."""
    gate, up = problem.first_weights
    if gate.stride(1) == 1:
        both = torch.cat([gate.transpose(1, 2), up.transpose(1, 2)], 2).transpose(1, 2)
    else:
        both = torch.cat([gate, up], 1)
    return dataclasses.replace(problem, gate_up=both, up=None)


def runnable(name: str) -> Pipeline:
    pipeline = TAKERS[name]
    if reason := pipeline.experts.unavailable(torch.device(DEVICE)):
        pytest.skip(f"{name}: {reason}")
    return pipeline


def assert_same_as_packed(pipeline: Pipeline, problem: Problem) -> None:
    out = pipeline(problem)
    if pipeline.experts.family == "grouped_mm":  # a library may take other tiles for other sizes
        assert_as_good(out, problem)
    else:
        assert_same_bits(out, pipeline(packed(problem)))


@given(shapes(apart=True, activation=GATED))
def test_the_reference_has_the_bits_of_one_weight_and_is_near_float64(shape):
    problem = shape.problem("cpu")
    args, kwargs = problem.arguments()
    out = reference.fused_moe(*args, **kwargs)
    args, kwargs = packed(problem).arguments()
    assert_same_bits(out, reference.fused_moe(*args, **kwargs))
    assert_as_good(out, problem)


@pytest.mark.parametrize("name", TAKERS)
def test_every_way_has_the_bits_of_one_weight(name):
    pipeline = runnable(name)
    ran = 0
    words = {
        "activation": GATED,
        "weights": pipeline.experts.weights,
        "tokens": [1, 2, 7, 33],
        "experts": [1, 3, 8],
        "hidden": [128, 256, 136],
        "intermediate": [128, 256, 136],
    }
    if pipeline.experts.family == "cuda":  # which takes few of the others
        words |= {"activation": "silu_mul", "biased": False, "dtype": torch.bfloat16}
        words |= {"transposed": False, "hidden": [128, 256], "intermediate": [128, 256]}

    if name.startswith(
        "triton_decode"
    ):  # which takes few pairs, of many experts: all that is drawn
        words |= {"tokens": [1, 2], "top_k": [1, 2], "experts": 64}
        words |= {"hidden": [128, 136], "intermediate": [128, 136]}

    @settings(max_examples=EXAMPLES)
    @given(shapes(apart=True, **words))
    def check(shape):
        nonlocal ran
        problem = shape.problem(DEVICE)
        if pipeline.unsupported(problem) is None and pipeline.unsupported(packed(problem)) is None:
            ran += 1
            assert_same_as_packed(pipeline, problem)

    check()
    assert ran, "no example that these parts take was drawn"


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", TAKERS)
def test_every_routing(name, routing):
    pipeline = runnable(name)
    for tokens, elsewhere in ((1, False), (17, True)):
        shape = dataclasses.replace(
            PLAIN,
            tokens=tokens,
            weights=pipeline.experts.weights,
            routing=routing,
            elsewhere=elsewhere,
        )
        problem = shape.problem(DEVICE)
        if pipeline.unsupported(problem) is None:
            assert_same_as_packed(pipeline, problem)
            assert_as_good(pipeline(problem), problem)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs Triton's interpreter, which checks what it is to read"
)
@given(st.sampled_from(WEIGHTS), st.booleans(), st.sampled_from([24, 128, 136]), st.booleans())
def test_what_is_read_by_descriptors_begins_at_16_bytes(weights, transposed, width, shifted):
    """Also where up alone begins elsewhere, and pointers have to read both."""
    triton_operands = pytest.importorskip("custom_ops.moe.triton_operands", reason="needs triton")
    width = 128 if weights == "fp8_block" else width
    shape = dataclasses.replace(
        PLAIN, weights=weights, transposed=transposed, hidden=40, intermediate=width
    )
    problem = shape.problem()
    if shifted:
        up = problem.up
        room = torch.empty(
            up.numel() + 1, dtype=torch.uint8 if up.element_size() == 1 else up.dtype
        )
        moved = room.view(up.dtype)[1:].as_strided(up.shape, up.stride())
        moved.copy_(up)
        problem = dataclasses.replace(problem, up=moved)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_operands, "descriptors", lambda x: True)
        for name in ("triton", "triton_direct"):
            suffix = "" if weights == "16_bit" else f"_{weights}"
            assert_as_good(runnable(name + suffix)(problem), problem)


def test_ways_that_read_one_weight_refuse_two_by_name():
    others = {name: p for name, p in choice.pipelines().items() if not p.experts.apart}
    assert {"deep_gemm", "deep_gemm_fp8_block", "flashinfer"} <= set(others)
    for name, pipeline in others.items():
        problem = dataclasses.replace(PLAIN, weights=pipeline.experts.weights).problem("cpu")
        reason = pipeline.unsupported(problem)
        assert reason == f"{name} reads gate and up as one weight, here are two"


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_that_lie_in_two_ways(weights):
    problem = dataclasses.replace(PLAIN, weights=weights).problem("cpu")
    turned = problem.up.transpose(1, 2).contiguous().transpose(1, 2)
    other = dataclasses.replace(problem, up=turned)
    suffix = "" if weights == "16_bit" else f"_{weights}"
    for name in ("triton", "triton_direct", "triton_decode"):
        reason = choice.pipelines()[name + suffix].unsupported(other)
        assert reason is not None
        assert reason.startswith("reads gate and up in the same strides")
    args, kwargs = other.arguments()
    assert_as_good(custom_ops.fused_moe(*args, **kwargs), problem)


def test_halves_of_one_weight_are_two():
    """As views, whose experts are further apart than they are long."""
    problem = PLAIN.problem(DEVICE)
    both = packed(problem)
    gate, up = both.gate_up.chunk(2, 1)
    views = dataclasses.replace(problem, gate_up=gate, up=up)
    for name in TAKERS:
        pipeline = TAKERS[name]
        if pipeline.experts.unavailable(torch.device(DEVICE)) or pipeline.unsupported(views):
            continue
        assert_same_as_packed(pipeline, views)


@pytest.mark.parametrize("most", ["1", "3"])
def test_chunks(most, monkeypatch):
    problem = PLAIN.problem("cpu")
    whole = TAKERS["grouped_mm"](problem)
    monkeypatch.setenv(parts.CHUNK_VARIABLE, most)
    assert_as_good(TAKERS["grouped_mm"](problem), problem)
    assert whole.shape == (7, 128)


@pytest.mark.parametrize("weights", ["16_bit", "int8_channel"])
def test_opcheck(weights):
    args, kwargs = dataclasses.replace(PLAIN, weights=weights, tokens=2).call(DEVICE)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.custom_ops.fused_moe.default, args, kwargs, test_utils=checks)


def test_beside_shared_experts():
    args, kwargs = PLAIN.call(DEVICE)
    generator = torch.Generator().manual_seed(1)
    shared = [
        (0.1 * torch.randn(shape, generator=generator)).to(args[0])
        for shape in ((64, 128), (64, 128), (128, 64))
    ]
    routed, _ = custom_ops.fused_moe_and_shared(*args, *shared, **kwargs)
    assert_same_bits(routed, custom_ops.fused_moe(*args, **kwargs))


def bad_calls() -> dict:
    args, kwargs = PLAIN.call("cpu")
    up = kwargs["up"]
    fp8, scaled = dataclasses.replace(PLAIN, weights="fp8_block").call("cpu")
    cut = {**scaled, "up": scaled["up"][:, :72]}
    return {
        "interleaved": (args, {"up": up, "interleaved": True}, "up is a tensor; accepted with interleaved: None"),
        "relu2": (args, {"up": up, "activation": "relu2"}, "accepted with activation 'relu2': None"),
        "dtype": (args, {"up": up.half()}, "up.dtype is torch.float16; accepted: torch.bfloat16"),
        "shape": (args, {"up": up[:, :64]}, r"up.shape is \(5, 64, 128\); accepted: \(5, 128, 128\)"),
        "dims": (args, {"up": up[0]}, r"up.shape is \(128, 128\); accepted: \(5, 128, 128\)"),
        "gate shape": (
            (args[0], torch.cat([args[1]] * 2, 1), *args[2:]),
            {"up": up},
            r"down.shape is \(5, 128, 128\); accepted: \(5, 128, 256\)|up.shape is|gate_up.shape is",
        ),
        "fp8 width": (
            (fp8[0], fp8[1][:, :72], fp8[2][..., :72], *fp8[3:]),
            cut,
            r"gate_up.shape\[1\] is 72; accepted for torch.float8_e4m3fn with up: a multiple of 128",
        ),
        "bias of one": (
            args,
            {"up": up, "gate_up_bias": args[1][:, :, 0].contiguous()},
            r"gate_up_bias.shape is \(5, 128\); accepted: \(5, 256\)",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", bad_calls())
def test_errors_name_the_argument_and_are_the_same_in_the_fake(case):
    args, kwargs, message = bad_calls()[case]
    assert_refused(custom_ops.fused_moe, args, kwargs, message)


def test_devices_must_agree():
    args, kwargs = PLAIN.call("cpu")
    with pytest.raises(ValueError, match="up is on meta; accepted: cpu, as hidden_states"):
        custom_ops.fused_moe(*args, **kwargs | {"up": kwargs["up"].to("meta")})


# On a GPU, at real sizes but for the number of experts

REAL = {
    "Qwen3-30B-A3B": Shape(1, top_k=8, experts=16, hidden=2048, intermediate=768, apart=True),
    "Mixtral-8x7B": Shape(1, top_k=2, experts=8, hidden=4096, intermediate=3584, apart=True),
    "a slice of DeepSeek-V3": Shape(
        1, top_k=4, experts=4, hidden=7168, intermediate=2048, elsewhere=True, apart=True
    ),
}


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64, 512, 3000])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", REAL)
def test_real_sizes_have_the_bits_of_one_weight(name, weights, tokens):
    problem = dataclasses.replace(REAL[name], tokens=tokens, weights=weights).problem("cuda")
    both = packed(problem)
    expected: torch.Tensor | None = None
    for pipeline in TAKERS.values():
        if pipeline.experts.unavailable(torch.device("cuda")) or pipeline.unsupported(problem):
            continue
        out = pipeline(problem)
        if pipeline.experts.family != "grouped_mm":
            assert_same_bits(out, pipeline(both))
        if expected is None:
            args, kwargs = problem.arguments()
            expected = reference.fused_moe(*args, **kwargs)
        difference = (out.double() - expected.double()).norm() / expected.double().norm()
        assert float(difference) <= (2e-2 if weights == "fp8_block" else 4e-3), pipeline.name
    assert expected is not None


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 700])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_captured_in_a_cuda_graph_without_synchronization(weights, tokens):
    if not platform.has_triton():
        pytest.skip("needs triton")
    args, kwargs = dataclasses.replace(
        PLAIN, tokens=tokens, hidden=256, intermediate=256, weights=weights
    ).call("cuda")
    expected = custom_ops.fused_moe(*args, **kwargs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = custom_ops.fused_moe(*args, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(out, expected)


@pytest.mark.gpu
def test_what_the_op_chooses_for_two_weights():
    """Never the reference, which waits for the device."""
    importlib.import_module("custom_ops.moe.triton_experts")
    for weights in WEIGHTS:
        for tokens in (1, 16, 512, 3000):
            shape = dataclasses.replace(REAL["Qwen3-30B-A3B"], tokens=tokens, weights=weights)
            args, kwargs = shape.call("cuda")
            chosen = custom_ops.ops()["fused_moe"].choose(*args, **kwargs).implementation
            assert chosen is not None
            assert chosen.name != "reference"
