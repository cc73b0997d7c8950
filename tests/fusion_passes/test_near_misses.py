"""One step outside a fusion's meaning: it does not fire, the result stays, and the report says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusion_passes.mismatch import short
from fusion_passes.operations import transparent
from fusion_passes.quantize import Fp8BlockLinear, quantize_weight
from tests.fusion_passes.helpers import (
    EPS,
    FP8,
    fuse_all,
    llama_norm,
    misses,
    quantize,
    random,
    silu_mul,
)

pytestmark = pytest.mark.usefixtures("references")

X, OTHER, W = random(6, 256), random(6, 256, seed=1), random(256, seed=2)
WEIGHT, SCALE = quantize_weight(random(200, 256, seed=3))
TWICE, FINE, BIAS = torch.cat([SCALE, SCALE]), SCALE.repeat_interleave(2, 0), random(200)
SQUARE, SQUARE_SCALE = quantize_weight(random(256, 256, seed=4))


def normed(x: torch.Tensor, dims: Any = -1) -> torch.Tensor:
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(dims, keepdim=True) + EPS)


def grouped(x: torch.Tensor, size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    groups = x.float().unflatten(-1, (-1, size))
    return groups, groups.abs().amax(-1, keepdim=True).clamp(min=1e-10)


def codes(quotient: torch.Tensor) -> torch.Tensor:
    return quotient.clamp(-448.0, 448.0).to(FP8)


def linear(x, weight, scale_inv, bias=None, block=128, transposed=False, dtype=None):
    q, scale = quantize(x)
    operand = (
        (q.float().unflatten(-1, (-1, 128)) * scale.unsqueeze(-1)).flatten(-2).to(dtype or x.dtype)
    )
    blocks = scale_inv.repeat_interleave(block, 0)[: weight.shape[0]].repeat_interleave(128, 1)
    dense = (weight.float() * blocks).to(operand.dtype)
    return operand @ dense if transposed else F.linear(operand, dense, bias)


@dataclass(frozen=True)
class Case:
    """What must not fire; what else may (all of it, exactly); and words of the reason that must be reported."""

    name: str
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    fires: tuple[str, ...] = ()
    missed: str = ""
    words: tuple[str, ...] = ()


def reciprocal_of_amax(x):
    groups, amax = grouped(x)
    return codes(groups * (448.0 / amax)), amax / 448.0


def scale_in_16_bits(x):
    groups = x.unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return codes(groups.float() / scale), scale


def scale_of_another(x, y):
    scale = grouped(y)[1] / 448.0
    return codes(grouped(x)[0] / scale), scale


def other_limit(x):
    groups, amax = grouped(x)
    scale = amax / 240.0
    return (groups / scale).clamp(-240.0, 240.0).to(FP8), scale


def sum_in_float32(x, residual, weight):
    total = x.float() + residual.float()
    h = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * h.to(x.dtype), total.to(x.dtype)


def reciprocal_norm_used_twice(x, weight):
    h = x.float()
    scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * (h * scale).to(x.dtype), scale


def by_tensor_and_used(x, weight):
    h = llama_norm(x, weight)
    amax = h.float().abs().amax().clamp(min=1e-10)
    scale = amax / 448.0
    return codes(h.float() / scale), scale, h


def eps_rounded_to_16_bits(x, weight, eps):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps.to(x.dtype))
    return weight * h.to(x.dtype)


linear_64, linear_t = partial(linear, block=64), partial(linear, transposed=True)

NORM, QUANT, LINEAR = "rms_norm", "group_quant", "block_scaled_linear"
MEANT = "quantization"
CASES = [
    Case("448 / amax", reciprocal_of_amax, (X,), missed=MEANT, words=("reciprocal", "mul")),
    Case("scale in bf16", scale_in_16_bits, (X,), missed=MEANT),
    Case("another format's limit", other_limit, (X,), missed=MEANT, words=("240", "448")),
    Case("groups of 16", lambda x: quantize(x, 16), (X,), missed="group_quant", words=("groups of 16", "32, 64, 128")),
    Case("negative bound", lambda x: quantize(x, 128, -1.0), (X,), missed="group_quant", words=("-1.0", ">= 0")),
    Case("float32 activation", quantize, (X.float(),), missed=MEANT),
    Case("scale of another tensor", scale_of_another, (X, OTHER), missed=MEANT, words=("not one value",)),
    Case("the other float8", lambda x: codes(grouped(x)[0] / grouped(x)[1]).to(torch.float8_e5m2), (X,)),
    Case("float32 norm", llama_norm, (X.float(), W.float()), missed=NORM, words=("cast",)),
    Case("float64 norm", llama_norm, (X.double(), W.double()), missed=NORM, words=("float64",)),
    Case("weight before the cast, rounded after", lambda x, w: (w * normed(x)).to(x.dtype) * w, (X, W), fires=(NORM,)),
    Case("float32 weight of a rounded norm", lambda x, w: w * normed(x).to(x.dtype), (X, W.float()), missed=NORM),
    Case("float32 weight, rounded", lambda x, w: (w * normed(x).to(x.dtype)).to(x.dtype), (X, W.float()), missed=NORM),
    Case("mean over tokens", lambda x, w: w * normed(x, 0).to(x.dtype), (X, W), missed=NORM, words=("6", "256")),
    Case("mean over tokens, square", lambda x, w: w * normed(x, 0).to(x.dtype), (random(256, 256), W), missed=NORM),
    Case("mean over everything", lambda x, w: w * normed(x, (-2, -1)).to(x.dtype), (X, W), missed=NORM),
    # a norm without a weight, and a product
    Case("weight per token", lambda x, w: w * normed(x).to(x.dtype), (X, random(6, 1)), (NORM,)),
    Case("weight per element", lambda x, w: w * normed(x).to(x.dtype), (X, OTHER), (NORM,)),
    Case("variance in bf16", lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)), (X, W)),
    Case("rms used elsewhere", reciprocal_norm_used_twice, (X, W), missed=NORM, words=("rsqrt", "also used")),
    Case("eps rounded to bf16 is that eps", eps_rounded_to_16_bits, (X, W, torch.tensor(0.1237).double()), (NORM,)),
    Case("norm not rounded before quantization", lambda x, w: quantize(normed(x) * w), (X, W), missed=NORM),
    Case("norm used elsewhere", by_tensor_and_used, (X, W), ("tensor_quant", NORM), f"{NORM}_tensor_quant", ("also",)),
    Case("sum not rounded", sum_in_float32, (X, OTHER, W), missed=NORM, words=("add",)),
    Case("scaled residual", lambda x, r, w: llama_norm(torch.add(x, r, alpha=2), w), (X, OTHER, W), fires=(NORM,)),
    Case("a bias is no residual", lambda x, b, w: llama_norm(x + b, w), (X, W, W), fires=(NORM,)),
    Case("sigmoid rounded before the product", lambda g, u: g * torch.sigmoid(g) * u, (X, OTHER)),
    Case("gate per row", lambda g, u: F.silu(g) * u, (random(1, 256), OTHER)),
    Case("float32 gate", silu_mul, (X.float(), OTHER.float())),
    Case("scale rows of another weight", linear, (X, WEIGHT, TWICE), (QUANT,), LINEAR, ("(4, 2)", "(200, 256)")),
    Case("scale rows, with bias", linear, (X, WEIGHT, TWICE, BIAS), (QUANT,), LINEAR, ("(4, 2)",)),
    Case("blocks of 64 rows", linear_64, (X, WEIGHT, FINE), (QUANT,), LINEAR, ("weight_scale",)),
    Case("blocks of 64 rows, with bias", linear_64, (X, WEIGHT, FINE, BIAS), (QUANT,), LINEAR, ("weight_scale",)),
    Case("weight not transposed", linear_t, (X, SQUARE, SQUARE_SCALE), (QUANT,), LINEAR, ("permute",)),
    Case("operands in float32", lambda *a: linear(*a, dtype=torch.float32), (X, WEIGHT, SCALE), (QUANT,)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_step_outside(case):
    result = fuse_all(case.fn, *case.args)
    assert result.report.matches == dict.fromkeys(case.fires, 1), result.report
    if case.missed:
        reasons = misses(result, case.missed)
        assert reasons, f"{case.missed} says nothing of it\n{result.before.graph}"
        assert any(all(word in reason for word in case.words) for reason in reasons), reasons
        sites = [miss for miss in result.report.near_misses if miss.fusion == case.missed]
        assert all(miss.module == "(top)" for miss in sites)


@pytest.mark.parametrize("bias", [False, True])
def test_ragged_input_features_stay_right_and_are_reported(bias):
    """A padded activation is cut again after it is dequantized, which no kernel here reads."""
    result = fuse_all(
        Fp8BlockLinear.from_linear(nn.Linear(200, 256, bias, dtype=torch.bfloat16)).eval(),
        random(6, 200),
    )
    assert result.report.matches == {"group_quant": 1}
    (reason,) = misses(result, "block_scaled_linear")
    assert "[6, 200] of [6, 256]" in reason


SHIFTED = {
    "rounded sum, float32 product": (lambda x, w: (normed(x) * (1 + w)).to(x.dtype), "float32"),
    "rounded sum, rounded product": (lambda x, w: (1 + w) * normed(x).to(x.dtype), "rounded"),
    "two": (lambda x, w: (normed(x) * (2 + w.float())).to(x.dtype), "float32"),
    "Gemma": (lambda x, w: (normed(x) * (1 + w.float())).to(x.dtype), "float32_plus_one"),
}


@pytest.mark.parametrize("name", SHIFTED)
def test_only_one_plus_the_weight_in_float32_is_the_norm_of_gemma(name):
    """Any other sum is computed where it was, rounded as it was, and is the weight of another norm."""
    fn, mode = SHIFTED[name]
    result = fuse_all(fn, X, W)
    node = next(n for n in result.after.graph.nodes if "custom_ops.rms_norm" in str(n.target))
    assert node.kwargs.get("weight_mode", "rounded") == mode
    assert ("add" in str(node.args[1])) == (mode != "float32_plus_one")


def test_codes_and_scales_of_two_tensors_still_make_a_linear():
    """The linear's meaning does not ask where codes and scales come from."""

    def block(q, scale, weight, scale_inv):
        operand = (q.float().unflatten(-1, (-1, 128)) * scale.unsqueeze(-1)).flatten(-2).bfloat16()
        return F.linear(
            operand,
            (
                weight.float() * scale_inv.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)
            ).bfloat16(),
        )

    result = fuse_all(block, quantize(X)[0], quantize(OTHER)[1], WEIGHT, SCALE)
    assert result.report.matches == {"block_scaled_linear": 1}


