"""Experts on FlashInfer: what is handed to its function, and the weights that are kept in its order."""

from __future__ import annotations

import gc
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from custom_ops.moe import choice, experts_flashinfer, reference
from custom_ops.moe.problem import Problem
from tests.custom_ops.helpers import assert_same_bits
from tests.custom_ops.moe.problems import Shape, assert_as_good, shapes


@pytest.fixture
def stand_in(monkeypatch):
    """A flashinfer whose function is the reference, of weights in the order that FlashInfer reads."""
    seen = []

    def cutlass_fused_moe(**given):
        seen.append(given)
        gate_up, scales = given["fc1_expert_weights"], given["quant_scales"]
        gated = given["activation_type"] == "swiglu"

        def swap(weight):
            up, gate = weight.view(torch.uint8).chunk(2, 1)
            return torch.cat((gate, up), 1).view(weight.dtype) if gated else weight

        words = {"gate_up_scale": swap(scales[0]), "down_scale": scales[1]} if scales else {}
        assert given["use_deepseek_fp8_block_scale"] == bool(scales)
        assert given["token_selected_experts"].dtype == torch.int32
        assert given["token_final_scales"].dtype == torch.float32
        problem = Problem.of(
            given["input"],
            swap(gate_up),
            given["fc2_expert_weights"],
            given["token_final_scales"],
            given["token_selected_experts"],
            activation="silu_mul" if gated else "relu2",
            **words,
        )
        args, kwargs = problem.arguments()
        given["output"].copy_(reference.fused_moe(*args, **kwargs))

    module = types.ModuleType("flashinfer.fused_moe")
    module.cutlass_fused_moe = cutlass_fused_moe
    module.ActivationType = types.SimpleNamespace(Swiglu="swiglu", Relu2="relu2")
    package = types.ModuleType("flashinfer")
    package.fused_moe = module
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.fused_moe", module)
    return seen


@pytest.mark.parametrize("weights", ["16_bit", "fp8_block"])
@pytest.mark.parametrize("activation", ["silu_mul", "relu2"])
def test_what_it_is_handed(stand_in, weights, activation):
    name = "flashinfer" if weights == "16_bit" else f"flashinfer_{weights}"
    shape = Shape(9, 2, 4, 128, 256, weights=weights, activation=activation)
    problem = shape.problem("cpu")
    pipeline = choice.pipelines()[name]
    if pipeline.unsupported(problem):
        assert (weights, activation) == ("fp8_block", "relu2")
        return
    assert_as_good(pipeline(problem), problem)
    assert len(stand_in) == 1


@given(
    st.sampled_from([torch.bfloat16, torch.float32, torch.float8_e4m3fn]),
    st.integers(1, 3),
    st.integers(1, 4),
)
def test_the_other_order(dtype, experts, half):
    weight = torch.randn(experts, 2 * half, 8).to(dtype)
    swapped = experts_flashinfer.up_first(weight)
    raw = weight.view(torch.uint8)
    assert_same_bits(swapped.view(torch.uint8), torch.cat((raw[:, half:], raw[:, :half]), 1))
    assert experts_flashinfer.up_first(weight) is swapped


def test_a_weight_that_is_written_to_is_copied_anew():
    weight = torch.randn(2, 4, 8)
    before = experts_flashinfer.up_first(weight).clone()
    weight.mul_(2)
    assert_same_bits(experts_flashinfer.up_first(weight), 2 * before)


def test_a_copy_lives_as_long_as_its_weight():
    experts_flashinfer._kept.clear()
    weight = torch.randn(2, 4, 8)
    experts_flashinfer.up_first(weight)
    del weight
    gc.collect()
    other = torch.randn(2, 6, 8)
    experts_flashinfer.up_first(other)
    assert len(experts_flashinfer._kept) == 1


@given(shapes(hidden=[128, 136], intermediate=[128, 136]))
def test_what_it_does_not_take_has_a_reason(shape):
    problem = shape.problem("cpu")
    name = {"16_bit": "flashinfer", "fp8_block": "flashinfer_fp8_block"}.get(problem.weights)
    if name is None:
        return
    refused = choice.pipelines()[name].unsupported(problem)
    takes = (
        problem.activation.name in ("silu_mul", "relu2")
        and not problem.activation.interleaved
        and problem.gate_up_bias is problem.down_bias is problem.expert_map is None
    )
    assert refused is not None or takes


def test_it_is_not_imported_to_find_out_whether_it_can_run():
    assert "flashinfer" not in sys.modules
    reason = experts_flashinfer.unavailable(torch.device("cpu"))
    assert reason == "needs a CUDA tensor, this one is on cpu"
