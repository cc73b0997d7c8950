"""fused_moe: its reference against float64 and against stock transformers, its edges, its errors, its choice."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings

import custom_ops
from custom_ops import library
from custom_ops.moe import choice, parts, reference
from custom_ops.moe.problem import Problem
from tests.custom_ops.helpers import DEVICE, assert_refused, assert_same_bits
from tests.custom_ops.moe.problems import ROUTINGS, Shape, assert_as_good, error, exact, shapes

PLAIN = Shape(tokens=5, top_k=2, experts=4, hidden=128, intermediate=128)


@given(shapes())
def test_the_reference_against_float64(shape):
    problem = shape.problem("cpu")
    args, kwargs = problem.arguments()
    assert_as_good(reference.fused_moe(*args, **kwargs), problem)


@given(
    shapes(
        activation=["silu_mul", "clamped_swiglu", "clamped_silu_mul"],
        weights="16_bit",
        dtype=torch.bfloat16,
        elsewhere=False,
    )
)
def test_the_reference_is_what_transformers_computes(shape):
    """Bit for bit up to the order of the sums in a product, which PyTorch's own CPU kernels choose."""
    moe = pytest.importorskip("transformers.integrations.moe")
    if shape.tokens == 0 or shape.hidden % 8 or shape.intermediate % 8:
        return
    (x, gate_up, down, weights, ids), kwargs = shape.call("cpu")

    class Experts(torch.nn.Module):
        def _apply_gate(self, y):
            act = Problem.of(x, gate_up, down, weights, ids, **kwargs).activation
            gate, up = act.halves(y)
            if act.name == "silu_mul":
                return torch.nn.functional.silu(gate) * up
            gate, up = gate.clamp(max=act.limit), up.clamp(min=-act.limit, max=act.limit)
            if act.name == "clamped_silu_mul":
                return torch.nn.functional.silu(gate) * up
            return (up + 1) * (gate * torch.sigmoid(gate * 1.702))

    module = Experts()
    module.num_experts, module.has_gate, module.has_bias = shape.experts, True, shape.biased
    module.is_transposed, module.has_post_expert_norm = False, False
    module._is_expert_parallel = False
    module.gate_up_proj, module.down_proj = gate_up, down
    if shape.biased:
        module.gate_up_proj_bias, module.down_proj_bias = (
            kwargs["gate_up_bias"],
            kwargs["down_bias"],
        )
    stock = moe.grouped_mm_experts_forward(module, x, ids.long(), weights)
    ours = reference.fused_moe(x, gate_up, down, weights, ids, **kwargs)
    truth = exact(shape.problem("cpu"))
    assert error(ours, truth) <= 1.05 * error(stock, truth) + 1e-4
    assert float((ours != stock).float().mean()) <= 0.02


@settings(max_examples=6 if DEVICE == "cpu" else 60)
@given(shapes(tokens=[0, 1, 2, 7], hidden=[128], intermediate=[128, 136], experts=[1, 3, 8]))
def test_the_op_against_float64(shape):
    """Whatever implementation runs here."""
    problem = shape.problem(DEVICE)
    args, kwargs = problem.arguments()
    assert_as_good(custom_ops.fused_moe(*args, **kwargs), problem)


@pytest.mark.parametrize("weights", ["16_bit", "fp8_block", "int8_channel"])
@pytest.mark.parametrize("tokens", [0, 2])
def test_opcheck(weights, tokens):
    shape = dataclasses.replace(
        PLAIN,
        weights=weights,
        tokens=tokens,
        top_k=1,
        experts=2,
        biased=True,
        transposed=True,
        elsewhere=True,
    )
    args, kwargs = shape.call(DEVICE)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if weights != "fp8_block":  # torch compares inputs with allclose, which has no float8 kernel
        checks.append("test_schema")
    op = torch.ops.custom_ops.fused_moe.default
    torch.library.opcheck(op, args, kwargs, test_utils=checks)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("top_k", [1, 4])
