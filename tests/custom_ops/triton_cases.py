"""Cases of Triton's part of a warm-up, for a machine without a GPU: run by test_jit_triton.py in a process of its own.

The other tests have Triton's interpreter, which compiles nothing. Here Triton compiles, for an H100, and has a driver
that launches nothing, so that a CPU tensor is as good as one on a GPU. A case is a function whose name begins with
`case_`; each has an empty cache, and what it raises is its answer.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget

from custom_ops import cuda_build, library, platform
from custom_ops.implementation import Implementation
from custom_ops.jit import building, compilers, deep_gemm_grouped, monitor, store, tracing
from custom_ops.jit import triton as jit_triton
from custom_ops.jit import triton_internals as internals
from custom_ops.jit.deep_gemm_tiles import Product
from custom_ops.jit.deep_gemm_tiles import kernel_of as deep_gemm_kernel
from custom_ops.jit.kernel import Kernel, NotCovered, Operand, Problem, Target
from custom_ops.jit.launches import launch_of
from custom_ops.jit.triton import COMPILER

H100 = Target("9.0a", 132, "580.0", "an H100")
quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)


# --- an H100 that is not there -------------------------------------------------------------------------------


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        loaded.append(name)
        return (1, 2, 32, 0, 1024)


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        launched.append(args)


class _Driver:
    """What Triton asks of a driver."""

    utils, launcher_cls = _Utils(), _Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


loaded: list[str] = []
launched: list[tuple[Any, ...]] = []
capturing = False


def pretend() -> None:
    triton.runtime.driver.set_active(_Driver())
    platform.cuda_capability = lambda device=None: (9, 0)
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_current_stream_capturing = lambda: capturing
    cuda_build.why_not = lambda: "there is no nvcc"
    jit_triton.platform.package_version = lambda name: "3"
    from custom_ops.jit import target

    target.here = lambda: H100
    from custom_ops.gemm import scaled_mm_triton, triton_kernels
    from custom_ops.quantization import triton_codes

    for module in (scaled_mm_triton, triton_kernels, triton_codes):
        module.native_fp8 = lambda x: True


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Within, ops on CPU tensors run on Triton."""
    before = platform.triton_interpret
    platform.triton_interpret = lambda: True
    library._usable.cache_clear()
    try:
        yield
    finally:
        platform.triton_interpret = before
        library._usable.cache_clear()


def forget(function: str) -> None:
    """As in a new process: nothing of a kernel is in memory."""
    internals._function(function).device_caches.clear()


# --- ops of the tests ----------------------------------------------------------------------------------------


@triton.jit
def _double(x_ptr, out_ptr, size, pairs, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, value * 2 + pairs, mask=at < size)


@triton.jit
def _second(pointers, numbers, out_ptr, ROWS: tl.constexpr):
    at = tl.arange(0, ROWS)
    tl.store(out_ptr + at, tl.load(pointers[1] + at) + numbers[0])


@triton.jit
def _copy(source, out_ptr, T: tl.constexpr, BLOCK: tl.constexpr):
    tile = source.load([tl.program_id(0) * BLOCK, 0]).to(T)
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + at, tile)


def doubled(x: torch.Tensor) -> torch.Tensor:
    """2 * x, and a pair for each 64 rows."""
    return torch.ops.custom_ops.doubled(x)


