"""Importing custom_ops is free: nothing is compiled, CUDA stays untouched, optional packages too."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

OPTIONAL = ("triton", "deep_gemm", "tvm_ffi", "flashinfer", "deep_ep", "hypothesis")


def run(code: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CUSTOM_OPS_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**env, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_optional_package_and_does_not_touch_cuda():
    out = run(f"""
        import sys
        import torch
        before = set(sys.modules)
        import custom_ops
        new = set(sys.modules) - before
        print(sorted(name for name in new if name.split(".")[0] in {OPTIONAL!r}))
        print("custom_ops.cuda_build" in new, torch.cuda.is_initialized())
    """)
    assert out.split("\n")[:2] == ["[]", "False False"]


@pytest.mark.parametrize("hidden", ["triton", "deep_gemm"])
def test_works_and_explains_itself_without_an_optional_package(hidden):
    out = run(
        f"""
        import sys
        sys.modules[{hidden!r}] = None      # what `import` takes for "not installed"
        import torch
        import custom_ops
        from custom_ops import platform
        x = torch.ones(2, 128, dtype=torch.bfloat16)
        q, scale = custom_ops.group_quant(x, 128)
        print(custom_ops.explain(custom_ops.group_quant, x, 128))
        print("has", platform.has_triton(), platform.has_deep_gemm())
        """,
        TRITON_INTERPRET="1",
    )
    if hidden == "triton":
        assert "custom_ops.group_quant: reference" in out
        assert "not triton: triton is not installed (pip install triton)" in out
        assert "has False" in out
    else:
        assert "has True False" in out


def test_a_misspelt_variable_is_an_error_that_names_the_nearest():
    out = run(
        """
        import torch
        import custom_ops
        try:
            custom_ops.group_quant(torch.ones(2, 128, dtype=torch.bfloat16), 128)
        except ValueError as error:
            print(error)
        """,
        CUSTOM_OPS_DISABEL="triton",
    )
    assert "'CUSTOM_OPS_DISABEL'; did you mean 'CUSTOM_OPS_DISABLE'?" in out