def test_edges(routing, top_k):
    shape = dataclasses.replace(PLAIN, routing=routing, top_k=top_k, hidden=40, intermediate=24)
    problem = shape.problem("cpu")
    args, kwargs = problem.arguments()
    assert_as_good(reference.fused_moe(*args, **kwargs), problem)


def test_pairs_elsewhere_add_nothing_and_their_weights_are_not_read():
    (x, gate_up, down, weights, ids), kwargs = PLAIN.call("cpu")
    without = custom_ops.fused_moe(x, gate_up, down, weights[:, :1], ids[:, :1], **kwargs)
    for gone in (-1, 4, 1 << 30):
        ids[:, 1] = gone
        weights[:, 1] = float("nan")
        with_it = custom_ops.fused_moe(x, gate_up, down, weights, ids, **kwargs)
        assert_same_bits(with_it, without)
    ids[:] = -1
    assert not custom_ops.fused_moe(x, gate_up, down, weights, ids).any()


def test_no_experts_here():
    (x, gate_up, down, weights, ids), _ = PLAIN.call("cpu")
    nowhere = torch.full((4,), -1, dtype=torch.int32)
    out = custom_ops.fused_moe(x, gate_up[:0], down[:0], weights, ids, expert_map=nowhere)
    assert not out.any()


def test_nan_of_one_token_stays_with_it():
    (x, gate_up, down, weights, ids), _ = PLAIN.call("cpu")
    clean = custom_ops.fused_moe(x, gate_up, down, weights, ids)
    x[2] = float("nan")
    out = custom_ops.fused_moe(x, gate_up, down, weights, ids)
    assert bool(out[2].isnan().all())
    assert_same_bits(torch.cat([out[:2], out[3:]]), torch.cat([clean[:2], clean[3:]]))


def test_an_infinite_bound_of_weights_is_kept():
    """A weight of a float32 router is not rounded to 16 bits first."""
    (x, gate_up, down, _, ids), _ = PLAIN.call("cpu")
    weights = torch.full(ids.shape, 1 + 2**-12)
    finer = reference.fused_moe(x, gate_up, down, weights, ids)
    coarse = reference.fused_moe(x, gate_up, down, weights.bfloat16(), ids)
    assert not torch.equal(finer, coarse)


@pytest.mark.parametrize("most", ["1", "2", "3", "5", "100"])
def test_chunks_change_nothing(most, monkeypatch):
    args, kwargs = dataclasses.replace(PLAIN, tokens=7).call("cpu")
    pipeline = choice.pipelines()["grouped_mm"]
    whole = pipeline(Problem.of(*args, **kwargs))
    seen = []
    monkeypatch.setenv(parts.CHUNK_VARIABLE, most)
    watched = dataclasses.replace(
        pipeline,
        prepare=dataclasses.replace(
            pipeline.prepare,
            run=lambda p, e: seen.append(p.sizes.num_tokens) or pipeline.prepare.run(p, e),
        ),
    )
    assert error(watched(Problem.of(*args, **kwargs)), whole.double()) < 1e-2
    assert max(seen) <= int(most)
    assert sum(seen) == 7
    assert max(seen) - min(seen) <= 1


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_bad_chunk_size_is_refused(value, monkeypatch):
    monkeypatch.setenv(parts.CHUNK_VARIABLE, value)
    with pytest.raises(
        ValueError, match=f"CUSTOM_OPS_MOE_CHUNK_TOKENS is '{value}'; accepted: a whole"
    ):
        parts.chunk_tokens()


