"""Which kernels a call of an op compiles, found by calling it: with tensors that have everything but memory.

The op's own Python runs, with its check, its choice of an implementation for these sizes, and the implementation, in
which each Triton launch is noted instead of done, and each op that is called inside is followed in the same way. So
no kernel has a description of its own here: what a launch is specialized on is what it would be specialized on. The
sizes are plain numbers, as in a call, because code takes other ways for symbolic ones; a call takes 0.1 to 0.5 ms,
and every token count of a range is called.

The tensors (`Shadow`) lie on PyTorch's meta device and say that they lie on the GPU. An implementation that reads
data on the host cannot be traced, which a plan says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from custom_ops import library
from custom_ops.implementation import CUDA_NAMESPACE
from custom_ops.jit import sizes
from custom_ops.jit.kernel import Kernel, Operand, Problem, Target
from custom_ops.jit.launches import kernel_of
from custom_ops.scales import has_layout

_state = threading.local()


class Shadow(torch.Tensor):
    """A tensor without memory that says it is on the GPU, except to PyTorch itself."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("meta") if _state.inside else _state.device

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return not _state.inside

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return bool(_state.inside)


class _Mode(TorchFunctionMode):
    """Makes every tensor a Shadow, and follows the ops of this package."""

    def __init__(self, follow: Callable[..., Any]) -> None:
        super().__init__()
        self.follow = follow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (op := _op_of(func)) is not None:
            with self:  # a mode is off while it handles something
                return self.follow(op, args, dict(kwargs))
        if func is torch.Tensor.record_stream:
            return None
        if _is_gpu(kwargs.get("device")):
            kwargs = {**kwargs, "device": "meta"}
        if any(map(_is_gpu, args)):  # as in x.to(device)
            args = tuple("meta" if _is_gpu(each) else each for each in args)
        _state.inside = True
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return _shadows(func(*args, **kwargs))
        finally:
            _state.inside = False


