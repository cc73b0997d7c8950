"""Implementations of ops: what one is, and the two kinds that most ops have, Triton and CUDA C++."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from custom_ops import platform
from custom_ops.scales import known

CUDA_NAMESPACE = "custom_ops_cuda"
CUDA_MAX_DIMS = 8
# The fake of each declared op by its name, for the op of that name in the CUDA C++ library.
fakes: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    name: the word used in `CUSTOM_OPS_DISABLE` and reports. load: returns the function, importing or
    building what it needs; called once, on first use. unavailable: why it cannot run on a device, or
    None. unsupported: why it cannot take these arguments (those of the op), or None; it must decide
    symbolic sizes with `scales.known`. direct: `load` returns a torch operator that may stand in a graph.
    """

    name: str
    load: Callable[[], Callable[..., Any]]
    unavailable: Callable[[torch.device], str | None] = lambda device: None
    unsupported: Callable[..., str | None] | None = None
    direct: bool = False

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The function itself; made ready on first use."""
        return self.load()

    def prepare(self) -> None:
        """Make it ready now: import its module, build or load its library."""
        self.function  # noqa: B018

    @property
    def overload(self) -> Any:
        """The torch operator that runs it with no Python in between, or None. Prepares it."""
        return self.function if self.direct else None


def triton(target: str, unsupported: Callable[..., str | None] | None = None) -> Implementation:
    """The Triton implementation `target`, "module:function"; imported on first use."""
    return Implementation("triton", lambda: _resolve(target), _no_triton, unsupported)


def _no_triton(device: torch.device) -> str | None:
    if not platform.has_triton():
        return "triton is not installed (pip install triton)"
    if device.type == "cpu" and not platform.triton_interpret():
        return "on a CPU it runs only in the Triton interpreter (TRITON_INTERPRET=1)"
    capability = platform.cuda_capability(device) if device.type == "cuda" else None
    if device.type == "cuda" and (capability is None or capability < (8, 0)):
        return f"needs a GPU of compute capability 8.0 or newer, here is {capability}"
    return None


def cuda(name: str) -> Implementation:
    """The CUDA C++ implementation `custom_ops_cuda::<name>`; built or loaded on first use."""
    return Implementation("cuda", lambda: cuda_op(name), _no_cuda, _cuda_unsupported, direct=True)


def _cuda_unsupported(*args: Any, **kwargs: Any) -> str | None:
    """What the C++ ops refuse: more than 8 dimensions, a vector (a weight) that is strided."""
    if args[0].dim() > CUDA_MAX_DIMS:
        return f"takes at most {CUDA_MAX_DIMS} dimensions, here are {args[0].dim()}"
    for vector in args:
        if isinstance(vector, Tensor) and vector.dim() == 1 and not known(vector.stride(0) == 1):
            return f"needs a contiguous weight, its stride is {vector.stride(0)}"
    return None


def _no_cuda(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA tensor, this one is on {device.type}"
    from custom_ops import cuda_build

    return cuda_build.why_not()


@functools.cache
def load_cuda() -> None:
    """Build (if needed) and load the CUDA C++ library, and give each of its ops the op's fake.

    Raises RuntimeError inside a CUDA graph capture, where nothing may be compiled or loaded.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the CUDA C++ kernels are not loaded yet, and a CUDA graph is being captured: call the op "
            "once before the capture, or custom_ops.library.load_cuda()"
        )
    from custom_ops import cuda_build

    cuda_build.load()
    loaded = getattr(torch.ops, CUDA_NAMESPACE)
    for name, fake in fakes.items():
        if hasattr(loaded, name):
            torch.library.register_fake(f"{CUDA_NAMESPACE}::{name}", fake)


def cuda_op(name: str) -> torch._ops.OpOverload:
    """The operator `custom_ops_cuda::<name>`; built or loaded on first use."""
    load_cuda()
    return getattr(getattr(torch.ops, CUDA_NAMESPACE), name).default


def _resolve(target: str) -> Any:
    """The object "module:name", importing the module."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
