"""A Triton launch as a kernel of a plan, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from custom_ops.jit.kernel import Kernel

if TYPE_CHECKING:
    from custom_ops.jit.triton_internals import Launch

IMPLEMENTATION = "triton"


def kernel_of(op: str, launch: Launch, example: Mapping[str, int]) -> Kernel:
    """A launch as a kernel: its parameters by name."""
    spec = {"function": launch.function, "options": launch.options, **dict(launch.arguments)}
    return Kernel.of(op, IMPLEMENTATION, spec, **example)


def launch_of(kernel: Kernel) -> Launch:
    """Back again. The order of the parameters is that of the kernel's function, not of the spec."""
    from custom_ops.jit.triton_internals import Launch, parameters

    spec = dict(kernel.spec)
    names = parameters(spec["function"])
    return Launch(spec["function"], tuple((name, spec[name]) for name in names), spec["options"])