CUT = {
    "gate cut after its activation": (lambda g, u: F.silu(g)[:3] * u, (X, random(3, 256)), ()),
    "norm cut before the weight": (lambda x, w: w * normed(x)[:3].to(x.dtype), (X, W), ()),
    "sum cut before the norm": (
        lambda x, r, w: (llama_norm((x + r)[:3], w), x + r),
        (X, OTHER, W),
        (NORM,),
    ),
    "sum cut, dead": (lambda x, r, w: llama_norm((x + r)[:3], w), (X, OTHER, W), (NORM,)),
    "norm cut before quantization": (
        lambda x, w: quantize(llama_norm(x, w)[:3]),
        (X, W),
        ("group_quant", NORM),
    ),
    "product cut before quantization": (
        lambda g, u: quantize((F.silu(g) * u)[:3]),
        (X, OTHER),
        ("group_quant", "silu_mul"),
    ),
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.filterwarnings("error:.*undone.*")
def test_values_that_lose_rows_inside_of_a_match(name):
    """Its outputs would have another number of rows than its inputs."""
    fn, args, fires = CUT[name]
    report = fuse_all(fn, *args).report
    assert report.matches == dict.fromkeys(fires, 1)
    # told by the matcher, before a rewrite finds that its result has another shape
    assert all("reads only a part of" in miss.reason for miss in report.near_misses)


def test_inputs_that_lose_rows_before_a_match():
    result = fuse_all(
        lambda g, u, x, w: (F.silu(g[:3]) * u[:3], *quantize(llama_norm(x[:3], w))), X, OTHER, X, W
    )
    assert result.report.matches == {"silu_mul": 1, "rms_norm_group_quant": 1}


@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
def test_halves_of_a_single_token(lead):
    """The first half is a prefix of the whole in memory, not the whole."""
    result = fuse_all(lambda p: silu_mul(p[..., :128], p[..., 128:]), random(*lead, 256))
    assert result.report.matches == {"silu_mul": 1}


def test_values_without_dimensions():
    assert fuse_all(silu_mul, random(), random()).report.matches in ({}, {"silu_mul": 1})


def test_an_input_that_is_made_of_an_output():
    """The sum would be needed before the op that makes it."""

    def block(x, residual):
        total = x + residual
        return llama_norm(total, total.mean(0)), total

    result = fuse_all(block, X, OTHER)
    assert "add_rms_norm" not in result.report.matches
    assert "one of its inputs is computed from one of its outputs" in {
        miss.reason for miss in result.report.near_misses
    }


@pytest.mark.parametrize("power", [1, 3, 4])
def test_another_power_than_the_square_is_no_norm(power):
    def norm(x, weight):
        h = x.float()
        h = h * torch.rsqrt(h.pow(power).mean(-1, keepdim=True) + EPS)
        return weight * h.to(x.dtype)

    assert fuse_all(norm, X.abs(), W).report.matches == {}


def test_a_norm_whose_result_lies_transposed_is_named():
    """As that of heads: the op's result is contiguous, and would be copied."""
    heads = random(2, 4, 3, 64).transpose(1, 2)
    result = fuse_all(lambda x, w: llama_norm(x, w), heads, random(64))
    assert result.report.matches == {}
    assert "transposed in memory" in misses(result, "rms_norm")[0]
    assert result.actual[0].stride() == result.expected[0].stride()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_a_product_with_one_that_casts_is_no_view(dtype):
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(2, dtype=dtype)
    product = graph.call_function(torch.ops.aten.mul.Tensor, (x, 1.0))
    product.meta["val"] = x.meta["val"] * 1.0
    assert (transparent(product) is None) == (dtype is torch.int8)


@pytest.mark.parametrize(("most", "limit"), [(7.0, 5.0), (5.0, 7.0), (7.0, 7.0)])
def test_a_number_that_a_pattern_has_twice_is_one_number(most, limit):
    """The limits of gpt-oss' gate and of its up are the same one."""

    def block(gate, up):
        gate, up = gate.clamp(max=most), up.clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))

    expected = {"clamped_swiglu": 1} if most == limit else {}
    assert fuse_all(block, X, OTHER).report.matches == expected


@pytest.mark.parametrize(
    ("take", "name"),
    [(lambda x: x.split(128, -1)[0], "getitem"), (lambda x: x[:, ::2] * 2, "mul")],
)
def test_an_operation_is_called_by_its_own_name(take, name):
    def norm(x, w):
        h = take(x)
        return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).bfloat16()

    result = fuse_all(norm, X.float(), W[:128])
    (reason,) = misses(result, "rms_norm")
    assert reason.startswith(f"{name} ("), reason
    assert "is torch.float32 already" in reason
    assert short(f"custom_ops.{name}.default") == short(f"aten.{name}.Tensor") == name
