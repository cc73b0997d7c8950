"""Declaring an op that every rank of a process group calls together.

`library.define` does not fit such an op, for four reasons, and this is what it does otherwise:

- A rank without tokens must take part, or its peers wait for it: the kernel never returns early because its first
  argument is empty, as `library.Op.kernel` does.
- How many rows a rank receives depends on the tokens of all ranks, so `empty` asks the tracer for a size (an unbacked
  one) and is only ever a fake: it cannot allocate the outputs of a kernel, and there is no kernel for meta tensors.
- An op in which the host waits must not stand in a CUDA graph: it carries the tag `cudagraph_unsafe`, around which
  Inductor partitions a graph. (`capturable`: one of fixed shapes, in which nobody waits.)
- A rank that has no tokens needs no result, and its peers need it to call the op: no compiler may drop it as dead code.

Ranks must run the ops of a group in the same order. In a graph, what orders two of them is that one needs the result of
the other, as the layers of a model do; a compiler may swap two that do not, on one rank and not on another.

All else (one check, the choice of an implementation, `explain`, no derivative) is `library`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from custom_ops import library
from custom_ops.implementation import Implementation


class CollectiveOp(library.Op):
    """An op that every rank of a group calls together, with the same arguments but for the tokens."""

    def kernel(self, *args: Any, **kwargs: Any) -> Any:
        """The CPU and CUDA kernel: run the chosen implementation, whether there are tokens or not."""
        kwargs = self.defaults | kwargs
        self._reject_grad(args)
        self.check(*args, **kwargs)
        return self._select(args, kwargs, None).function(*args, **kwargs)


def define(
    public: Callable[..., Any],
    schema: str,
    *,
    check: Callable[..., None],
    empty: Callable[..., Any],
    reference: Callable[..., Any],
    implementations: Sequence[Implementation] = (),
    capturable: bool = False,
    overload: str = "",
) -> CollectiveOp:
    """Declare `custom_ops::<name of public>`; the other arguments are those of `library.define`.

    overload: the name of one with the same arguments and without the tag, for calls in which nobody waits.
    """
    name = public.__name__
    last = Implementation("reference", lambda: reference)
    op = CollectiveOp(name, public, schema, check, empty, reference, [*implementations, last])
    tags = (*library._TAGS, *(() if capturable else (torch.Tag.cudagraph_unsafe,)))
    library._library.define(name + schema, tags=tags)
    library._library.impl(name, op.kernel, "CPU")
    library._library.impl(name, op.kernel, "CUDA")
    torch.library.register_fake(f"{library.NAMESPACE}::{name}", op.fake, lib=library._library)
    torch.fx.has_side_effect(op.overload)
    if overload:
        full = f"{name}.{overload}"
        library._library.define(full + schema, tags=library._TAGS)
        library._library.impl(full, op.kernel, "CPU")
        library._library.impl(full, op.kernel, "CUDA")
        torch.library.register_fake(f"{library.NAMESPACE}::{full}", op.fake, lib=library._library)
        torch.fx.has_side_effect(getattr(getattr(torch.ops.custom_ops, name), overload))
    for function in (public, check, empty, reference):
        library._require_signature(op, function)
    library._ops[name] = op
    return op