def _run_doubled(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    rows = x.shape[0]
    block = 64 if rows <= 100 else 128
    _double[(1,)](x, out, x.numel(), -(-rows // 64), BLOCK=block, num_warps=1)
    return out


def composed(x: torch.Tensor, weight: torch.Tensor, *, mode: str = "triton") -> torch.Tensor:
    """By mode: `doubled` inside, a grouped product of DeepGEMM, a descriptor, or something that reads data."""
    return torch.ops.custom_ops.composed(x, weight, mode=mode)


def _run_composed(x: torch.Tensor, weight: torch.Tensor, *, mode: str) -> torch.Tensor:
    rows = x.shape[0]
    if mode == "reads":
        return x * x.sum().item()
    if mode in ("grouped", "both"):
        padded = -(-rows // 128) * 128
        experts, n, k = weight.shape
        codes = torch.zeros((padded, k), dtype=torch.float8_e4m3fn, device=x.device)
        scale = torch.ones((k // 128, padded), device=x.device).t()
        out = torch.empty((padded, n), dtype=torch.bfloat16, device=x.device)
        which = torch.full((padded,), -1, dtype=torch.int32, device=x.device)
        weights = (weight, torch.empty((experts, n // 128, k // 128), device=x.device))
        deep_gemm_grouped.contiguous((codes, scale), weights, out, which)
        if mode == "grouped":
            return torch.empty_like(x)
    if mode == "tuples":
        _second[(1,)]((weight, x), (rows, 1, 0.5), x, ROWS=8, num_warps=1)
        x.record_stream(torch.Stream(stream_id=0, device_index=0, device_type=1))
        return x
    if mode == "descriptor":
        from triton.tools.tensor_descriptor import TensorDescriptor

        view = x[: max(rows, 1)]
        source = TensorDescriptor.from_tensor(view, [16, 16])
        _copy[(1,)](source, torch.empty(256, device=x.device), tl.float32, BLOCK=16, num_warps=1)
    return doubled(x)


def _same(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.empty_like(x)


def define_ops() -> None:
    nothing: Callable[..., None] = lambda *args, **kwargs: None  # noqa: E731
    for public, schema, run in (
        (doubled, "(Tensor x) -> Tensor", _run_doubled),
        (composed, '(Tensor x, Tensor weight, *, str mode="triton") -> Tensor', _run_composed),
    ):
        library.define(
            public,
            schema,
            check=_with(public, nothing),
            empty=_with(public, _same),
            reference=_with(public, _same),
            implementations=[Implementation("triton", lambda run=run: run)],
        )


def _with(public: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that has the parameters of the public one."""

    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    called.__signature__ = inspect.signature(public)  # type: ignore[attr-defined]
    return called


def deep_gemm_says(reason: str | None) -> None:
    """Why DeepGEMM's kernels cannot be compiled here."""
    compiler: Any = compilers.find("deep_gemm")
    compiler.why_not = lambda target: reason


# --- problems ------------------------------------------------------------------------------------------------


def operand(dtype: str, *shape: int | str, offset: int = 0) -> Operand:
    stride: list[int | str] = []
    step: int | str = 1
    for size in reversed(shape):
        stride.insert(0, step)
        known = isinstance(size, int) and isinstance(step, int)
        step = size * step if known else f"({size})*({step})"  # type: ignore[operator]
    return Operand(dtype, shape, tuple(stride), "", offset)


def problem(name: str, *arguments: Any, **keywords: Any) -> Problem:
    """A problem over s0 tokens, with the defaults of the op."""
    op, values = library.find(name), list(arguments)
    for declared in op.overload._schema.arguments[len(arguments) :]:
        default = op.signature.parameters[declared.name].default
        value = keywords.get(declared.name, None if default is inspect.Parameter.empty else default)
        values.append(str(value) if isinstance(value, torch.dtype) else value)
    return Problem(name, "triton", tuple(values), (2, None), True)


def scaled(n: int = 4096, k: int = 4096) -> Problem:
    scales = operand("float32", "s0", 1), operand("float32", n, 1)
    return problem(
        "scaled_mm", operand("int8", "s0", k), scales[0], operand("int8", n, k), scales[1]
    )


def quantized(k: int = 512) -> Problem:
    return problem("group_quant", operand("bfloat16", "s0", k), 128)


def traced(of: Problem, low: int, high: int, mode: str = "full") -> list[Kernel]:
    return list(COMPILER.kernels(of, low, high, mode, H100))


def build(kernels: list[Kernel]) -> building.Outcome:
    return building.compile_all(kernels, {"triton": COMPILER}, H100)


# --- which kernels -------------------------------------------------------------------------------------------


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


# --- compiling and loading -----------------------------------------------------------------------------------


def case_compiled_once_and_found_by_the_next_start() -> None:
    kernels = traced(quantized(), 1, 40)
    assert len(build(kernels).compiled) == len(kernels) == 1
    building.subprocess.Popen, popen = None, subprocess.Popen  # type: ignore[assignment,misc]
    try:
        again = [Kernel.from_json(json.loads(json.dumps(k.to_json()))) for k in kernels]
        assert build(again).found == kernels
    finally:
        building.subprocess.Popen = popen  # type: ignore[misc]
    cubin = next(jit_triton.folder().rglob("*.cubin"))
    whole = cubin.read_bytes()
    cubin.write_bytes(whole[:100])
    assert build(kernels).compiled == kernels
    assert cubin.read_bytes() == whole


def case_a_loaded_kernel_is_not_compiled_by_a_launch() -> None:
    kernels = traced(quantized(), 1, 40)
    build(kernels)
    forget(kernels[0]["function"])
    COMPILER.load(kernels)
    assert loaded == ["_groups"]
    assert "TRITON_CACHE_DIR" not in os.environ
    monitor.watch_triton()
    monitor.arm(strict=True)
    with on_cpu(), torch.no_grad():
        for rows in (1, 7, 16, 40):
            torch.ops.custom_ops.group_quant(torch.zeros(rows, 512, dtype=torch.bfloat16), 128)
    assert monitor.events() == ()
    assert loaded == ["_groups"]
    assert len(launched) == 4


def case_another_setting_of_triton_is_another_kernel() -> None:
    (kernel,) = traced(quantized(), 1, 4)
    identity = COMPILER.identity(kernel, H100)
    os.environ["DISABLE_LLVM_OPT"] = "1"
    try:
        assert COMPILER.identity(kernel, H100) != identity
    finally:
        del os.environ["DISABLE_LLVM_OPT"]
    assert COMPILER.identity(kernel, H100) == identity
    assert COMPILER.identity(kernel, Target("9.0a", 132, "581.0")) != identity
    assert COMPILER.identity(kernel, Target("8.0", 108, "580.0")) != identity


def case_a_graph_is_warmed_up_at_the_end_of_its_compilation() -> None:
    """Inside of a compilation, with its fake tensors about; the graph is for a CPU, the warm-up for an H100."""
    import fusion_passes

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(store.root() / "inductor")
    options = {"fusions": "rms_norm", "warmup": "full", "warmup_max_num_tokens": 40}
    norm = torch.nn.RMSNorm(256, dtype=torch.bfloat16)
    compiled = torch.compile(norm, backend="fusion_passes", dynamic=True, options=options)
    here: Any = COMPILER
    here.why_not = lambda target: None  # `on_cpu` looks like Triton's interpreter
    with on_cpu(), torch.no_grad():
        compiled(torch.randn(20, 256).bfloat16())
        plan = fusion_passes.warmup_plan(max_num_tokens=40)
    report = fusion_passes.report()
    assert report.matches == {"rms_norm": 1}
    assert [kernel["function"] for kernel in plan.kernels] == [NORM]
    assert plan.notes == ()
    assert plan.is_compiled(plan.kernels[0])
    assert any("warm-up (full): 1 kernels compiled" in note for note in report.notes), report.notes
    again = fusion_passes.WarmupPlan.from_json(plan.to_json())
    assert len(fusion_passes.warmup(plan=again).found) == 1


NORM = "custom_ops.normalization.triton_kernels:_rms_norm"


# --- the monitor ---------------------------------------------------------------------------------------------


def quantize(rows: int, width: int = 256) -> None:
    with on_cpu(), torch.no_grad():
        torch.ops.custom_ops.group_quant(torch.zeros(rows, width, dtype=torch.bfloat16), 128)


GROUPS = "custom_ops.quantization.triton_kernels:_groups"


def case_a_compilation_after_a_warm_up_is_an_event_and_a_load_is_none() -> None:
    monitor.watch_triton()
    forget(GROUPS)
    os.environ["TRITON_CACHE_DIR"] = str(store.root() / "other")
    quantize(3)
    assert monitor.events() == ()  # no warm-up yet
    forget(GROUPS)
    monitor.arm()
    quantize(3)  # from disk
    assert monitor.events() == ()
    with caught_log() as log:
        quantize(3, 2048)
        forget(GROUPS)
        quantize(3, 128)
    events = monitor.events()
    assert [(e.op, e.implementation, e.sizes) for e in events] == [
        ("group_quant", "triton", "x=[3, 2048]"),
        ("group_quant", "triton", "x=[3, 128]"),
    ]
    assert "_groups[4 warps, 3 stages](gate_ptr: *bf16 D, " in events[0].kernel
    assert "groups_per_row: i32 D, " in events[0].kernel
    assert "groups_per_row=1, " in events[1].kernel
    assert "BLOCK=8, " in events[1].kernel
    assert len(log) == 2
    assert "group_quant: triton compiles _groups[" in log[0]


def case_strict_raises_before_it_compiles() -> None:
    monitor.watch_triton()
    forget(GROUPS)
    os.environ["TRITON_CACHE_DIR"] = str(store.root() / "other")
    monitor.arm(strict=True)
    said = raised(monitor.JitError, lambda: quantize(5))
    assert "group_quant: triton would compile _groups[" in said
    assert "for x=[5, 256]" in said
    assert not list((store.root() / "other").rglob("*.cubin"))


def case_in_a_capture_it_is_a_clear_error_even_before_a_warm_up() -> None:
    global capturing
    monitor.watch_triton()
    forget(GROUPS)
    os.environ["TRITON_CACHE_DIR"] = str(store.root() / "other")
    capturing, available = True, torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    try:
        said = raised(monitor.JitError, lambda: quantize(5))
    finally:
        capturing = False
        torch.cuda.is_available = available
    assert f"group_quant: Triton has not compiled {GROUPS} for x=[5, 256] yet" in said
    assert "while a CUDA graph is captured" in said


def case_kernels_of_others_are_not_counted() -> None:
    monitor.watch_triton()
    monitor.arm(strict=True)
    os.environ["TRITON_CACHE_DIR"] = str(store.root() / "other")
    x = torch.zeros(64)
    _double[(1,)](x, x, 64, 3, BLOCK=64, num_warps=1)
    assert monitor.events() == ()
    monitor.WATCHED, before = (_double.fn.__module__,), monitor.WATCHED
    try:
        said = raised(monitor.JitError, lambda: _double[(1,)](x, x, 64, 1, BLOCK=64, num_warps=1))
    finally:
        monitor.WATCHED = before
    assert "unknown sizes" in said


# --- running them --------------------------------------------------------------------------------------------


def raised(kind: type[Exception], call: Callable[[], object]) -> str:
    """The message of what a call raises."""
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


@contextlib.contextmanager
def caught_log() -> Iterator[list[str]]:
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Handler()
    monitor.log.addHandler(handler)
    try:
        yield lines
    finally:
        monitor.log.removeHandler(handler)


CASES = [name for name in globals() if name.startswith("case_")]


def main() -> None:
    pretend()
    define_ops()
    answers = {}
    for name in CASES:
        monitor.disarm()
        loaded.clear()
        launched.clear()
        os.environ.pop("TRITON_CACHE_DIR", None)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["CUSTOM_OPS_CACHE_DIR"] = folder
            try:
                globals()[name]()
                answers[name] = ""
            except BaseException:
                answers[name] = traceback.format_exc()
    Path(sys.argv[1]).write_text(json.dumps(answers))
