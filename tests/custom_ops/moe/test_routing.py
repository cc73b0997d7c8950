"""Routing: each implementation against the reference, a judge in float64, torch.topk's ties, models' routers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import custom_ops
from custom_ops import library
from tests.custom_ops.helpers import DEVICE, implementation, steps
from tests.custom_ops.moe.draws import router_calls
from tests.custom_ops.schemes import KERNELS, kernel

ROUTERS = ("topk_softmax", "topk_sigmoid", "grouped_topk")


def assert_alike(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], rounded: bool) -> None:
    """The same experts, and weights within a few steps: in float32, or in the dtype that steps are rounded to."""
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    assert torch.equal(got[1], want[1])
    if rounded:
        torch.testing.assert_close(got[0], want[0], rtol=0.04, atol=1e-6, equal_nan=True)
        return
    most = 8 if got[0].dtype == torch.float32 else 1
    assert int(steps(*(t[0].cpu() for t in (got, want))).max() if got[0].numel() else 0) <= most


@pytest.mark.parametrize("which", KERNELS)
@given(data=st.data())
def test_implementations_equal_the_reference(which, data):
    op, args, options = data.draw(router_calls())
    want = library.ops()[op].reference(*args, **library.ops()[op].defaults | options)
    assert_alike(kernel(op, which)(*args, **options), want, options["rounded"])


@pytest.mark.parametrize("which", ["reference", *KERNELS])
@given(data=st.data())
def test_ids_are_distinct_and_in_range(which, data):
    """Whatever the logits are: NaN, Inf, all masked."""
    op, args, options = data.draw(router_calls())
    run = implementation(op, which) if which == "reference" else kernel(op, which)
    ids = run(*args, **options)[1]
    assert bool((ids >= 0).all() & (ids < args[0].shape[1]).all())
    assert all(len(set(row)) == args[1] for row in ids.tolist())


def judge(op: str, logits: list[float], options: dict, groups: int, kept: int):
    """Scores, what is chosen by, and weights before renormalization, of a token: plain Python, float64."""
    top = max(logits)
    total = sum(math.exp(v - top) for v in logits)
    scoring = {
        "none": lambda v: v,
        "softmax": lambda v: math.exp(v - top) / total,
        "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
        "sqrt_softplus": lambda v: math.sqrt(math.log1p(math.exp(v))),
    }
    by_logits = options.get("by_logits", not options.get("softmax_first", True))
    name = {"topk_softmax": "softmax", "topk_sigmoid": "sigmoid"}.get(op, options.get("scoring"))
    scores = [scoring[name](v) for v in logits]
    bias = options.get("correction_bias")
    bias = [0.0] * len(logits) if bias is None else bias.double().tolist()
    choice = [b + v for b, v in zip(bias, logits if by_logits else scores, strict=True)]
    if kept < groups:
        size = len(logits) // groups
        best = [sorted(choice[g * size : (g + 1) * size])[::-1] for g in range(groups)]
        score = [b[0] if options["group_score"] == "max" else b[0] + b[1] for b in best]
        stay = sorted(range(groups), key=lambda g: (-score[g], g))[:kept]
        outside = [e for e in range(len(logits)) if e // size not in stay]
        for e in outside:
            choice[e] = -math.inf if options["masked"] == "-inf" else 0.0
            if options["masked"] == "zero_weight":
                scores[e] = 0.0
    return scores, choice


@pytest.mark.parametrize("which", ["reference", *KERNELS])
@given(data=st.data())
def test_float64_agrees(which, data):
    op, args, options = data.draw(router_calls(special=False, rounded=False))
    run = implementation(op, which) if which == "reference" else kernel(op, which)
    weights, ids = run(*args, **options)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[weights.dtype]
    groups, kept = args[2:] or (1, 1)
    for row, got_ids, got in zip(
        args[0].tolist(), ids.tolist(), weights.double().tolist(), strict=True
    ):
        scores, choice = judge(op, row, options, groups, kept)
        values = [choice[e] for e in got_ids]
        best = sorted(choice, reverse=True)[: args[1]]
        assert values == pytest.approx(best, rel=1e-6, abs=1e-6)
        want = [scores[e] for e in got_ids]
        if options.get("softmax_first") is False:
            want = [math.exp(row[e] - max(row)) for e in got_ids]
            want = [w / sum(want) for w in want]
        if options["renormalize"]:
            total = max(sum(want), options["renormalize_min"]) + options["renormalize_eps"]
            want = [w / total if total else math.nan for w in want]
        want = [w * options["scale"] for w in want]
        assert got == pytest.approx(want, rel=2 * tolerance, abs=1e-7, nan_ok=True)


@pytest.mark.parametrize("which", ["reference", *KERNELS])
def test_ties_go_to_the_lower_index_in_order(which):
    run = (implementation if which == "reference" else kernel)("topk_softmax", which)
    x = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [-0.0, 0.0, -0.0, 0.0, -1.0]], device=DEVICE)
    for softmax_first in (True, False):
        ids = run(x, 4, softmax_first=softmax_first)[1]
        assert ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    nan = torch.tensor([[1.0, math.nan, 3.0, math.nan, 4.0]], device=DEVICE)
    assert run(nan, 3, softmax_first=False)[1].tolist() == [[1, 3, 4]]
    assert run(nan, 3)[1].tolist() == [[0, 1, 2]]  # where one is NaN, so is the whole softmax


@pytest.mark.parametrize("which", ["reference", *KERNELS])
def test_masked_experts(which):
    """Two groups of two, the first stays, and three experts are asked for."""
    run = (implementation if which == "reference" else kernel)("grouped_topk", which)
    x = torch.tensor([[3.0, -3.0, 1.0, 2.0]], device=DEVICE)
    bias = torch.tensor([0.0, -0.5, 0.0, -0.5], device=DEVICE)
    expected = {"-inf": [0, 1, 2], "zero": [0, 2, 3], "zero_weight": [0, 2, 3]}
    for masked, ids in expected.items():
        options = {"correction_bias": bias, "group_score": "max", "masked": masked}
        weights, got = run(x, 3, 2, 1, **options)
        assert got.tolist() == [ids]
        scores = x.sigmoid()[0, ids]
        if masked == "zero_weight":
            scores[1:] = 0.0
        torch.testing.assert_close(weights[0], scores)


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["reference", "triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_selection_is_that_of_torch_topk_on_a_gpu(which, dtype):
    run = (implementation if which == "reference" else kernel)("topk_softmax", which)
    torch.manual_seed(0)
    for experts, top_k in ((8, 2), (60, 4), (128, 8), (256, 8), (512, 10), (300, 40)):
        x = torch.randint(-6, 7, (200, experts), device="cuda").to(dtype) / 4
        x[50:60, 3::7] = math.nan
        x[60:70, ::2] = -math.inf
        ids = run(x, top_k, softmax_first=False)[1]
        values, want = torch.topk(x, top_k, dim=-1)
        assert torch.equal(ids.sort(-1).values, want.sort(-1).values)
        torch.testing.assert_close(x.gather(1, ids), values, rtol=0, atol=0, equal_nan=True)
        probabilities = x.float().softmax(-1)
        ids = run(x, top_k)[1]
        want = torch.topk(probabilities, top_k, dim=-1)[1]
        rows = ~probabilities.isnan().any(-1)
        same = (ids.sort(-1).values == want.sort(-1).values).all(-1)[rows]
        assert same.all() if which != "triton" else same.float().mean() > 0.99


@pytest.mark.gpu
def test_the_bits_are_those_of_eager_on_a_gpu():
    """Softmax, sum and division of the CUDA kernel are taken in the order of eager's kernels."""
    torch.manual_seed(0)
    for experts, top_k in ((8, 2), (32, 4), (60, 6), (128, 8), (256, 8), (512, 10)):
        for dtype in (torch.float32, torch.bfloat16):
            x = (3 * torch.randn(3000, experts, device="cuda")).to(dtype)
            weights, ids = kernel("topk_softmax", "cuda")(x, top_k)
            probabilities = x.softmax(-1, dtype=torch.float32)
            assert torch.equal(weights, probabilities.gather(1, ids))
            got = kernel("topk_softmax", "cuda")(x, top_k, renormalize=True)[0]
            want = torch.topk(probabilities, top_k, dim=-1)[0]
            want /= want.sum(dim=-1, keepdim=True)
            assert torch.equal(got, want)
            got, ids = kernel("topk_softmax", "cuda")(x, top_k, softmax_first=False, dtype=dtype)
            values = x.gather(1, ids)
            assert torch.equal(got, values.softmax(-1, dtype=dtype))
            got, ids = kernel("topk_sigmoid", "cuda")(x, top_k)
            assert torch.equal(got, x.float().sigmoid().gather(1, ids))


