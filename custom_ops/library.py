"""How an op is declared, and how one of its implementations is chosen.

An op is declared once, with `define`: a schema, the public function that documents it, one `check` of
its arguments, `empty` (its outputs, uninitialised: exact shape, dtype and strides), a `reference` in plain
PyTorch that is the semantics, and implementations in order of preference. From these come the fake
(`check` then `empty`) and the CPU and CUDA kernels (`check`, choose, run), so that a fake and a kernel
raise the same errors and return the same strides.

Which implementation runs is decided by one rule: the first one, in the op's order, that is not disabled
(`CUSTOM_OPS_DISABLE`), is available on the device, and supports the arguments. The reference is last and
supports everything. `custom_ops.explain(op, *args)` prints the decision and the reasons.

The ops are inference ops: called in grad mode with an input that requires grad, they raise.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from custom_ops import monitor
from custom_ops.implementation import Implementation, fakes
from custom_ops.implementation import load_cuda as load_cuda
from custom_ops.scales import known

NAMESPACE = "custom_ops"
# Environment variables with the CUSTOM_OPS_ prefix; any other is a misspelling, and an error.
VARIABLES = ("CUSTOM_OPS_DISABLE", "CUSTOM_OPS_CACHE_DIR", "CUSTOM_OPS_MOE_CHUNK_TOKENS")

# Numbers that `torch.compile(dynamic=True)` may hand over as tensors: see `_define_tensor_eps`.
_AT_RUN_TIME = ("eps", "scaling")

# Strided inputs (a half of a packed gate-up tensor) and padded scales are read as they are. Inductor
# applies needs_exact_strides only to nodes that it traced itself and leaves a node that a graph pass
# inserted without any constraint; needs_fixed_stride_order holds for both (2.11 and 2.13).
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)

_SCALAR_TYPES = {
    torch.float32: 6,
    torch.float16: 5,
    torch.bfloat16: 15,
    torch.float8_e4m3fn: 24,
    torch.int8: 1,
}

_library = torch.library.Library(NAMESPACE, "DEF")
_ops: dict[str, Op] = {}


class Unavailable(RuntimeError):
    """No implementation of an op may run: the message gives the reason for each."""


@dataclass(frozen=True)
class Choice:
    """Which implementation of an op runs for some arguments, and why the preferred ones do not.

    implementation: the one that runs, or None. rejected: name -> reason, for those preferred to it.
    """

    op: str
    implementation: Implementation | None
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        chosen = self.implementation.name if self.implementation else "nothing can run"
        lines = [f"{NAMESPACE}.{self.op}: {chosen}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected.items()]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Op:
    """A declared op. `overload` is the torch operator; calling the Op is calling its public function."""

    name: str
    public: Callable[..., Any]
    schema: str
    check: Callable[..., None]
    empty: Callable[..., Any]
    reference: Callable[..., Any]
    implementations: list[Implementation]

    @functools.cached_property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    @functools.cached_property
    def tensor_eps(self) -> torch._ops.OpOverload | None:
        """The overload that takes eps (or scaling) as a 0-d CPU tensor, for ops that have one."""
        packet = getattr(getattr(torch.ops, NAMESPACE), self.name)
        found = (getattr(packet, f"{number}_tensor", None) for number in _AT_RUN_TIME)
        return next(filter(None, found), None)

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.public)

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        """Keyword defaults. The dispatcher leaves out arguments that equal the default of the schema."""
        parameters = self.signature.parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.public(*args, **kwargs)

    def fake(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs without data: the fake and Meta kernel."""
        kwargs = self.defaults | kwargs
        self._reject_grad(args)
        self._check(args, kwargs)
        return self.empty(*args, **kwargs)

    def kernel(self, *args: Any, **kwargs: Any) -> Any:
        """The CPU and CUDA kernel: run the chosen implementation."""
        kwargs = self.defaults | kwargs
        self._reject_grad(args)
        self._check(args, kwargs)
        if args[0].numel() == 0:
            outputs = self.empty(*args, **kwargs)
            if all(
                t.numel() == 0 for t in ((outputs,) if isinstance(outputs, Tensor) else outputs)
            ):
                return outputs
        return self._select(args, kwargs, None).function(*args, **kwargs)

    def usable(self, device: torch.device) -> tuple[str, ...]:
        """Names of the implementations that may run on a device, in order of preference."""
        found, _ = _usable(self, device, os.environ.get("CUSTOM_OPS_DISABLE", ""))
        return tuple(implementation.name for implementation in found)

    def choose(self, *args: Any, **kwargs: Any) -> Choice:
        """Which implementation runs for these arguments. Takes fake tensors and adds no guard.

        With symbolic sizes an implementation counts as supporting them only where that is statically
        known. Raises what the op raises for bad arguments, and Unavailable when nothing may run.
        """
        args, kwargs = self._bind(args, kwargs)
        self._check(args, kwargs)
        rejected: dict[str, str] = {}
        return Choice(self.name, self._select(args, kwargs, rejected), rejected)

    def _select(
        self, args: Sequence[Any], kwargs: dict[str, Any], rejected: dict[str, str] | None
    ) -> Implementation:
        usable, reasons = _usable(self, args[0].device, os.environ.get("CUSTOM_OPS_DISABLE", ""))
        if rejected is not None:
            rejected |= reasons
        for implementation in usable:
            reason = implementation.unsupported and implementation.unsupported(*args, **kwargs)
            if not reason:
                if rejected is not None:
                    after = self.implementations.index(implementation)
                    for other in self.implementations[after:]:
                        rejected.pop(other.name, None)
                return implementation
            if rejected is not None:
                rejected[implementation.name] = reason
        if rejected is None:
            return self._select(args, kwargs, {})
        raise Unavailable(str(Choice(self.name, None, rejected)))

    def _bind(
        self, args: Sequence[Any], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args, bound.kwargs

    def _check(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """The check, which takes tensors for what they are: the dispatcher lets None pass for any of them."""
        try:
            self.check(*args, **kwargs)
        except AttributeError as error:
            for declared, value in zip(self.overload._schema.arguments, args, strict=False):
                if value is None and str(declared.type) == "Tensor":
                    raise ValueError(
                        f"{self.name}: {declared.name} is None; accepted: a tensor"
                    ) from error
            raise

    def _reject_grad(self, args: Sequence[Any]) -> None:
        if not torch.is_grad_enabled():
            return
        for name, value in zip(self.signature.parameters, args, strict=False):
            if isinstance(value, Tensor) and value.requires_grad:
                raise RuntimeError(
                    f"{NAMESPACE}.{self.name}: {name} requires grad, and this is an inference op "
                    "without a derivative; call it under torch.no_grad() or pass "
                    f"{name}.detach()"
                )


monitor.entry_points.add(Op.kernel.__code__)


@functools.cache
def _usable(
    op: Op, device: torch.device, disable: str
) -> tuple[tuple[Implementation, ...], dict[str, str]]:
    """Implementations that may run on a device, in order, and why the others may not."""
    disabled = _parse_disable(disable)
    usable, reasons = [], {}
    for implementation in op.implementations:
        if implementation.name in disabled:
            reasons[implementation.name] = "left out by CUSTOM_OPS_DISABLE"
        elif reason := implementation.unavailable(device):
            reasons[implementation.name] = reason
        else:
            usable.append(implementation)
    return tuple(usable), reasons


def check_environment() -> None:
    """Raises ValueError for a CUSTOM_OPS_DISABLE that names what is no implementation, or for an unknown variable."""
    _parse_disable(os.environ.get("CUSTOM_OPS_DISABLE", ""))


def _parse_disable(value: str) -> frozenset[str]:
    for variable in os.environ:
        if variable.startswith("CUSTOM_OPS_") and variable not in VARIABLES:
            raise ValueError(_unknown("environment variable", variable, VARIABLES))
    names = frozenset(name.strip() for name in value.split(",") if name.strip())
    valid = sorted({i.name for op in _ops.values() for i in op.implementations})
    for name in sorted(names):
        if name not in valid:
            raise ValueError("CUSTOM_OPS_DISABLE: " + _unknown("implementation", name, valid))
    return names


def _unknown(what: str, given: str, valid: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(given, valid, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"unknown {what} {given!r}; {hint}accepted: {', '.join(valid)}"


def define(
    public: Callable[..., Any],
    schema: str,
    *,
    check: Callable[..., None],
    empty: Callable[..., Any],
    reference: Callable[..., Any],
    implementations: Sequence[Implementation] = (),
) -> Op:
    """Declare `custom_ops::<name of public>` with a functional schema such as "(Tensor x) -> Tensor".

    check(*args, **kwargs) raises for bad arguments; empty(...) allocates the outputs; both take fake
    tensors with symbolic sizes and add no guard. The reference becomes the last implementation.
    Raises TypeError when a signature differs from the schema.
    """
    name = public.__name__
    last = Implementation("reference", lambda: reference)
    op = Op(name, public, schema, check, empty, reference, [*implementations, last])
    _library.define(name + schema, tags=_TAGS)
    _library.impl(name, op.kernel, "CPU")
    _library.impl(name, op.kernel, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", op.fake, lib=_library)
    for number in _AT_RUN_TIME:
        if f"float {number}" in schema:
            _define_tensor_eps(op, number)
    for function in (public, check, empty, reference):
        _require_signature(op, function)
    _ops[name] = op
    fakes[name] = op.fake
    return op


def _define_tensor_eps(op: Op, number: str) -> None:
    """The overload `eps_tensor` (`scaling_tensor`): the number as a 0-d tensor on the CPU, read when the op runs.

    `torch.compile(dynamic=True)` turns the float attributes of modules into such tensors, and a schema
    with a float would need a guard on the value.
    """

    def kernel(*args: Any, **kwargs: Any) -> Any:
        arguments = op.signature.bind(*args, **kwargs).arguments
        return op.overload(**arguments | {number: float(arguments[number])})

    def fake(*args: Any, **kwargs: Any) -> Any:
        arguments = op.signature.bind(*args, **kwargs)
        if arguments.arguments[number].device.type != "cpu":
            device = arguments.arguments[number].device
            raise ValueError(
                f"{op.name}: {number} is a tensor on {device}; accepted: a 0-d tensor on the CPU"
            )
        arguments.arguments[number] = 0.0
        return op.fake(*arguments.args, **arguments.kwargs)

    name = f"{op.name}.{number}_tensor"
    schema = op.schema.replace(f"float {number}", f"Tensor {number}")
    _library.define(name + schema, tags=_TAGS)
    _library.impl(name, kernel, "CPU")
    _library.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def _require_signature(op: Op, function: Callable[..., Any]) -> None:
    wanted: list[tuple[Any, ...]] = [
        (
            a.name,
            a.kwarg_only,
            a.default_value if a.has_default_value() else inspect.Parameter.empty,
        )
        for a in op.overload._schema.arguments
    ]
    given: list[tuple[Any, ...]] = [
        (p.name, p.kind is p.KEYWORD_ONLY, p.default)
        for p in inspect.signature(function).parameters.values()
    ]
    # The schema keeps a ScalarType default as its number; the others are what Python says.
    given = [(n, k, _SCALAR_TYPES.get(d, d)) for n, k, d in given]
    if function is not op.public:  # called with every argument: defaults play no part
        wanted, given = [w[:2] for w in wanted], [g[:2] for g in given]
    if wanted != given:
        raise TypeError(
            f"{NAMESPACE}.{op.name}: {function} takes {given}, the schema says {wanted}"
        )


def ops() -> dict[str, Op]:
    """Every declared op by name."""
    return dict(_ops)


def find(op: str | Op | Callable[..., Any]) -> Op:
    """An Op from itself, its name, its public function or its torch operator."""
    if isinstance(op, Op):
        return op
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op)).split(".")[0]
    if name not in _ops:
        raise ValueError(_unknown("op", name, sorted(_ops)))
    return _ops[name]


def explain(op: str | Op | Callable[..., Any], *args: Any, **kwargs: Any) -> Choice:
    """Which implementation of `op` would run for these arguments, and why not the preferred ones.

    op: an op, its name, or its public function, as in `print(explain(custom_ops.group_quant, x, 128))`.
    Runs nothing. Raises what the op would raise for bad arguments.
    """
    declared = find(op)
    try:
        return declared.choose(*args, **kwargs)
    except Unavailable:
        bound, keywords = declared._bind(args, kwargs)
        rejected: dict[str, str] = {}
        with contextlib.suppress(Unavailable):
            declared._select(bound, keywords, rejected)
        return Choice(declared.name, None, rejected)


def require(condition: bool | torch.SymBool, message: Callable[[], str]) -> None:
    """Raise ValueError unless a condition may hold. A symbolic one that is not known to be false passes."""
    if condition is True:
        return
    if known(torch.sym_not(condition)):
        raise ValueError(message())


@functools.cache
def source_hash() -> str:
    """Hash of every source file of this package, CUDA and tables included: for caches of compiled graphs."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh", ".h", ".hpp", ".cpp", ".json"):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