def bad_calls() -> dict:
    args, kwargs = dataclasses.replace(PLAIN, biased=True).call("cpu")
    x, gate_up, down, weights, ids = args
    fp8, scaled = dataclasses.replace(PLAIN, weights="fp8_block").call("cpu")
    return {
        "hidden dtype": ((x.float(), *args[1:]), kwargs, "hidden_states.dtype is torch.float32"),
        "hidden dims": (
            (x[None], *args[1:]),
            kwargs,
            r"hidden_states has 3 dimensions; accepted: 2",
        ),
        "gate_up dtype": ((x, gate_up.half(), *args[2:]), kwargs, "gate_up.dtype is torch.float16"),
        "gate_up dims": (
            (x, gate_up[0], *args[2:]),
            kwargs,
            "gate_up has 2 dimensions; accepted: 3",
        ),
        "gate_up width": (
            (x, gate_up[..., :64], *args[2:]),
            kwargs,
            r"gate_up.shape is \(4, 256, 64\); accepted: \(4, 256, 128\)",
        ),
        "odd rows": (
            (x, gate_up[:, :255], *args[2:]),
            {},
            r"gate_up.shape\[1\] is 255; accepted for 'silu_mul': an even number",
        ),
        "down dtype": (
            (x, gate_up, fp8[2], weights, ids),
            kwargs,
            "down.dtype is torch.float8_e4m3fn; accepted: torch.bfloat16",
        ),
        "down shape": (
            (x, gate_up, down.transpose(1, 2)[:, :, :64], weights, ids),
            kwargs,
            r"down.shape is \(4, 128, 64\); accepted: \(4, 128, 128\)",
        ),
        "ids dtype": ((*args[:4], ids.float()), kwargs, "topk_ids.dtype is torch.float32"),
        "ids shape": (
            (*args[:4], ids[:3]),
            kwargs,
            r"topk_ids.shape is \(3, 2\); accepted: \(5, 2\)",
        ),
        "no top_k": ((*args[:3], weights[:, :0], ids[:, :0]), {}, "accepted: top_k >= 1"),
        "no weights": ((*args[:3], None, ids), {}, "topk_weights is None; accepted: a tensor"),
        "no down": ((*args[:2], None, *args[3:]), {}, "down is None; accepted: a tensor"),
        "weights dtype": (
            (*args[:3], weights.half(), ids),
            {},
            "topk_weights.dtype is torch.float16",
        ),
        "weights shape": (
            (*args[:3], weights[:, :1], ids),
            {},
            r"topk_weights.shape is \(5, 1\); accepted: \(5, 2\)",
        ),
        "activation": (args, {"activation": "gelu"}, "activation is 'gelu'; accepted: silu_mul"),
        "interleaved": (
            args,
            {"activation": "relu2", "interleaved": True},
            "interleaved is True; accepted for 'relu2', which has no gate: False",
        ),
        "alpha": (args, {"alpha": float("inf")}, "alpha is inf; accepted: a finite number"),
        "limit": (args, {"limit": -1.0}, "limit is -1.0; accepted: a finite number >= 0"),
        "bias dtype": (
            args,
            {"down_bias": kwargs["down_bias"].float()},
            "down_bias.dtype is torch.float32; accepted: torch.bfloat16",
        ),
        "bias shape": (
            args,
            {"gate_up_bias": kwargs["down_bias"]},
            r"gate_up_bias.shape is \(4, 128\); accepted: \(4, 256\)",
        ),
        "scale missing": (
            fp8,
            {"gate_up_scale": scaled["gate_up_scale"]},
            "down_scale is None; accepted for weights of torch.float8_e4m3fn: a tensor",
        ),
        "scale too many": (
            args,
            scaled,
            "gate_up_scale is a tensor; accepted for weights of torch.bfloat16: None",
        ),
        "scale shape": (
            fp8,
            {**scaled, "down_scale": scaled["gate_up_scale"]},
            r"down_scale.shape is \(4, 2, 1\); accepted: \(4, 1, 1\)",
        ),
        "scale dtype": (
            fp8,
            {**scaled, "down_scale": scaled["down_scale"].half()},
            "down_scale.dtype is torch.float16; accepted: torch.float32",
        ),
        "map dtype": (
            args,
            {"expert_map": torch.arange(4)},
            "expert_map.dtype is torch.int64; accepted: torch.int32",
        ),
        "scale mode": (args, {"scale_mode": "exact"}, "scale_mode is 'exact'; accepted: divide"),
        "min_amax": (args, {"min_amax": -1.0}, "min_amax is -1.0; accepted: a finite number"),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_errors_name_the_argument_and_are_the_same_in_the_fake(case):
    args, kwargs, message = bad_calls()[case]
    assert_refused(custom_ops.fused_moe, args, kwargs, message)


def test_devices_must_agree():
    args, kwargs = PLAIN.call("cpu")
    with pytest.raises(ValueError, match="topk_ids is on meta; accepted: cpu, as hidden_states"):
        custom_ops.fused_moe(*args[:4], args[4].to("meta"), **kwargs)


def test_a_symbolic_number_of_tokens_adds_no_guard():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    args, kwargs = dataclasses.replace(PLAIN, tokens=6).call("cpu")
    environment = ShapeEnv()
    with FakeTensorMode(shape_env=environment) as mode:

        def fake(t: torch.Tensor) -> torch.Tensor:
            dynamic = [DimDynamic.DYNAMIC if size == 6 else DimDynamic.STATIC for size in t.shape]
            context = StatelessSymbolicContext(dynamic_sizes=dynamic)
            return mode.from_tensor(t, symbolic_context=context)

        fakes = [fake(t) for t in args]
        out = custom_ops.fused_moe(*fakes, **kwargs)
        library.ops()["fused_moe"].choose(*fakes, **kwargs)
    assert out.shape[0] is fakes[0].shape[0] or str(out.shape[0]) == str(fakes[0].shape[0])
    assert not environment.guards


def test_one_graph_for_every_number_of_tokens(monkeypatch):
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "triton")
    compiled = torch.compile(
        custom_ops.fused_moe, dynamic=True, backend="aot_eager", fullgraph=True
    )
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (3, 5, 9):
            args, kwargs = dataclasses.replace(PLAIN, tokens=tokens).call("cpu")
            with torch.no_grad():
                assert_same_bits(compiled(*args, **kwargs), custom_ops.fused_moe(*args, **kwargs))


