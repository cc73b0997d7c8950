"""Cases of compiling ahead, loading, and what the monitor sees: see triton_cases.py."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import torch

from custom_ops import monitor
from custom_ops.jit import building, store
from custom_ops.jit import triton as jit_triton
from custom_ops.jit.kernel import Kernel, Target
from custom_ops.jit.triton import COMPILER
from tests.custom_ops import triton_machine
from tests.custom_ops.triton_machine import (
    H100,
    _double,
    build,
    forget,
    launched,
    loaded,
    on_cpu,
    quantized,
    raised,
    traced,
)


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
    jit_triton.watch_triton()
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


def quantize(rows: int, width: int = 256) -> None:
    with on_cpu(), torch.no_grad():
        torch.ops.custom_ops.group_quant(torch.zeros(rows, width, dtype=torch.bfloat16), 128)


GROUPS = "custom_ops.quantization.triton_kernels:_groups"


def case_a_compilation_after_a_warm_up_is_an_event_and_a_load_is_none() -> None:
    jit_triton.watch_triton()
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
    jit_triton.watch_triton()
    forget(GROUPS)
    os.environ["TRITON_CACHE_DIR"] = str(store.root() / "other")
    monitor.arm(strict=True)
    said = raised(monitor.JitError, lambda: quantize(5))
    assert "group_quant: triton would compile _groups[" in said
    assert "for x=[5, 256]" in said
    assert not list((store.root() / "other").rglob("*.cubin"))


def case_in_a_capture_it_is_a_clear_error_even_before_a_warm_up() -> None:
    jit_triton.watch_triton()
    forget(GROUPS)
    os.environ["TRITON_CACHE_DIR"] = str(store.root() / "other")
    triton_machine.capturing, available = True, torch.cuda.is_available
    torch.cuda.is_available = lambda: True
    try:
        said = raised(monitor.JitError, lambda: quantize(5))
    finally:
        triton_machine.capturing = False
        torch.cuda.is_available = available
    assert f"group_quant: Triton has not compiled {GROUPS} for x=[5, 256] yet" in said
    assert "while a CUDA graph is captured" in said


def case_kernels_of_others_are_not_counted() -> None:
    jit_triton.watch_triton()
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
