"""Triton's private side: what a launch is specialized on, compiling that without launching, and its hooks.

A specialization is text, so that a plan can keep it: for each parameter either `=` and a JSON constant, or the type
and the mark that Triton gives it (`*bf16 D`: a pointer to bfloat16 on a boundary of 16 bytes; `i32 D`: a multiple of
16; `i32`: another number). Arguments that stand for it (`_stand_in`) are made from the text, so that the same code of
Triton specializes them at a launch, in a compiling process, and when a compiled kernel is loaded.

Written for Triton 3.6 and 3.7, whose `JITFunction.run`, binder, `_pack_args`, cache and hooks are used here and
nowhere else. Importing this module imports Triton.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as compile_source
from triton.runtime.cache import get_cache_key, get_cache_manager
from triton.runtime.jit import JITFunction, create_function_from_signature

_DTYPES = {
    **{f"i{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"u{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    "i1": torch.bool,
    "u1": torch.bool,
    "bf16": torch.bfloat16,
    **{f"fp{bits}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)},
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
}
_ALIGNMENT = 16


@dataclass(frozen=True)
class Launch:
    """What Triton compiles for a launch. arguments: (parameter, text); options: a JSON object, in the call's order."""

    function: str
    arguments: tuple[tuple[str, str], ...]
    options: str


# --- from a launch to its text -------------------------------------------------------------------------------


def gpu_target(arch: str) -> GPUTarget:
    """The target of an architecture as nvcc spells it, such as "9.0a"."""
    return GPUTarget("cuda", int(arch.rstrip("af").replace(".", "")), 32)


@functools.cache
def _binder(function: JITFunction[Any], arch: str) -> Callable[..., Any]:
    backend = make_backend(gpu_target(arch))
    binder: Callable[..., Any] = create_function_from_signature(
        function.signature, function.params, backend
    )
    return binder


class Specializer:
    """Turns launches into texts, each distinct one once."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self._known: dict[tuple[Any, ...], Launch] = {}

    def __call__(
        self, function: JITFunction[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Launch:
        """Raises ValueError for an argument that cannot be written down."""
        _, specialization, options = _binder(function, self.arch)(*args, **kwargs)
        key = (function, tuple(specialization), str(options))
        if key not in self._known:
            self._known[key] = self._launch(function, specialization, options)
        return self._known[key]

    def _launch(
        self, function: JITFunction[Any], specialization: list[Any], options: Mapping[str, Any]
    ) -> Launch:
        name = _name(function)
        texts = []
        for parameter, (kind, mark) in zip(function.arg_names, specialization, strict=True):
            texts.append((parameter, _text(kind, mark)))
        launch = Launch(name, tuple(texts), json.dumps({k: _encode(v) for k, v in options.items()}))
        if _resolve(name) is not function:
            raise ValueError(f"{name} is not found under its name")
        again = _binder(function, self.arch)(*stand_ins(launch))[1]
        if tuple(again) != tuple(specialization):
            raise ValueError(f"{name}: {launch.arguments} is not specialized as {specialization}")
        return launch


def _text(kind: Any, mark: Any) -> str:
    if kind == "constexpr":
        return "=" + json.dumps(_encode(mark))
    if isinstance(kind, str):
        return f"{kind} {mark}".strip() if mark else kind
    if type(kind) is tuple:
        return json.dumps(list(map(_text, kind, mark)))
    raise ValueError(f"an argument of the type {kind} is not enumerated")


def _name(function: JITFunction[Any]) -> str:
    return f"{function.fn.__module__}:{function.fn.__qualname__}"


@functools.cache
def _resolve(name: str) -> JITFunction[Any] | None:
    """The kernel "module:name", importing the module; None if it is not there."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    while found is not None and not isinstance(found, JITFunction):  # within @triton.heuristics
        found = getattr(found, "fn", None)
    return found


def parameters(name: str) -> list[str]:
    """The parameters of the kernel "module:name". Raises ValueError if there is none."""
    return list(_function(name).arg_names)


def _encode(value: Any) -> Any:
    """A constant in JSON's types."""
    value = value.value if isinstance(value, tl.constexpr) else value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tl.dtype):
        return {"dtype": value.name}
    if isinstance(value, JITFunction):
        return {"function": _name(value)}
    if isinstance(value, tuple):
        return {"tuple": [_encode(each) for each in value]}
    raise ValueError(f"a constant of type {type(value).__name__} is not enumerated")


