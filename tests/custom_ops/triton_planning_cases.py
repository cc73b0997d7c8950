"""Cases of which kernels a problem reaches: see triton_cases.py."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_ops.jit import compilers, store, tracing
from custom_ops.jit import triton as jit_triton
from custom_ops.jit import triton_internals as internals
from custom_ops.jit.deep_gemm_tiles import Product
from custom_ops.jit.deep_gemm_tiles import kernel_of as deep_gemm_kernel
from custom_ops.jit.kernel import NotCovered, Operand, Problem
from custom_ops.jit.launches import launch_of
from custom_ops.jit.triton import COMPILER
from tests.custom_ops.triton_machine import (
    build,
    deep_gemm_says,
    on_cpu,
    operand,
    problem,
    quantized,
    raised,
    scaled,
    traced,
)

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def case_a_launch_is_specialized_on_one_sixteen_and_tiles() -> None:
    kernels = traced(problem("doubled", operand("bfloat16", "s0", 8)), 1, 300)
    found = {(k["size"], k["pairs"], k["BLOCK"]): dict(k.example)["rows"] for k in kernels}
    assert found == {
        ("i32", "=1", "=64"): 1,
        ("i32 D", "=1", "=64"): 2,
        ("i32", "i32", "=64"): 65,
        ("i32 D", "i32", "=64"): 66,
        ("i32", "i32", "=128"): 101,
        ("i32 D", "i32", "=128"): 102,
    }, found


def case_full_is_all_that_single_counts_reach_and_relax_a_part() -> None:
    each = {kernel for rows in range(1, 150) for kernel in traced(scaled(512, 256), rows, rows)}
    assert set(traced(scaled(512, 256), 1, 149)) == each
    assert len({kernel.label for kernel in each}) == len(each)
    assert all(len(kernel.label) < 80 for kernel in each)
    relaxed = set(traced(scaled(512, 256), 1, 149, "relax"))
    assert relaxed <= each
    assert len(each) > 3


def case_a_shadow_is_specialized_as_a_tensor_is() -> None:
    @quick
    @given(
        rows=st.integers(1, 200),
        groups=st.integers(1, 5),
        left=st.sampled_from([0, 1, 8, 16]),
        right=st.sampled_from([0, 8, 24]),
        name=st.sampled_from(
            ["group_quant", "token_quant", "tensor_quant", "silu_mul", "rms_norm"]
        ),
    )
    def same(rows: int, groups: int, left: int, right: int, name: str) -> None:
        width = 128 * groups
        wide = torch.zeros(rows, left + width + right, dtype=torch.bfloat16)
        x = wide[:, left : left + width]
        view = tracing._operand(x)
        extra, real = {
            "group_quant": ((128,), (128,)),
            "silu_mul": ((view,), (x,)),
            "rms_norm": ((operand("bfloat16", width), 1e-6), (torch.ones(width).bfloat16(), 1e-6)),
        }.get(name, ((), ()))
        kernels = traced(problem(name, view, *extra), rows, rows)
        launches: list[Any] = []
        specializer = internals.Specializer("9.0a")
        with (
            on_cpu(),
            torch.no_grad(),
            internals.recording(lambda *launch: launches.append(specializer(*launch))),
        ):
            getattr(torch.ops.custom_ops, name)(x, *real)
        assert [launch_of(kernel) for kernel in kernels] == list(dict.fromkeys(launches))
        assert launches

    same()


def case_ops_inside_are_followed_and_named_after_the_outer_one() -> None:
    x, weight = operand("bfloat16", "s0", 8), operand("bfloat16", 8, 8)
    kernels = traced(problem("composed", x, weight), 16, 16)
    assert [k.op for k in kernels] == ["composed"]
    assert kernels == traced(problem("doubled", x), 16, 16)


def case_grouped_products_inside_are_planned() -> None:
    deep_gemm_says(None)
    weight = operand("float8_e4m3fn", 8, 256, 512)
    found = problem("composed", operand("bfloat16", "s0", 16), weight)
    found = Problem(found.op, "triton", (*found.arguments[:2], "grouped"), (2, None), True)
    kernels = traced(found, 1, 400)
    product = Product(256, 512, "contiguous", 8)
    wanted = {deep_gemm_kernel(rows, product, 132) for rows in (128, 256, 384, 512)}
    assert set(kernels) == wanted
    assert {kernel.op for kernel in kernels} == {"composed"}


def case_another_implementation_than_the_graph_chose_is_found() -> None:
    """A graph knows less than a call: the implementation is chosen again for each count."""
    found = Problem("doubled", "cublaslt", (operand("bfloat16", "s0", 8),), (2, None), True)
    assert compilers.enumerator("doubled", "cublaslt") is COMPILER
    assert traced(found, 16, 16) == traced(problem("doubled", operand("bfloat16", "s0", 8)), 16, 16)


def case_descriptors_and_types_are_written_down() -> None:
    x, weight = operand("bfloat16", "s0", 16), operand("bfloat16", 8, 8)
    found = problem("composed", x, weight)
    found = Problem(found.op, "triton", (*found.arguments[:2], "descriptor"), (2, None), True)
    copy, _ = traced(found, 32, 32)
    assert copy["source"].startswith("tensordesc<bf16[16")
    assert json.loads(copy["T"][1:]) == {"dtype": "fp32"}
    assert build([copy]).compiled == [copy]


def case_warp_specialized_experts_are_compiled_ahead() -> None:
    """Gluon's kernels, whose descriptors have a layout: those that the table takes for many tokens."""
    weights = [operand("float8_e4m3fn", 128, *size) for size in ((1536, 2048), (2048, 768))]
    scales = [operand("float32", 128, *size) for size in ((12, 16), (16, 6))]
    routed = operand("float32", "s0", 8), operand("int64", "s0", 8)
    experts = problem(
        "fused_moe",
        operand("bfloat16", "s0", 2048),
        *weights,
        *routed,
        gate_up_scale=scales[0],
        down_scale=scales[1],
    )
    kernels = traced(experts, 4096, 4096)
    specialized = [k for k in kernels if "NVMMASharedLayout" in str(k.spec)]
    assert specialized, [k["function"] for k in kernels if k.implementation == "triton"]
    assert all("gluon" in k["function"] for k in specialized)
    assert set(build(specialized).compiled) == set(specialized)