@pytest.mark.gpu
def test_many_tokens_and_every_number_of_experts():
    torch.manual_seed(0)
    for experts in (1, 31, 32, 33, 65, 127, 129, 257, 384, 511, 512):
        x = torch.randn(2049, experts, device="cuda")
        top_k = min(8, experts)
        got = kernel("topk_sigmoid", "cuda")(x, top_k, renormalize=True)
        want = implementation("topk_sigmoid", "reference")(x, top_k, renormalize=True)
        assert_alike(got, want, rounded=False)
    strided = torch.randn(512, 5, device="cuda").T
    got = kernel("topk_sigmoid", "cuda")(strided, 8)
    assert_alike(got, implementation("topk_sigmoid", "reference")(strided, 8), rounded=False)


def config(**more) -> SimpleNamespace:
    """What routers read of a config, whatever they call it."""
    common = {
        "hidden_size": 32,
        "num_experts": 16,
        "num_local_experts": 16,
        "n_routed_experts": 16,
        "moe_num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_k": 4,
        "norm_topk_prob": True,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "router_jitter_noise": 0.0,
        "topk_method": "group_limited_greedy",
        "moe_layer_start_index": 0,
        "use_bias": False,
        "use_expert_bias": True,
        "moe_norm_min": 1e-12,
        "rms_norm_eps": 1e-6,
    }
    return SimpleNamespace(**common | more)


