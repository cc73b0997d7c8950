"""`fused_moe` of tokens that are quantized already: the bits of quantizing inside, whichever parts run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import custom_ops
from custom_ops.moe import choice, parts
from custom_ops.moe.finalize import FINALIZES
from custom_ops.moe.prepare import PREPARES
from custom_ops.moe.problem import Problem
from tests.custom_ops.helpers import DEVICE, assert_same_bits
from tests.custom_ops.moe import plain_experts
from tests.custom_ops.moe.problems import Shape, shapes

EVERY = (*choice.EXPERTS, *plain_experts.EXPERTS)
PIPELINES = {
    p.name: p
    for p in parts.pipelines(PREPARES, EVERY, FINALIZES)
    if p.experts.weights == "fp8_block"
}
FP8 = torch.float8_e4m3fn
EXAMPLES = 6 if DEVICE == "cpu" else 40


def quantized(problem: Problem, transposed: bool = False) -> Problem:
    """The same tokens as codes and scales; the scales also in another memory order."""
    codes, scale = custom_ops.group_quant(problem.hidden_states, 128, **problem.quantization)
    if transposed:
        scale = scale.t().contiguous().t()
    return dataclasses.replace(
        problem, hidden_states=codes, hidden_scale=scale, out_dtype=problem.dtype
    )


@pytest.mark.parametrize("name", PIPELINES)
def test_the_bits_of_quantizing_inside(name):
    pipeline = PIPELINES[name]
    if reason := pipeline.experts.unavailable(torch.device(DEVICE)):
        pytest.skip(f"{pipeline.experts.name}: {reason}")
    ran = 0

    @settings(max_examples=EXAMPLES)
    @given(
        shapes(
            weights="fp8_block",
            tokens=[1, 2, 7, 33],
            experts=[1, 3, 8],
            hidden=[128, 256],
            intermediate=[128, 136],
        ),
        st.booleans(),
    )
    def check(shape, transposed):
        nonlocal ran
        problem = shape.problem(DEVICE)
        codes = quantized(problem, transposed)
        if pipeline.prepare.quantization is None:
            assert "takes tokens in 16 bits, these are quantized" in str(
                pipeline.unsupported(codes)
            )
            ran += 1
        elif pipeline.unsupported(problem) is None:
            assert pipeline.unsupported(codes) is None
            ran += 1
            assert_same_bits(pipeline(codes), pipeline(problem))

    check()
    assert ran


@settings(max_examples=10)
@given(shapes(weights="fp8_block", hidden=[128, 384], intermediate=[128, 136], tokens=[0, 1, 7]))
def test_the_op_and_its_fake(shape):
    problem = shape.problem(DEVICE)
    args, kwargs = quantized(problem).arguments()
    out = custom_ops.fused_moe(*args, **kwargs)
    assert out.dtype == problem.dtype
    args16, kwargs16 = problem.arguments()
    reference = custom_ops.ops()["fused_moe"].reference
    assert_same_bits(reference(*args, **kwargs), reference(*args16, **kwargs16))
    meta = torch.ops.custom_ops.fused_moe(
        *(t.to("meta") for t in args),
        **{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()},
    )
    assert (meta.shape, meta.stride(), meta.dtype) == (out.shape, out.stride(), out.dtype)


def test_chunks(monkeypatch):
    problem = Shape(9, 2, 4, 128, 128, weights="fp8_block").problem("cpu")
    pipeline = next(p for p in PIPELINES.values() if p.experts in plain_experts.EXPERTS
                    and p.prepare.quantization)  # fmt: skip
    whole = pipeline(quantized(problem))
    monkeypatch.setenv(parts.CHUNK_VARIABLE, "4")
    assert_same_bits(pipeline(quantized(problem)), whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_states": torch.ones(3, 128)},
            "hidden_states.dtype with hidden_scale is torch.fl",
        ),
        ({"gate_up": torch.ones(4, 256, 128)}, "gate_up.dtype with hidden_scale is torch.float32"),
        ({"hidden_scale": torch.ones(3, 2)}, r"hidden_scale.shape is \(3, 2\); accepted: \(3, 1\)"),
        (
            {"hidden_scale": torch.ones(3, 1).half()},
            "hidden_scale.dtype is torch.float16; accepted",
        ),
        ({"out_dtype": torch.float32}, "out_dtype is torch.float32; accepted"),
    ],
)
def test_errors_name_the_argument(change, message):
    problem = quantized(Shape(3, 2, 4, 128, 128, weights="fp8_block").problem("cpu"))
    args, kwargs = dataclasses.replace(problem, **change).arguments()
    with pytest.raises(ValueError, match=f"fused_moe: {message}"):
        custom_ops.fused_moe(*args, **kwargs)


def test_codes_without_scales_are_refused():
    problem = quantized(Shape(3, 2, 4, 128, 128, weights="fp8_block").problem("cpu"))
    args, kwargs = dataclasses.replace(problem, hidden_scale=None).arguments()
    with pytest.raises(ValueError, match=r"hidden_states.dtype is torch.float8_e4m3fn; accepted"):
        custom_ops.fused_moe(*args, **kwargs)