def case_tuples_are_written_down() -> None:
    x, weight = operand("bfloat16", "s0", 16), operand("float32", 8, 8)
    found = Problem("composed", "triton", (x, weight, "tuples"), (2, None), True)
    kernels = traced(found, 1, 32)
    assert [json.loads(kernel["numbers"]) for kernel in kernels] == [
        ["=1", "=1", "fp32"],
        ["i32", "=1", "fp32"],
        ["i32 D", "=1", "fp32"],
    ]
    assert json.loads(kernels[0]["pointers"]) == ["*fp32 D", "*bf16 D"]
    assert build(kernels[:1]).compiled == kernels[:1]


def case_what_cannot_be_named_is_noted_beside_what_can() -> None:
    deep_gemm_says("no nvcc")
    weight = operand("float8_e4m3fn", 8, 256, 512)
    found = problem("composed", operand("bfloat16", "s0", 16), weight)
    found = Problem(found.op, "triton", (*found.arguments[:2], "both"), (2, None), True)
    jit_triton._SLOW_SECONDS, before = 0.0, jit_triton._SLOW_SECONDS
    try:
        for _ in range(2):  # traced, and remembered
            with pytest.raises(NotCovered, match="no nvcc") as caught:
                traced(found, 1, 40)
            assert {k["function"].partition(":")[2] for k in caught.value.kernels} == {"_double"}
    finally:
        jit_triton._SLOW_SECONDS = before


def case_what_reads_data_cannot_be_traced() -> None:
    found = problem("composed", operand("bfloat16", "s0", 16), operand("bfloat16", 8, 8))
    found = Problem(found.op, "triton", (*found.arguments[:2], "reads"), (2, None), True)
    said = raised(ValueError, lambda: traced(found, 1, 4))
    assert "calling it with 1 rows to see what it compiles raised" in said


def case_sizes_that_are_no_tokens_are_said() -> None:
    other = problem("silu_mul", operand("bfloat16", "s0", 64), operand("bfloat16", "s1", 64))
    assert "s1 is no size of the tokens" in raised(ValueError, lambda: traced(other, 1, 4))


def case_the_stride_of_a_batch_of_one_does_not_matter() -> None:
    x = Operand("bfloat16", (1, "s0", 64), ("s60", 64, 1))  # the first rows of a longer buffer
    found = problem("silu_mul", x, x)
    plain = Operand("bfloat16", (1, "s0", 64), ("64*s0", 64, 1))
    assert traced(found, 1, 40) == traced(problem("silu_mul", plain, plain), 1, 40)


def case_a_batch_and_a_length_are_multiplied() -> None:
    three = problem("doubled", operand("bfloat16", "s0", "s1", 8))
    rows = [rows for rows, _ in tracing.counts_of(three, 3, 5)]
    assert set(rows) == {3, 4, 5}
    fixed = problem("doubled", operand("bfloat16", 4, "s1", 8))
    assert list(tracing.counts_of(fixed, 3, 12)) == [
        (4, {"s1": 1}),
        (8, {"s1": 2}),
        (12, {"s1": 3}),
    ]


def case_what_was_traced_is_remembered() -> None:
    jit_triton._SLOW_SECONDS, before = 0.0, jit_triton._SLOW_SECONDS
    try:
        first = traced(scaled(), 1, 40)
        assert len(list((store.root() / "traced").iterdir())) == 1
        COMPILER._trace, trace = None, COMPILER._trace  # type: ignore[assignment,method-assign]
        try:
            assert traced(scaled(), 1, 40) == first
            raised(TypeError, lambda: traced(scaled(), 1, 41))
        finally:
            COMPILER._trace = trace  # type: ignore[method-assign]
    finally:
        jit_triton._SLOW_SECONDS = before


def case_tracing_leaves_launches_as_they_were() -> None:
    run = triton.runtime.jit.JITFunction.run
    traced(quantized(), 1, 3)
    assert triton.runtime.jit.JITFunction.run is run
    assert tracing.current() is None
    assert torch.empty(1).device.type == "cpu"