def _softmax(x, module, dtype):
    return custom_ops.topk_softmax(x, 4, renormalize=True, dtype=dtype)


def _gpt_oss(x, module, dtype):
    return custom_ops.topk_softmax(x, 4, softmax_first=False, dtype=dtype)


def _grouped(x, module, dtype, **options):
    bias = getattr(module, "e_score_correction_bias", None)
    options = {"renormalize": True, "renormalize_eps": 1e-20, "scale": 2.5} | options
    return custom_ops.grouped_topk(x, 4, 4, 2, correction_bias=bias, dtype=dtype, **options)


def _limited(x, module, dtype):
    options = {"scoring": "softmax", "group_score": "max", "masked": "zero_weight"}
    return _grouped(x, module, dtype, renormalize=False, **options)


def _mistral(x, module, dtype):
    return _grouped(x, module, dtype, scoring="softmax", masked="zero", rounded=True)


MODELS = {
    "mixtral.MixtralTopKRouter": (_softmax, torch.float32),
    "qwen3_moe.Qwen3MoeTopKRouter": (_softmax, None),
    "olmoe.OlmoeTopKRouter": (_softmax, None),
    "gpt_oss.GptOssTopKRouter": (_gpt_oss, None),
    "deepseek_v3.DeepseekV3TopkRouter": (_grouped, torch.float32),
    "glm4_moe.Glm4MoeTopkRouter": (_grouped, torch.float32),
    "deepseek_v2.DeepseekV2TopkRouter": (_limited, torch.float32),
    "mistral4.Mistral4TopkRouter": (_mistral, None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_routers_of_models(name, dtype):
    """The router of a stock model, and the call that it is."""
    package, router = name.split(".")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    module = pytest.importorskip(
        f"{transformers.__name__}.models.{package}.modeling_{package}",
        reason=f"needs {package} in transformers",
    )
    if not hasattr(module, router):
        pytest.skip(f"needs a transformers whose {package} has a {router}")
    call, out = MODELS[name]
    torch.manual_seed(0)
    gate = getattr(module, router)(config())
    for p in gate.parameters():
        p.data.copy_(torch.randn(p.shape) * 0.3)
    for key, b in gate.named_buffers():
        assert key == "e_score_correction_bias"
        b.copy_(torch.randn(b.shape) * 0.1)
    gate = gate.to(dtype).to(DEVICE)
    x = torch.randn(64, 32, dtype=dtype, device=DEVICE)
    with torch.no_grad():
        logits, weights, ids = gate(x)
        got, got_ids = call(logits, gate, out or dtype)
    assert got.dtype == weights.dtype
    assert torch.equal(got_ids.sort(-1).values, ids.sort(-1).values)
    order, got_order = ids.sort(-1).indices, got_ids.sort(-1).indices
    most = 2**-7 if got.dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(
        got.gather(1, got_order), weights.gather(1, order), rtol=most, atol=most * 1e-2
    )


def bad_calls() -> dict:
    x, b = torch.randn(3, 8), torch.zeros(8)
    softmax, grouped = custom_ops.topk_softmax, custom_ops.grouped_topk
    return {
        "dtype": (softmax, (x.double(), 2), {}, "logits.dtype is torch.float64; accepted: torch.f"),
        "dims": (softmax, (x[0], 2), {}, "logits has 1 dimensions; accepted: 2"),
        "top_k": (softmax, (x, 9), {}, "top_k is 9; accepted: 1 to 8, as experts"),
        "no top_k": (custom_ops.topk_sigmoid, (x, 0), {}, "top_k is 0; accepted: 1 or more"),
        "bias": (softmax, (x, 2), {"correction_bias": b[:4]}, r"correction_bias.shape is \(4,\)"),
        "bias dtype": (softmax, (x, 2), {"correction_bias": b.int()}, "dtype is torch.int32"),
        "scale": (softmax, (x, 2), {"scale": math.inf}, "scale is inf; accepted: a finite number"),
        "eps": (softmax, (x, 2), {"renormalize_eps": -1.0}, "renormalize_eps is -1.0; accepted"),
        "out": (softmax, (x, 2), {"dtype": torch.int32}, "dtype is torch.int32; accepted"),
        "groups": (grouped, (x, 2, 3, 1), {}, "num_groups is 3; accepted: a divisor of the 8"),
        "kept": (grouped, (x, 2, 4, 5), {}, "topk_groups is 5; accepted: 1 to 4, as num_groups"),
        "of one": (grouped, (x, 2, 8, 1), {}, "num_groups is 8; accepted with group_score 'top2'"),
        "scoring": (grouped, (x, 2, 4, 1), {"scoring": "relu"}, "scoring is 'relu'; accepted: sig"),
        "masked": (grouped, (x, 2, 4, 1), {"masked": "no"}, "masked is 'no'; accepted: -inf, zero"),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_errors_name_the_argument(case):
    op, args, options, message = bad_calls()[case]
    with pytest.raises(ValueError, match=f"{op.__name__}: .*{message}"):
        op(*args, **options)


def test_the_cuda_kernel_says_what_it_does_not_take():
    for op, args, reason in (
        ("topk_softmax", (torch.zeros(2, 513), 2), "takes at most 512 experts, here are 513"),
        ("grouped_topk", (torch.zeros(2, 128), 2, 64, 2), "takes at most 32 groups, here are 64"),
    ):
        cuda = next(i for i in library.ops()[op].implementations if i.name == "cuda")
        assert cuda.unsupported(*args, **library.ops()[op].defaults) == reason