def _decode(data: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    ((kind, value),) = data.items()
    if kind == "dtype":
        return tl.dtype(value)
    if kind == "function":
        return _resolve(value)
    return tuple(_decode(each) for each in value)


# --- and back ------------------------------------------------------------------------------------------------


class _Pointer:
    """What Triton asks a tensor for."""

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        self.dtype, self._address = dtype, address

    def data_ptr(self) -> int:
        return self._address


def stand_ins(launch: Launch) -> list[Any]:
    """Arguments, in order, that are specialized as those of the launch were."""
    return [_stand_in(text) for _, text in launch.arguments]


def _stand_in(text: str) -> Any:
    if text.startswith("="):
        return _decode(json.loads(text[1:]))
    if text.startswith("["):
        return tuple(map(_stand_in, json.loads(text)))
    kind, _, mark = text.partition(" ")
    if kind.startswith("tensordesc"):
        return _descriptor(text)
    aligned = _ALIGNMENT if "D" in mark else _ALIGNMENT + 1
    if kind.startswith("*"):
        return _Pointer(_DTYPES[kind.removeprefix("*k").removeprefix("*")], aligned)
    if kind in ("u1", "i1"):
        return True
    if kind.startswith(("fp", "bf")):
        return 0.5
    high = {"i64": 1 << 40, "u64": 1 << 63}.get(kind, 0)  # of numbers that need so many bits
    return high + aligned


def _descriptor(text: str) -> Any:
    """The descriptor of "tensordesc<bf16[64, 128]>"; Gluon's has a layout before the end, ",NVMMASharedLayout(...)"."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    dtype, _, block = text.removeprefix("tensordesc<").partition("[")
    block, _, layout = block.partition("]")
    sizes = [int(size) for size in block.split(",")]
    strides = [_ALIGNMENT] * (len(sizes) - 1) + [1]
    base = _Pointer(_DTYPES[dtype], 0)
    if not layout.startswith(",NVMMASharedLayout"):
        return TensorDescriptor(base, sizes, strides, sizes)
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia import hopper

    numbers = dict(re.findall(r"(\w+)=(\d+)", layout))
    names = ("swizzle_byte_width", "element_bitwidth", "rank")
    shared = gl.NVMMASharedLayout(*(int(numbers[name]) for name in names))
    pitched = [_ALIGNMENT] * (len(sizes) - 1) + [1]
    return hopper.TensorDescriptor(base, sizes, pitched, sizes, shared)


def _options(function: JITFunction[Any], launch: Launch) -> dict[str, Any]:
    """The keywords of the launch, and those that `JITFunction.run` adds."""
    options = {name: _decode(value) for name, value in json.loads(launch.options).items()}
    options["debug"] = options.get("debug", function.debug) or knobs.runtime.debug
    options["instrumentation_mode"] = knobs.compilation.instrumentation_mode
    return options


def _function(name: str) -> JITFunction[Any]:
    function = _resolve(name)
    if function is None:
        raise ValueError(f"there is no Triton kernel {name}")
    return function


def _source(launch: Launch, arch: str) -> tuple[ASTSource, Any]:
    """The source that Triton's compiler takes, and the options, as `JITFunction.run` would make them."""
    function, backend = _function(launch.function), make_backend(gpu_target(arch))
    options = _options(function, launch)
    bound, specialization, rest = _binder(function, arch)(*stand_ins(launch), **options)
    parsed, signature, constants, attributes = function._pack_args(
        backend, options, bound, specialization, rest
    )
    kind = ASTSource
    if type(function) is not JITFunction:
        from triton.experimental.gluon._runtime import GluonASTSource

        kind = GluonASTSource
    return kind(function, signature, constants, attributes), parsed


# --- compiling and loading -----------------------------------------------------------------------------------


def cache_hash(launch: Launch, arch: str) -> str:
    """Triton's name for the compiled kernel: of its source, arguments, options, Triton itself and its settings."""
    source, options = _source(launch, arch)
    return _hash(source, options, arch)


def _hash(source: ASTSource, options: Any, arch: str) -> str:
    from triton._C.libtriton import get_cache_invalidating_env_vars

    key = get_cache_key(
        source, make_backend(gpu_target(arch)), options, get_cache_invalidating_env_vars()
    )
    return hashlib.sha256(key.encode()).hexdigest()


def compile_ahead(launch: Launch, arch: str, folder: Path) -> list[Path]:
    """Compile into a cache folder of Triton, anew if something is there; needs no GPU. Its files."""
    with _cache_in(folder), knobs.compilation.scope():
        knobs.compilation.always_compile = True
        source, options = _source(launch, arch)
        kernel = compile_source(source, target=gpu_target(arch), options=options.__dict__)
        _launcher(source, kernel)
        group = get_cache_manager(kernel.hash).get_file(f"__grp__{source.name[:150]}.json")
    return [*map(Path, kernel.metadata_group.values()), Path(group)]


def _launcher(source: ASTSource, kernel: Any) -> None:
    """Triton 3.6 has a C compiler make a launcher for each signature, which then lies in the cache as well."""
    from triton.backends.nvidia import driver

    if not hasattr(driver, "make_launcher"):
        return
    try:
        driver.library_dirs()
        driver.CudaLauncher(source, kernel.metadata)
    except (AssertionError, OSError, ImportError, subprocess.SubprocessError):
        pass  # no libcuda to link with, or a stub, as in an image build: it is made when it is loaded


def load(launch: Launch, arch: str, folder: Path) -> bool:
    """Make the current GPU ready to run it without looking for it. Whether it lay compiled in the folder."""
    function = _function(launch.function)
    options = {name: _decode(value) for name, value in json.loads(launch.options).items()}
    with _cache_in(folder):
        kernel = function.warmup(*stand_ins(launch), grid=(1,), **options)
        kernel._init_handles()
    return bool(kernel.hash == cache_hash(launch, arch))


@contextlib.contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    with knobs.cache.scope():
        knobs.cache.dir = str(folder)
        yield


# --- hooks ---------------------------------------------------------------------------------------------------

OnLaunch = Callable[[JITFunction[Any], tuple[Any, ...], Mapping[str, Any]], None]
_recorders = threading.local()
_patches = 0
_patching = threading.Lock()


@contextlib.contextmanager
def recording(on_launch: OnLaunch) -> Iterator[None]:
    """Within, each launch of this thread is told to on_launch and does not happen."""
    before = getattr(_recorders, "current", None)
    _patch(+1)
    _recorders.current = on_launch
    try:
        yield
    finally:
        _recorders.current = before
        _patch(-1)


def _run(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
    on_launch = getattr(_recorders, "current", None)
    if on_launch is None:  # of another thread
        return _run_before(self, *args, grid=grid, warmup=warmup, **kwargs)
    return on_launch(self, args, kwargs)


_run_before = JITFunction.run


def _patch(step: int) -> None:
    """Launches cost nothing more where nobody records."""
    global _patches, _run_before
    with _patching:
        if not _patches:
            _run_before = JITFunction.run
        _patches += step
        JITFunction.run = _run if _patches else _run_before


OnCompile = Callable[[str, str], None]


def watch(on_compile: OnCompile) -> None:
    """From now on, on_compile(kernel, specialization) is called before a launch compiles; what it raises goes through.

    A kernel that Triton finds compiled on disk is not compiled. Inductor's own kernels are compiled another way and
    are never seen here. A hook that was set before is called as well.
    """
    before = knobs.runtime.jit_cache_hook

    def hook(**info: Any) -> Any:
        if not info["is_manual_warmup"] and not _on_disk(info):
            on_compile(_name(info["fn"].jit_function), _describe(info))
        return before(**info) if before else None

    knobs.runtime.jit_cache_hook = hook


def _describe(info: Mapping[str, Any]) -> str:
    """A specialization in a line: types, a D for what is a multiple of 16, and constants."""
    compiled = info["compile"]
    constants, marks = compiled["constants"], compiled["configs"][0]
    parts = []
    for index, (name, kind) in enumerate(compiled["signature"].items()):
        if kind == "constexpr":
            parts.append(f"{name}={constants.get((index,))}")
        else:
            parts.append(f"{name}: {kind}{' D' if marks.get((index,)) else ''}")
    warps, stages = compiled["num_warps"], compiled["num_stages"]
    return f"{info['fn'].name}[{warps} warps, {stages} stages]({', '.join(parts)})"


def _on_disk(info: Mapping[str, Any]) -> bool:
    compile_info = info["compile"]
    source = ASTSource(
        info["fn"].jit_function,
        compile_info["signature"],
        compile_info["constants"],
        compile_info["configs"][0],
    )
    target = triton.runtime.driver.active.get_current_target()
    given = json.loads(compile_info["specialization_data"])["options"]
    options = make_backend(target).parse_options(
        {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    )
    digest = _hash(source, options, str(target.arch))
    found = get_cache_manager(digest).get_group(f"{source.name[:150]}.json")
    return bool(found) and not knobs.compilation.always_compile