# --- which parts run ---------------------------------------------------------------------------------------------


def row(pairs: int, **us: float) -> dict:
    return {"experts": 8, "hidden": 128, "intermediate": 64, "pairs": pairs, "us": us}


def test_the_nearest_row_of_a_table():
    far = {**row(4, grouped_mm=1.0), "experts": 512}
    rows = [row(4, triton=1.0), row(64, deep_gemm=2.0), far]
    assert choice.nearest(rows, (8, 128, 64), 1) == {"triton": 1.0}
    assert choice.nearest(rows, (8, 128, 80), 4) == {"triton": 1.0}
    assert choice.nearest(rows, (8, 128, 64), 5) == {"deep_gemm": 2.0}
    assert choice.nearest(rows, (8, 128, 64), 500) == {"deep_gemm": 2.0}
    assert choice.nearest(rows, (400, 128, 64), 5) == {"grouped_mm": 1.0}
    assert choice.nearest([], (8, 128, 64), 5) == {}


def test_a_table_decides(monkeypatch):
    problem = PLAIN.problem("cpu")
    families = ("triton", "grouped_mm")
    for times, wanted in (
        ({"grouped_mm": 1.0, "triton": 2.0}, "grouped_mm"),
        ({"grouped_mm": 3.0, "triton": 2.0, "deep_gemm": 1.0}, "triton"),
    ):
        monkeypatch.setattr(choice, "measured", lambda problem, times=times: times)
        pipeline, _ = choice.decide(problem, families)
        assert pipeline is not None
        assert pipeline.experts.name == wanted


