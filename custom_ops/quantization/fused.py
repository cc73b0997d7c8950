"""A producer and the quantization of what it produces, declared as one op.

`fuse(SILU_MUL, TOKEN_QUANT)` declares `silu_mul_token_quant`: its signature, schema, checks, outputs and
reference all follow from those of `silu_mul` and `token_quant`. The reference is the composition, so
every rounding of the two ops stands in the fused one. With `keep=True`, which declares `<producer>_and_<scheme>`, what
is quantized is an output too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import GenericAlias
from typing import Any

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.implementation import cuda, triton
from custom_ops.library import NAMESPACE, Op


@dataclass(frozen=True)
class Producer:
    """An op whose first output, of the shape and dtype of its first argument, is worth quantizing.

    op: the op alone. check: its check, taking the name of the op that complains first. kernels: the
    module of the fused Triton implementations. residual: whether the op also returns the sum that it
    normalizes, like its first argument and contiguous; a fused op returns it last.
    """

    op: Op
    check: Callable[..., None]
    kernels: str
    residual: bool = False


@dataclass(frozen=True)
class Scheme:
    """An op that quantizes its first argument.

    op: the op alone. check: its check, taking the name of the op that complains and the name of the
    quantized argument first.
    """

    op: Op
    check: Callable[..., None]


def fuse(producer: Producer, scheme: Scheme, *, keep: bool = False) -> Callable[..., Any]:
    """Declare `<producer>_<scheme>` and return its public function.

    Its positional arguments are the producer's and then the scheme's, less the quantized one; its
    keywords likewise; its outputs are the scheme's, with `keep` the producer's result, and then its residual. Its
    implementations are the C++ op and the Triton function of its name.
    """
    name = f"{producer.op.name}{'_and' if keep else ''}_{scheme.op.name}"
    before, after = _split(producer.op.signature), _split(scheme.op.signature)
    first, quantized = before.positional[0].name, after.positional[0].name
    count = len(before.positional)
    own = {p.name for p in before.keywords}

    def public(*args: Any, **kwargs: Any) -> Any:
        return packet(*args, **kwargs)

    def halves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of the producer, and those of the scheme after the quantized one."""
        keywords = op.defaults | kwargs
        ours = {key: value for key, value in keywords.items() if key in own}
        theirs = {key: value for key, value in keywords.items() if key not in own}
        return args[:count], ours, args[count:], theirs

    def check(*args: Any, **kwargs: Any) -> None:
        inputs, ours, rest, theirs = halves(args, kwargs)
        producer.check(name, *inputs, **ours)
        scheme.check(name, first, inputs[0], *rest, **theirs)

    def empty(*args: Any, **kwargs: Any) -> Any:
        inputs, _, rest, theirs = halves(args, kwargs)
        outputs = _as_tuple(scheme.op.empty(inputs[0], *rest, **theirs))
        x = inputs[0]
        for _ in range(keep + producer.residual):
            outputs += (torch.empty(x.shape, dtype=x.dtype, device=x.device),)
        return outputs if len(outputs) > 1 else outputs[0]

    def reference(*args: Any, **kwargs: Any) -> Any:
        inputs, ours, rest, theirs = halves(args, kwargs)
        produced, *residual = _as_tuple(producer.op.reference(*inputs, **ours))
        outputs = _as_tuple(scheme.op.reference(produced, *rest, **theirs))
        outputs += ((produced,) if keep else ()) + tuple(residual)
        return outputs if len(outputs) > 1 else outputs[0]

    parameters = [*before.positional, *after.positional[1:], *before.keywords, *after.keywords]
    returns = len(scheme.op.overload._schema.returns) + keep + producer.residual
    signature = inspect.Signature(
        parameters,
        return_annotation=Tensor if returns == 1 else GenericAlias(tuple, (Tensor,) * returns),
    )
    for function in (public, check, empty, reference):
        _sign(function, signature)
    public.__name__ = public.__qualname__ = name
    public.__module__ = producer.op.public.__module__
    arguments = ", ".join(p.name for p in [*before.positional, *after.positional[1:]])
    extra = ", then out" * keep + ", then residual_out" * producer.residual
    elsewhere = "an output besides" if keep else "read from memory by\n    nothing else"
    also = ", which also returns what it quantizes" if keep else ""
    public.__doc__ = f"""`{scheme.op.name}({producer.op.name}(...), ...)` as one op{also}.

    {arguments} and the keywords: as in `{producer.op.name}` and `{scheme.op.name}`, whose {quantized} is what
    `{producer.op.name}` returns, rounded to the dtype of {first} before it is quantized and {elsewhere}.
    Returns what `{scheme.op.name}` does{extra}. Raises ValueError for what either op refuses.
    """
    op = library.define(
        public,
        _schema(producer, scheme, keep),
        check=check,
        empty=empty,
        reference=reference,
        implementations=(cuda(name), triton(f"{producer.kernels}:{name}")),
    )
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    return public


@dataclass(frozen=True)
class _Parameters:
    positional: list[inspect.Parameter]
    keywords: list[inspect.Parameter]


def _sign(function: Any, signature: inspect.Signature) -> None:
    function.__signature__ = signature


def _split(signature: inspect.Signature) -> _Parameters:
    parameters = list(signature.parameters.values())
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    return _Parameters([p for p in parameters if p not in keywords], keywords)


def _schema(producer: Producer, scheme: Scheme, keep: bool) -> str:
    """The schema text of the fused op, from the texts of the two."""
    texts = []
    for op in (producer.op, scheme.op):
        arguments, returned = op.schema.removeprefix("(").split(") -> ")
        positional, _, keywords = arguments.partition(", *, ")
        texts.append((positional, keywords, returned))
    (inputs, ours, produced), (quantized, theirs, codes) = texts
    _, _, rest = quantized.partition(", ")
    keywords = ", ".join(text for text in (ours, theirs) if text)
    more = ["Tensor out"] * keep
    if producer.residual:
        more.append(produced.strip("()").split(", ")[1])
    if more:
        codes = "Tensor q" if codes == "Tensor" else codes.strip("()")
        codes = f"({', '.join([codes, *more])})"
    return f"({', '.join(text for text in (inputs, rest) if text)}, *, {keywords}) -> {codes}"


def _as_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)
