"""Dequantize-and-matmul and int8 matmuls become scaled_mm: what fires, what does not, and what comes out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from fusion_passes import manager, registry, settings, torch_internals
from fusion_passes.quantize import Fp8TokenLinear, Int8TokenLinear
from fusion_passes.reporting import Report
from tests.captures import graphs
from tests.fusion_passes.helpers import FP8, calls, fuse_all, misses, random

pytestmark = pytest.mark.usefixtures("references")

INT8 = torch.int8
LINEAR = ["block_scaled_linear", "scaled_linear"]
activation_dtypes = st.sampled_from((torch.bfloat16, torch.float16))
leading = st.sampled_from(((5,), (1,), (2, 3), (2, 1, 3)))


def codes(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (random(*shape, dtype=torch.float32, seed=seed) * 40).clamp(-127, 127).to(dtype)


def scales(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (random(*shape, dtype=torch.float32, seed=seed).abs() / 64 + 0.01).to(dtype)


class Dequantized(nn.Module):
    """A linear over codes, in the spellings of hand-written code; the weights are its buffers."""

    def __init__(self, k, n, dtype, code_dtype, per_channel, bias, wide, flat_scale=False, seed=0):
        super().__init__()
        self.dtype, self.wide, self.flat_scale = dtype, wide, flat_scale
        scale_dtype = torch.float32 if wide else dtype
        shape = (1,) if not per_channel else (n,) if flat_scale else (n, 1)
        self.register_buffer("weight", codes(n, k, dtype=code_dtype, seed=seed))
        self.register_buffer("weight_scale", scales(*shape, dtype=scale_dtype, seed=seed))
        self.register_buffer("bias", random(n, dtype=dtype, seed=seed) if bias else None)

    def dequantize(self, q, scale):
        return (q.float() * scale).to(self.dtype) if self.wide else q.to(self.dtype) * scale

    def forward(self, q, scale):
        weight_scale = self.weight_scale.unsqueeze(-1) if self.flat_scale else self.weight_scale
        weight = self.dequantize(self.weight, weight_scale)
        return F.linear(self.dequantize(q, scale), weight, self.bias)


@given(
    dtype=activation_dtypes,
    code_dtype=st.sampled_from((FP8, INT8)),
    lead=leading,
    k=st.sampled_from((16, 100, 256)),
    n=st.sampled_from((8, 48, 130)),
    per_token=st.booleans(),
    per_channel=st.booleans(),
    bias=st.booleans(),
    wide=st.booleans(),
    flat_scale=st.booleans(),
    dynamic=st.sampled_from((None, True)),
    seed=st.integers(0, 9),
)
def test_it_becomes_one_gemm(
    dtype, code_dtype, lead, k, n, per_token, per_channel, bias, wide, flat_scale, dynamic, seed
):
    flat_scale = flat_scale and per_channel
    module = Dequantized(k, n, dtype, code_dtype, per_channel, bias, wide, flat_scale, seed)
    scale_shape = (*lead, 1) if per_token else ()
    scale = scales(*scale_shape, dtype=torch.float32 if wide else dtype, seed=seed)
    q = codes(*lead, k, dtype=code_dtype, seed=seed)
    result = fuse_all(module, q, scale, only=LINEAR, dynamic=dynamic)
    assert result.report.matches == {"scaled_linear": 1}
    assert not [name for name in calls(result.after.graph) if "aten.mm" in name or "addmm" in name]
    judge, ours, eager = result.judge[0], result.actual[0], result.expected[0]
    error, theirs = (float((side.double() - judge).norm()) for side in (ours, eager))
    assert error <= 1.02 * theirs + 1e-6 * float(judge.norm())  # the operands are not rounded


@pytest.mark.parametrize("linear", [Fp8TokenLinear, Int8TokenLinear])
def test_linears_that_share_an_activation_are_all_rewritten(linear):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linears = nn.ModuleList(
                linear.from_linear(nn.Linear(96, n, bias=False, dtype=torch.bfloat16))
                for n in (64, 32, 32)
            )

        def forward(self, x):
            return tuple(each(x) for each in self.linears)

    result = fuse_all(Model().eval(), random(2, 5, 96))
    assert result.report.matches["scaled_linear"] == 3
    assert result.report.matches["shared_group_quant"] == 2
    assert calls(result.after.graph).count("custom_ops.scaled_mm.default") == 3
    assert calls(result.after.graph).count("custom_ops.token_quant.default") == 1


def near(name: str):
    """Modules one step outside of what the fusion computes."""
    q, scale = codes(5, 64, dtype=FP8), scales(5, 1)
    weight, weight_scale = codes(32, 64, dtype=FP8), scales(32, 1)
    columns, wide, wide_scale = scales(64), codes(64, 32, dtype=FP8), scales(64, 1)
    return {
        "a scale per input channel of the weight": (
            lambda: F.linear((q.float() * scale).bfloat16(), (weight.float() * columns).bfloat16())
        ),
        "a scale per channel of the activation": (
            lambda: F.linear(
                (q.float() * columns).bfloat16(), (weight.float() * weight_scale).bfloat16()
            )
        ),
        "a weight that is not quantized": (
            lambda: F.linear((q.float() * scale).bfloat16(), weight.bfloat16())
        ),
        "two dtypes of codes": (
            lambda: F.linear(
                (q.float() * scale).bfloat16(), (weight.to(INT8).float() * weight_scale).bfloat16()
            )
        ),
        "float32 operands": (lambda: F.linear(q.float() * scale, weight.float() * weight_scale)),
        "a weight that is not transposed": (
            lambda: (q.float() * scale).bfloat16() @ (wide.float() * wide_scale).bfloat16()
        ),
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "a scale per input channel of the weight",
        "a scale per channel of the activation",
        "a weight that is not quantized",
        "two dtypes of codes",
        "float32 operands",
        "a weight that is not transposed",
    ],
)
def test_one_step_outside_nothing_fires(name):
    assert not fuse_all(near(name), only=LINEAR).report.matches


def test_a_near_miss_is_reported():
    result = fuse_all(near("a scale per input channel of the weight"), only=["scaled_linear"])
    assert misses(result, "scaled_linear")


def test_sums_that_may_leave_int32_are_left_alone():
    k = 2**17
    module = Dequantized(k, 8, torch.bfloat16, INT8, True, False, True)
    result = fuse_all(module, codes(2, k, dtype=INT8), scales(2, 1), only=LINEAR)
    assert not result.report.matches
    assert any("int32" in reason for reason in misses(result, "scaled_linear"))


# --- int8 matmuls ----------------------------------------------------------------------------------------------


class IntMm(nn.Module):
    """torch._int_mm and its scales: as torchao spells it (from 0.18 on: "between"), and with float32 scales."""

    def __init__(self, k, n, dtype, spelling, bias, seed):
        super().__init__()
        self.dtype, self.spelling = dtype, spelling
        scale_dtype = dtype if spelling == "torchao" else torch.float32
        self.register_buffer("weight", codes(n, k, dtype=INT8, seed=seed))
        self.register_buffer("weight_scale", scales(n, dtype=scale_dtype, seed=seed))
        self.register_buffer("bias", random(n, dtype=dtype, seed=seed) if bias else None)

    def forward(self, q, scale):
        sums = torch._int_mm(q.reshape(-1, q.shape[-1]), self.weight.t())
        rows = scale.reshape(-1, 1)
        if self.spelling == "torchao":
            out = sums * rows.expand(sums.shape) * self.weight_scale
        elif self.spelling == "between":
            out = (sums * rows.expand(sums.shape)).to(self.dtype) * self.weight_scale
            out = out.to(self.dtype)
        elif self.spelling == "cast":
            out = sums.float() * rows * self.weight_scale
        else:
            out = sums * rows * self.weight_scale
        out = out if self.bias is None else out + self.bias
        return out.to(self.dtype).reshape(*q.shape[:-1], -1)


@given(
    dtype=activation_dtypes,
    lead=leading,
    k=st.sampled_from((16, 104, 1024)),
    n=st.sampled_from((8, 48, 136)),
    spelling=st.sampled_from(("torchao", "between", "cast", "promoted")),
    bias=st.booleans(),
    dynamic=st.sampled_from((None, True)),
    seed=st.integers(0, 9),
)
def test_an_int8_matmul_keeps_every_bit_of_eager(dtype, lead, k, n, spelling, bias, dynamic, seed):
    module = IntMm(k, n, dtype, spelling, bias, seed)
    scale = scales(*lead, dtype=module.weight_scale.dtype, seed=seed)
    q = codes(*lead, k, dtype=INT8, seed=seed)
    result = fuse_all(module, q, scale, only=["scaled_int_mm"], dynamic=dynamic)
    assert result.report.matches == {"scaled_int_mm": 1}
    assert torch.equal(result.actual[0], result.expected[0])


def test_an_int8_matmul_whose_sums_are_also_read_is_left_alone():
    weight, weight_scale = codes(48, 64, dtype=INT8), scales(48, dtype=torch.bfloat16)

    def fn(q, scale):
        sums = torch._int_mm(q, weight.t())
        return sums * scale * weight_scale, sums

    args = codes(5, 64, dtype=INT8), scales(5, 1, dtype=torch.bfloat16)
    result = fuse_all(fn, *args, only=["scaled_int_mm"])
    assert not result.report.matches
    assert any("also used" in reason for reason in misses(result, "scaled_int_mm"))


def run(graph: fx.Graph, names: list[str]) -> Report:
    """Rewrite a graph in place by the fusions of these names."""
    allowed = settings.current().model_copy(update={"allow_reference": True})
    return manager.run(graph, allowed, [registry()[name] for name in names])


# --- modules of others -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_the_fp8_linear_of_transformers_keeps_the_gemm_that_it_asks_for(bias):
    """CompressedTensorsFP8Linear calls scaled_mm itself: no dequantization is there to take away."""
    from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear

    linear = CompressedTensorsFP8Linear(64, 48, has_bias=bias).eval().requires_grad_(False)
    linear.weight.data, linear.weight_scale.data = codes(48, 64, dtype=FP8), scales(1, 48)
    if bias:
        linear.bias.data = random(48)
    (captured,) = torch_internals.capture(linear, random(2, 3, 64))
    graph = captured.graph
    assert not run(graph, LINEAR).matches
    assert "aten._scaled_mm_v2.default" in calls(graph)


def test_every_int8_matmul_of_torchao_is_found():
    graph = graphs.load("torchao_int8")
    before = sum("_int_mm" in str(node.target) for node in graph.nodes)
    report = run(graph, list(registry()))
    assert report.matches["scaled_int_mm"] == before == 7
    assert not any("_int_mm" in str(node.target) for node in graph.nodes)
    made = [node for node in graph.nodes if node.target is torch.ops.custom_ops.scaled_mm.default]
    assert {node.kwargs["epilogue"] for node in made} == {"out_dtype"}
    # the scales of the activations come from a kernel here, and are read before they are rounded to 16 bits
    assert {node.args[1].meta["val"].dtype for node in made} == {torch.float32}
