"""The rewrite on graphs of one rank: where it fires, that no bit changes, and where it must not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

import custom_ops
import fusion_passes
from tests.custom_ops.helpers import assert_same_bits
from tests.fusion_passes.expert_parallel.graphs import NAME, fp8_experts, layer, rewrite, tokens
from tests.fusion_passes.helpers import quantize

ONE_GROUP = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_rewritten(result, ops: list[str]) -> None:
    assert result.report.matches == {NAME: 1}, result.report
    assert result.reasons == []
    assert result.calls() == ops
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert_same_bits(actual, expected)


@ONE_GROUP
@given(
    count=st.sampled_from([1, 3, 8, 33]),
    hidden=st.sampled_from([128, 256, 384]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    scale_mode=st.sampled_from(["divide", "reciprocal"]),
    min_amax=st.sampled_from([1e-10, 1e-4]),
    dynamic=st.booleans(),
)
def test_fused_moe_takes_codes(alone, count, hidden, dtype, scale_mode, min_amax, dynamic):
    given = fp8_experts(hidden=hidden)
    how = {"scale_mode": scale_mode, "min_amax": min_amax}
    args = tokens(count, hidden, dtype=dtype)
    result = rewrite(layer(alone, 4, given, **how), *args, dynamic=dynamic)
    assert_rewritten(result, ["group_quant", "ep_dispatch", "fused_moe", "ep_combine"])


def quantized(group: str, num_experts: int = 4, group_size: int = 128, reads: int = 1):
    """dispatch in 16 bits, then the received rows are quantized, in plain PyTorch and as often as it is asked for."""

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        rows, *_ = custom_ops.ep_dispatch(x, None, ids, weights, num_experts, group)
        return tuple(t for _ in range(reads) for t in quantize(rows, group_size))

    return run


@ONE_GROUP
@given(
    count=st.sampled_from([1, 5, 33]),
    group_size=st.sampled_from([64, 128]),
    reads=st.sampled_from([1, 2]),
)
def test_a_quantization_in_plain_pytorch(alone, count, group_size, reads):
    """Also where two readers quantize the rows alike."""
    result = rewrite(quantized(alone, 4, group_size, reads), *tokens(count))
    assert_rewritten(result, ["group_quant", "ep_dispatch"])


def test_the_op_itself(alone):
    def run(x: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        rows, *_ = custom_ops.ep_dispatch(x, None, ids, weights, 4, alone)
        return custom_ops.group_quant(rows, 128, scale_format="ue8m0", code_mode="reciprocal")

    assert_rewritten(rewrite(run, *tokens(9)), ["group_quant", "ep_dispatch"])


def test_room_for_the_worst_case(alone):
    """As many rows as there may be, whatever the routing: no size is left open."""
    result = rewrite(layer(alone, 4, fp8_experts(), max_tokens=16), *tokens(9))
    assert_rewritten(result, ["group_quant", "ep_dispatch", "fused_moe", "ep_combine"])
    dispatch = next(n for n in result.after.graph.nodes if "ep_dispatch" in str(n.target))
    assert dispatch.meta["val"][0].shape == (16, 256)


def test_two_layers(alone):
    first, second = layer(alone, 4, fp8_experts()), layer(alone, 4, fp8_experts(seed=1))

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return second(x + first(x, ids, weights), ids, weights)

    result = rewrite(run, *tokens(9))
    assert result.report.matches == {NAME: 2}
    assert_same_bits(result.actual[0], result.expected[0])


def test_the_number_of_received_rows_stays_the_same_symbol(alone):
    result = rewrite(layer(alone, 4, fp8_experts()), *tokens(9))
    before, after = (
        next(n for n in g.graph.nodes if "ep_dispatch" in str(n.target))
        for g in (result.before, result.after)
    )
    assert after.meta["unbacked_bindings"] == before.meta["unbacked_bindings"]
    rows = after.meta["val"][0].shape[0]
    assert free_unbacked_symbols(rows) == free_unbacked_symbols(before.meta["val"][0].shape[0])
    assert after.meta["val"][0].dtype == torch.float8_e4m3fn
    assert after.meta["val"][1].shape == (rows, 2)


@pytest.mark.parametrize("backend", ["inductor", "fusion_passes"])
def test_compiled(alone, backend):
    """Inductor compiles what the rewrite leaves, for several numbers of tokens."""
    fn = layer(alone, 4, fp8_experts())
    options = {"fusions": NAME, "allow_reference": True}
    given = fusion_passes.inductor_options(**options) if backend == "inductor" else options
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=backend, options=given, fullgraph=True)
    with torch.no_grad():
        for count in (5, 17, 33):
            args = tokens(count)
            assert_same_bits(compiled(*args), fn(*args))
    assert fusion_passes.report().matches[NAME] == 1


def test_without_a_kernel_it_takes_leave_to_use_the_reference(alone):
    result = rewrite(layer(alone, 4, fp8_experts()), *tokens(9), allow_reference=False)
    assert result.report.matches == {}
    assert result.reasons == [
        "group_quant has no fused implementation here; FUSION_PASSES_ALLOW_REFERENCE=1 would use the reference"
    ]


def near_misses(group: str) -> dict:
    given = fp8_experts()
    moe = layer(group, 4, given)
    narrow = fp8_experts(hidden=136)

    def also_read(x, ids, weights):
        rows, *_ = custom_ops.ep_dispatch(x, None, ids, weights, 4, group)
        return *quantize(rows), rows * 2

    def two_ways(x, ids, weights):
        rows, *_ = custom_ops.ep_dispatch(x, None, ids, weights, 4, group)
        return *quantize(rows), *quantize(rows, 64)

    def rescaled(x, ids, weights):
        rows, *_ = custom_ops.ep_dispatch(x, None, ids, weights, 4, group)
        return quantize(rows * 2)

    def per_tensor(x, ids, weights):
        rows, *_ = custom_ops.ep_dispatch(x, None, ids, weights, 4, group)
        scale = rows.float().abs().amax().clamp(min=1e-10) / 448
        return (rows.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    def sixteen_bits(x, ids, weights):
        rows, _, local, w, _, *handle = custom_ops.ep_dispatch(x, None, ids, weights, 4, group)
        y = custom_ops.fused_moe(
            rows, given["gate_up"].to(x.dtype), given["down"].to(x.dtype), w, local
        )
        return custom_ops.ep_combine(y, *handle, group)

    def already(x, ids, weights):
        return moe(x, ids, weights) if False else quantize(x)

    whole = quantized(group, group_size=256)
    reads = "reads the received rows as they are, so they have to be sent"
    return {
        "a cut group": (layer(group, 4, narrow), tokens(5, 136), "136 channels are no whole number"),
        "read in 16 bits too": (also_read, tokens(5), reads),
        "a scale for a row": (whole, tokens(5), "it quantizes 256 channels at a time; supported"),
        "two ways": (two_ways, tokens(5), "its readers quantize the received rows in different ways"),
        "something before it": (rescaled, tokens(5), None),
        "one scale for all": (per_tensor, tokens(5), None),
        "16-bit experts": (sixteen_bits, tokens(5), None),
        "no dispatch": (already, tokens(5), None),
    }  # fmt: skip


@pytest.mark.parametrize("case", near_misses(""))
def test_one_step_away(alone, case):
    """It does not fire, says why where it almost did, and leaves the graph as it was."""
    fn, args, reason = near_misses(alone)[case]
    result = rewrite(fn, *args)
    assert result.report.matches == {}
    assert [reason in said for said in result.reasons] == ([True] if reason else [])
    for expected, actual in zip(result.expected, result.actual, strict=True):
        assert_same_bits(actual, expected)
