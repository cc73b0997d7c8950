"""Every private PyTorch API that the package uses, behind names of our own.

An upgrade of PyTorch that moves one of them is mended here and nowhere else. ``SUPPORTED`` is the range of
versions that the test suite has run on; outside of it graphs compile unfused, with one warning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = [
    "SUPPORTED",
    "CustomGraphPass",
    "capture",
    "capture_sizes_from_data",
    "compile_id",
    "compile_with_inductor",
    "fake_mode_of",
    "has_cudagraph_unsafe_ops",
    "inductor_default",
    "inductor_mode_options",
    "is_supported",
    "package_garbles_dtypes",
    "real_tensors",
    "reset_cudagraphs",
    "size_hint",
    "size_to_expr",
    "tidy",
    "trace_pattern",
    "written",
    "zeros_of",
]

SUPPORTED = ((2, 11), (2, 13))
"""First and last minor version that the test suite has run on, both inclusive."""


def is_supported(version: str = torch.__version__) -> bool:
    major, minor = version.split(".")[:2]
    return SUPPORTED[0] <= (int(major), int(minor)) <= SUPPORTED[1]


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode that the graph was traced in, found on the metadata of its nodes."""
    for node in graph.nodes:
        if isinstance(value := node.meta.get("val"), FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextlib.contextmanager
def _quiet_tracing() -> Iterator[None]:
    from torch._dispatch.python import enable_python_dispatcher

    # The python dispatcher lets composite ops (linear, rms_norm) decompose the way AOTAutograd decomposes them.
    with torch.no_grad(), enable_python_dispatcher():
        yield


def real_tensors() -> contextlib.AbstractContextManager[None]:
    """Inside of a compilation, run operators for real: the compiler's fake and proxy modes are set aside."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def trace_pattern(
    fn: Callable[..., Any], shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]
) -> fx.Graph:
    """Trace ``fn`` over fake CPU tensors with the decompositions that Inductor applies to a user's graph."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    with FakeTensorMode() as mode:
        args = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
        with _quiet_tracing(), mode:
            traced = make_fx(fn, decomposition_table=select_decomp_table())(*args)
    traced.graph.eliminate_dead_code()
    return traced.graph


def size_to_expr(size: int | torch.SymInt) -> Any:
    """A size as an ``int``, or as the sympy expression behind a SymInt. Never adds a guard."""
    if isinstance(size, torch.SymInt):
        expr = size.node.expr
        return int(expr) if expr.is_number else expr
    return size


def size_hint(expr: Any, graph: fx.Graph) -> int | None:
    """The value that a symbolic size had in the call that was traced; None for a size without one."""
    if isinstance(expr, int) or expr.is_number:
        return int(expr)
    shape_env = fake_mode_of(graph).shape_env
    if shape_env is None:
        return None
    values = (
        shape_env.backed_var_to_val
        if hasattr(shape_env, "backed_var_to_val")
        else shape_env.var_to_val
    )
    value = expr.xreplace(dict(values))
    return int(value) if value.is_number else None


def size_bounds(size: Any, graph: fx.Graph) -> tuple[int, int | None]:
    """The least and the largest value that the graph's guards leave to a size; None where there is no largest."""
    if isinstance(size, int):
        return size, size
    shape_env = fake_mode_of(graph).shape_env
    if shape_env is None:
        return 0, None
    found = shape_env.bound_sympy(size)
    low, high = (  # no integer where it is unbounded
        int(bound) if bound.is_Integer else None for bound in (found.lower, found.upper)
    )
    return max(0, low or 0), high


def tidy(graph: fx.Graph) -> None:
    """Bring the nodes into an order in which each follows its inputs, and erase what nothing uses."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)  # first: erasing dead code checks the order
    graph.eliminate_dead_code()


def written(node: fx.Node) -> fx.Node:
    """Have Inductor write a value to memory, for readers that would each compute it again; returns what they read."""
    from torch._inductor.inductor_prims import force_stride_order

    value = node.meta["val"]
    with node.graph.inserting_after(node):
        kept = node.graph.call_function(force_stride_order, (node, list(value.stride())))
    kept.meta = {**node.meta, "val": value}
    node.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)
    return kept


def inductor_mode_options(mode: str | None, dynamic: bool | None = None) -> dict[str, Any]:
    """The Inductor options behind ``torch.compile(mode=...)``."""
    if mode is None or mode == "default":
        return {}
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode, dynamic))


def compile_with_inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: dict[str, Any]
) -> Any:
    """Compile as ``backend="inductor"`` does, validating option names and types in the same way."""
    from torch import _TorchCompileInductorWrapper

    return _TorchCompileInductorWrapper(mode=None, options=options, dynamic=None)(
        gm, example_inputs
    )


GRAPH_PARTITION = "graph_partition"
"""The Inductor option that captures what lies between ops that no CUDA graph may hold, each piece for itself."""


def has_cudagraph_unsafe_ops(gm: fx.GraphModule) -> bool:
    """Whether a graph of Dynamo's calls an op that is tagged as one that no CUDA graph may hold."""
    for node in gm.graph.nodes:
        target = node.target
        overloads = [target]
        if isinstance(target, torch._ops.OpOverloadPacket):
            overloads = [getattr(target, name) for name in target.overloads()]
        for overload in overloads:
            if (
                isinstance(overload, torch._ops.OpOverload)
                and torch.Tag.cudagraph_unsafe in overload.tags
            ):
                return True
    return False


def capture_sizes_from_data() -> None:
    """Have Dynamo keep an op in its graph whose result has as many rows as the data says, as fullgraph=True does."""
    from torch._dynamo import config

    config.capture_dynamic_output_shape_ops = True


def inductor_default(option: str) -> Any:
    """The value of an Inductor option when nobody sets it in ``options``."""
    from torch._inductor import config

    return getattr(config, option)


def wrapper_is_cpp() -> bool:
    """Whether Inductor writes the calls of this compilation's kernels in C++, as it does for a package."""
    from torch._inductor import config

    return bool(config.cpp_wrapper)


def package_garbles_dtypes() -> bool:
    """Whether this compilation makes a package whose ops get another dtype than the graph says.

    Up to torch 2.11 a package has the number that an exported program has for a dtype, and its op takes it for
    PyTorch's own: float8_e4m3fn arrives as uint64. 2.13 is right, 2.12 was not tried.
    """
    from torch._inductor.virtualized import V

    return bool(V.aot_compilation) and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


def reset_cudagraphs() -> None:
    """What ``torch.compiler.reset()`` does for backend="inductor"."""
    if torch.cuda.is_initialized():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


def compile_id() -> str:
    """Dynamo's number of the graph that is being compiled, such as ``0/1`` (frame 0, second compilation)."""
    from torch._guards import CompileContext

    current = CompileContext.current_compile_id()
    return str(current) if current is not None else ""


def zeros_of(fake: Any) -> Any:
    """Zeros on the device of a fake tensor, of the size it had in the call that was traced."""
    if not isinstance(fake, torch.Tensor):
        return int(fake) if isinstance(fake, torch.SymInt) else fake
    shape = [size if isinstance(size, int) else size.node.hint for size in fake.shape]
    return torch.zeros(shape, dtype=fake.dtype, device=fake.device)


def capture(
    fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any
) -> list[fx.GraphModule]:
    """The inference graphs of a call as Inductor's first pass would see them; they run eagerly.

    The graphs are flat: ``gm(*inputs)`` takes the inputs kept as ``gm.meta["inputs"]`` and returns a tuple.
    """
    import torch._inductor.lowering  # a decomposition (max_pool2d) looks it up as an attribute, unimported
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)

        def run(*inputs: Any) -> Any:
            gm.meta.setdefault(
                "inputs", [i.clone() if isinstance(i, torch.Tensor) else i for i in inputs]
            )
            return gm(*inputs)

        return run

    backend = aot_autograd(
        fw_compiler=keep, inference_compiler=keep, decompositions=select_decomp_table
    )
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(fn, backend=backend, dynamic=dynamic)(*args, **kwargs)
    torch.compiler.reset()
    return graphs
