"""Triton's part of a warm-up: without a GPU by `triton_cases`, with one on the kernels themselves."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from custom_ops import platform

# Read as text: this process has Triton's interpreter, and cannot import them.
SOURCES = [
    Path(__file__).with_name(f"triton_{name}_cases.py").read_text()
    for name in ("planning", "running")
]
CASES = re.findall(r"^def (case_\w+)", "\n".join(SOURCES), re.MULTILINE)

# Imported, not run as a module: compiling processes find the kernels of the cases under their names.
_RUN = "from tests.custom_ops import triton_cases; triton_cases.main()"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each case raised, "" for nothing: all of them in one process, in which Triton does not interpret."""
    out = tmp_path_factory.mktemp("cases") / "answers.json"
    root = str(Path(__file__).parents[2])
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "CUSTOM_OPS_"))}
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(out)],
        env=kept | {"PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)])},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.skipif(not platform.has_triton(), reason="needs triton (pip install triton)")
@pytest.mark.parametrize("case", CASES)
def test_without_a_gpu(answers: dict[str, str], case: str) -> None:
    assert answers[case] == ""


_SWEEP = """
import json, sys
import torch
import custom_ops
from triton.runtime.jit import JITFunction
from custom_ops import library, monitor
from custom_ops.jit import building, compilers, target, tracing
from custom_ops.jit import triton_internals as internals
from custom_ops.jit.kernel import Kernel
from custom_ops.jit.launches import launch_of
from custom_ops.jit.triton import COMPILER, watch_triton
from tests.custom_ops.triton_machine import operand, problem, quantized, scaled
from custom_ops.jit.kernel import Operand

ROWS = 300
x = operand("bfloat16", "s0", 512)
scale = Operand("float32", ("s0", 4), (1, "4*((s0 + 3)//4)"), "column_major_tma")
weight = operand("float8_e4m3fn", 384, 512), operand("float32", 3, 4)
ids = operand("float32", "s0", 2), operand("int64", "s0", 2)
moe = operand("bfloat16", 8, 512, 512), operand("bfloat16", 8, 512, 256)
fp8 = operand("float8_e4m3fn", 8, 512, 512), operand("float8_e4m3fn", 8, 512, 256)
scales = operand("float32", 8, 4, 4), operand("float32", 8, 4, 2)
problems = [
    quantized(512),
    problem("silu_mul_group_quant", x, x, 128),
    problem("tensor_quant", x),
    problem("rms_norm_token_quant", x, operand("bfloat16", 512), 1e-6),
    scaled(512, 256),
    problem("block_scaled_mm", operand("float8_e4m3fn", "s0", 512), scale, *weight),
    problem("topk_softmax", operand("bfloat16", "s0", 64), 8),
    problem("fused_moe", x, *moe, *ids),
    problem("fused_moe", x, *fp8, *ids, gate_up_scale=scales[0], down_scale=scales[1]),
    problem("lora_linear_single", x, operand("bfloat16", 384, 512), None,
            operand("bfloat16", 16, 512), operand("bfloat16", 384, 16), 2.0),
]
here = target.here()
planned = {}
for each in problems:
    planned |= dict.fromkeys(COMPILER.kernels(each, 1, ROWS, "full", here))
known = {name: compilers.find(name) for name in {kernel.implementation for kernel in planned}}
building.compile_all(list(planned), known, here)
for name, compiler in known.items():
    compiler.load([kernel for kernel in planned if kernel.implementation == name])
watch_triton()
monitor.arm()

seen, run, specializer = {}, JITFunction.run, internals.Specializer(here.arch)


def noting(self, *args, grid, warmup, **kwargs):
    seen.setdefault(specializer(self, args, kwargs))
    return run(self, *args, grid=grid, warmup=warmup, **kwargs)


def real(value):
    if isinstance(value, tracing.Shadow):
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
        return made.zero_()
    return [real(each) for each in value] if isinstance(value, list) else value


JITFunction.run = noting
with torch.no_grad():
    for each in problems:
        op = getattr(torch.ops.custom_ops, each.op)
        for rows, symbols in tracing.counts_of(each, 1, ROWS):
            with tracing.Trace(here):
                args, kwargs = tracing.arguments(each, symbols)
            op(*map(real, args), **{name: real(value) for name, value in kwargs.items()})
torch.cuda.synchronize()
wanted = {launch_of(kernel) for kernel in planned if kernel.implementation == "triton"}
print(json.dumps({
    "events": [repr(event) for event in monitor.events()],
    "planned": len(wanted),
    "missing": [str(launch) for launch in seen if launch not in wanted],
    "never_launched": [str(launch) for launch in wanted if launch not in seen],
}))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("disabled", ["cuda,deep_gemm", "cuda"])
def test_what_is_planned_is_what_is_launched(tmp_path: Path, disabled: str) -> None:
    """Every count of a range, on the GPU: nothing compiles after the warm-up, and nothing was compiled in vain."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", _SWEEP],
        env={
            **os.environ,
            "CUSTOM_OPS_DISABLE": disabled,
            "CUSTOM_OPS_CACHE_DIR": str(tmp_path / "ours"),
            "DG_JIT_CACHE_DIR": str(tmp_path / "theirs"),
            "TRITON_CACHE_DIR": str(tmp_path / "triton"),
            "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)]),
        },
        cwd=root,
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["events"] == []
    assert answer["missing"] == []
    assert answer["never_launched"] == []
    assert answer["planned"] > 20