def _is_gpu(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _shadows(value: Any) -> Any:
    kind = type(value)
    if kind is torch.Tensor and value.device.type == "meta":
        return value.as_subclass(Shadow)
    return kind(map(_shadows, value)) if kind is tuple or kind is list else value


def _op_of(func: Any) -> library.Op | None:
    """The op of this package that a torch operator is, whichever way it is called."""
    if isinstance(func, torch._ops.OpOverload):
        namespace, _, name = func._schema.name.partition("::")
    elif isinstance(func, torch._ops.OpOverloadPacket):
        namespace, _, name = func._qualified_op_name.partition("::")
    else:
        return None
    return library.ops().get(name) if namespace in (library.NAMESPACE, CUDA_NAMESPACE) else None


class Trace:
    """The kernels of some calls, each once, in the order of their first appearance. Calls are made within `with`."""

    def __init__(self, target: Target) -> None:
        from custom_ops.jit.triton_internals import Specializer

        self.target = target
        self.kernels: dict[Kernel, None] = {}
        self.notes: dict[str, None] = {}
        self.example: Mapping[str, int] = {}  # the sizes of the call that is being traced
        self._op = ""
        self._launches: set[Any] = set()
        self._specializer = Specializer(target.arch)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Trace:
        from custom_ops.jit.triton_internals import recording

        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
        _state.device, _state.inside, _state.trace = torch.device("cuda", index), False, self
        for context in (torch.no_grad(), recording(self._launched), _Mode(self._follow)):
            self._stack.enter_context(context)
        return self

    def __exit__(self, *error: object) -> None:
        _state.trace = None
        self._stack.close()

    def call(self, problem: Problem, symbols: Mapping[str, int], **example: int) -> None:
        """One call of a problem. Raises ValueError for arguments that cannot be made, and what the op raises."""
        self._op, self.example = problem.op, example
        self._follow(library.find(problem.op), *arguments(problem, symbols))

    def _launched(self, function: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        launch = self._specializer(function, args, kwargs)
        if launch not in self._launches:
            self._launches.add(launch)
            self.add(kernel_of(self._op, launch, self.example))

    def _follow(self, op: library.Op, args: Any, kwargs: dict[str, Any]) -> Any:
        """What `Op.kernel` does, except that what is known to reach certain kernels is not run."""
        from custom_ops.jit import compilers

        args, kwargs = op._bind(args, kwargs)
        op.check(*args, **kwargs)
        implementation = op._select(args, kwargs, None)
        compiler = compilers.find(implementation.name)
        if implementation.name == "reference":
            return op.empty(*args, **kwargs)
        if compiler is not None and compiler.knows(op.name):
            rows = args[0].numel() // max(1, args[0].shape[-1])
            problem = Problem(
                op.name,
                implementation.name,
                _operands((*args, *kwargs.values())),
                (rows, rows),
                False,
            )
            if not self.can(implementation.name):
                return op.empty(*args, **kwargs)
            for kernel in compiler.kernels(problem, rows, rows, "full", self.target):
                self.add(kernel)
            return op.empty(*args, **kwargs)
        return implementation.function(*args, **kwargs)

    def can(self, implementation: str) -> bool:
        """Whether the compiler of an implementation can compile for the target; if not, that is noted."""
        from custom_ops.jit import compilers

        compiler = compilers.find(implementation)
        reason = compiler.why_not(self.target) if compiler is not None else None
        if reason:
            self.uncovered(reason)
        return not reason

    def uncovered(self, why: str) -> None:
        """The traced call compiles something that nobody can name."""
        self.notes.setdefault(why, None)

    def add(self, kernel: Kernel) -> None:
        """Note a kernel that the traced call needs; named after the op that was called."""
        self.kernels.setdefault(dataclasses.replace(kernel, op=self._op), None)


def current() -> Trace | None:
    """The trace that this thread is in: an implementation that calls a compiler of its own notes its kernels there."""
    return getattr(_state, "trace", None)


# --- arguments from a problem --------------------------------------------------------------------------------


def arguments(
    problem: Problem, symbols: Mapping[str, int]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a problem for certain values of its symbols, tensors as shadows."""
    op = library.find(problem.op)
    schema = op.overload._schema.arguments
    values = [
        _value(argument, declared, symbols)
        for argument, declared in zip(problem.arguments, schema, strict=True)
    ]
    count = sum(not declared.kwarg_only for declared in schema)
    return tuple(values[:count]), {
        declared.name: value for declared, value in zip(schema[count:], values[count:])
    }


def _value(argument: Any, declared: Any, symbols: Mapping[str, int]) -> Any:
    if isinstance(argument, Operand):
        if str(declared.type) == "float":  # eps as a tensor: any will do
            return 1e-6
        shape, stride = (
            [sizes.value_of(size, symbols) for size in of]
            for of in (argument.shape, _strides(argument))
        )
        dtype = getattr(torch, argument.dtype)
        return _shadow(shape, stride, sizes.value_of(argument.offset, symbols), dtype)
    if isinstance(argument, tuple):
        return [_value(each, declared, symbols) for each in argument]
    if isinstance(argument, str) and argument.startswith("torch."):
        return getattr(torch, argument.removeprefix("torch."))
    if isinstance(argument, str) and "int" in str(declared.type).lower():
        return sizes.value_of(argument, symbols)
    return argument


def _shadow(shape: list[int], stride: list[int], offset: int, dtype: torch.dtype) -> Shadow:
    memory = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    if offset % 16:  # only what it does to the alignment matters
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride))
        memory = torch.empty(max(extent, 0) + 16, dtype=dtype, device="meta")
        memory = memory.as_strided(shape, stride, offset % 16)
    return memory.as_subclass(Shadow)


def _operands(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(_operand(value) if isinstance(value, torch.Tensor) else value for value in values)


def _operand(tensor: torch.Tensor) -> Operand:
    scales = tensor.dtype == torch.float32 and tensor.dim() > 1
    layout = "column_major_tma" if scales and has_layout(tensor, "column_major_tma") else ""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Operand(
        dtype, tuple(tensor.shape), tensor.stride(), layout, int(tensor.storage_offset())
    )


def counts_of(problem: Problem, low: int, high: int) -> Iterator[tuple[int, dict[str, int]]]:
    """For each row count from low to high that the problem can have: the count, and values of its symbols.

    With several symbols, such as a batch and a length, each of them in turn is all rows of the count, and each is 2.
    Raises ValueError for a symbol that is no part of the rows.
    """
    operands = list(_flat(problem.arguments))
    first = next(each for each in operands if isinstance(each, Operand))
    leading = first.shape[:-1]
    symbols = sizes.symbols_of(leading)
    others = set(sizes.symbols_of(_sizes(operands))) - set(symbols)
    if others:
        raise ValueError(f"{', '.join(sorted(others))} is no size of the tokens")
    if not symbols:
        yield low, {}
    for symbol in symbols:
        for fixed in (1, 2) if len(symbols) > 1 else (1,):
            values = dict.fromkeys(symbols, fixed)
            for value in range(1, high + 1):
                values[symbol] = value
                rows = 1
                for size in leading:
                    rows *= sizes.value_of(size, values)
                if rows > high:
                    break
                if rows >= low:
                    yield rows, dict(values)


def _flat(arguments: Iterable[Any]) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _flat(argument)
        else:
            yield argument


def _sizes(operands: Iterable[Any]) -> Iterator[sizes.Size]:
    for operand in operands:
        if isinstance(operand, Operand):
            yield from (*operand.shape, *_strides(operand), operand.offset)


def _strides(operand: Operand) -> tuple[sizes.Size, ...]:
    """The strides, without the symbols of those that reach no other element: of a batch of one in a longer buffer."""
    return tuple(
        1 if size == 1 and isinstance(stride, str) else stride
        for size, stride in zip(operand.shape, operand.stride, strict=True)
    )
