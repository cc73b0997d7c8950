"""An H100 that is not there: Triton compiles for it, has a driver that launches nothing, and a CPU tensor is as good.

With the ops of the cases, and the problems that they pose.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from custom_ops import cuda_build, library, platform
from custom_ops.implementation import Implementation
from custom_ops.jit import building, compilers, deep_gemm_grouped
from custom_ops.jit import triton as jit_triton
from custom_ops.jit import triton_internals as internals
from custom_ops.jit.kernel import Kernel, Operand, Problem, Target
from custom_ops.jit.triton import COMPILER

H100 = Target("9.0a", 132, "580.0", "an H100")


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


def raised(kind: type[Exception], call: Callable[[], object]) -> str:
    """The message of what a call raises."""
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)