def test_what_cannot_run_says_why():
    args, kwargs = dataclasses.replace(PLAIN, dtype=torch.float16).call("cpu")
    pipeline, rejected = choice.decide(Problem.of(*args, **kwargs), ("grouped_mm",))
    assert pipeline is None
    assert rejected["grouped_mm"].startswith("takes torch.bfloat16")
    with pytest.raises(ValueError, match=r"fused_moe: grouped_mm cannot run.*takes torch.bfloat16"):
        choice._direct("grouped_mm")(*args, **kwargs)


def test_explain_names_the_families():
    args, kwargs = PLAIN.call("cpu")
    explained = str(custom_ops.explain(custom_ops.fused_moe, *args, **kwargs))
    assert explained.startswith("custom_ops.fused_moe: ")
    assert set(choice.FAMILIES) == {"triton", "deep_gemm", "grouped_mm", "flashinfer", "cuda"}


def test_pairs_elsewhere_do_not_count_in_the_tables():
    problem = dataclasses.replace(PLAIN, elsewhere=True).problem("cpu")
    assert choice.expected_pairs(problem) == 5  # of 10, as half of the experts are here
    assert choice.expected_pairs(PLAIN.problem("cpu")) == 10


# --- on a GPU ----------------------------------------------------------------------------------------------------

QWEN = Shape(tokens=64, top_k=8, experts=128, hidden=2048, intermediate=768)


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["16_bit", "fp8_block"])
@pytest.mark.parametrize("tokens", [1, 16, 512])
def test_nothing_waits_for_the_device_and_a_graph_captures_it(weights, tokens):
    args, kwargs = dataclasses.replace(QWEN, weights=weights, tokens=tokens).call("cuda")
    expected = custom_ops.fused_moe(*args, **kwargs)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = custom_ops.fused_moe(*args, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(again, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = custom_ops.fused_moe(*args, **kwargs)
    args[4].copy_(args[4].flip(0))  # another routing through the same graph
    graph.replay()
    assert_same_bits(captured, custom_ops.fused_moe(*args, **kwargs))


@pytest.mark.gpu
def test_memory_is_bounded_by_the_chunk(monkeypatch):
    shape = dataclasses.replace(QWEN, tokens=65536, experts=16, top_k=4)
    args, kwargs = shape.call("cuda")
    problem = Problem.of(*args, **kwargs)
    peaks = {}
    for most in (4096, 16384):
        monkeypatch.setenv(parts.CHUNK_VARIABLE, str(most))
        pipeline, _ = choice.decide(problem, choice.FAMILIES)
        assert pipeline is not None
        custom_ops.fused_moe(*args, **kwargs)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = custom_ops.fused_moe(*args, **kwargs)
        torch.cuda.synchronize()
        peaks[most] = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
        sizes = dataclasses.replace(problem.sizes, num_tokens=most)
        assert peaks[most] <= pipeline.workspace(sizes, out.element_size()) + (1 << 20)
        del out
    assert peaks[4096] < 0.3 * peaks[16384]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "deep_gemm", "grouped_mm"])
def test_rows_beyond_32_bits(name, monkeypatch):
    """More than 2^31 elements between the first row of the pairs and the last, in one chunk."""
    monkeypatch.setenv(parts.CHUNK_VARIABLE, "65536")
    pipeline = choice.pipelines()[name]
    if reason := pipeline.experts.unavailable(torch.device("cuda")):
        pytest.skip(reason)
    shape = Shape(tokens=40000, top_k=8, experts=8, hidden=7168, intermediate=64)
    args, kwargs = shape.call("cuda")
    x, gate_up, down, weights, ids = args
    assert 40000 * 8 * 7168 > 2**31
    out = pipeline(Problem.of(*args, **kwargs))
    last = reference.fused_moe(x[-8:], gate_up, down, weights[-8:], ids[-8:], **kwargs)
    assert error(out[-8:], last.double()) < 1e-2
