"""A producer and the quantization of what it produces: what the fusions of every such pair have in common.

    quantize(produce(inputs))   ->   <producer>_<scheme>(inputs)

A pair is one file, one fusion, one toggle; this module says what a producer and what a scheme is. The output of the
producer must have no other reader: it is never written. But for a norm with a scheme of KEPT: where others read what
it returns too (an adapter, a router), the op is `<producer>_and_<scheme>`, which has it as an output more. The
quantization stands in the graph with the arithmetic that the user's code has, and goes into the op with it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor as T
from torch import fx

import custom_ops
from custom_ops.scales import GROUP_SIZES
from fusion_passes.arithmetic import MAX
from fusion_passes.canonical import asymmetric_quantizations, meanings
from fusion_passes.fusion import Constraint, Fusion, Pattern, Scalar, SizeOf, Tensor
from fusion_passes.matching import Match
from fusion_passes.operations import escapes, readers
from fusion_passes.rewriting import Rewrite

FP8 = torch.float8_e4m3fn
KEPT = ("group_quant", "token_quant")


@dataclass(frozen=True)
class Producer:
    """What makes the values that are quantized.

    name: of its op. rows: its inputs over tokens. numbers: its other inputs. read, written: bytes per element besides
    the result. spellings: each meaning of it in plain PyTorch, with the dtype of its weight and its constants; a
    function returns the values and, where there is a residual, the sum.
    """

    name: str
    rows: tuple[str, ...]
    spellings: tuple[tuple[Callable[..., Any], torch.dtype | None, Mapping[str, Any]], ...]
    weight: bool = False
    numbers: tuple[str, ...] = ()
    residual: bool = False

    @property
    def arguments(self) -> tuple[str, ...]:
        return (*self.rows, *(("weight",) if self.weight else ()), *self.numbers)


@dataclass(frozen=True)
class Scheme:
    """A quantization.

    name: of its op. last: the trailing size of what is quantized. inputs: its parameters besides the values. quantize:
    it in plain PyTorch. keywords: the keyword arguments of its op. needs: the node that stands for it in a graph.
    rounding: those of the graph's arithmetic that its op takes; all of them if none is named. also: its parameters as
    other graphs have them, where one that is missing is None.
    """

    name: str
    last: str
    inputs: Mapping[str, Any]
    quantize: Callable[..., tuple[T, ...]]
    keywords: Callable[[Rewrite], dict[str, Any]]
    needs: str
    constraints: tuple[Constraint, ...] = ()
    arguments: tuple[str, ...] = ()
    twice: bool = False  # the largest magnitude is known only when all values have been seen once
    scales: str = "0"
    outputs: int = 2
    rounding: tuple[str, ...] = ()
    also: tuple[Mapping[str, Any], ...] = ()


def quantizing(
    producer: Producer | None, scheme: Scheme, summary: str, priority: int = 0
) -> Fusion:
    """The fusion of a producer (None: whatever value there is) with a scheme."""
    name = scheme.name if producer is None else f"{producer.name}_{scheme.name}"
    size = f"num_tokens*{scheme.last}" if "*" not in scheme.last else f"num_tokens*({scheme.last})"
    # in bytes per element: values are 16 bits wide, codes 8; a second pass over the values reads them again
    again = 2 * scheme.twice
    if producer is None:
        before = after = 3 + again
    else:
        inputs = 2 * len(producer.rows) + 2 * producer.residual
        before, after = inputs + 2 + again + 3, inputs + (4 + 1 if scheme.twice else 1)
    return Fusion(
        name=name,
        summary=summary,
        stage=3,
        priority=priority,
        patterns=tuple(_patterns(producer or _VALUES, scheme, name)),
        rewrite=lambda m: _rewrite(m, producer or _VALUES, scheme, name),
        constraints=scheme.constraints,
        needs=scheme.needs,
        bytes_before=f"{before}*{size} + {scheme.scales}",
        bytes_after=f"{after}*{size} + {scheme.scales}",
    )


def producing(producer: Producer, summary: str, priority: int = -2) -> Fusion:
    """The fusion of a producer alone."""
    size = Tensor("num_tokens", "hidden_size")
    patterns = []
    for produce, weight_dtype, constants in producer.spellings:
        inputs: dict[str, Any] = dict.fromkeys(producer.rows, size)
        if producer.weight:
            inputs["weight"] = Tensor("hidden_size", dtype=weight_dtype)
        inputs |= dict.fromkeys(producer.numbers, Scalar())
        label = _label(producer.name, constants, weight_dtype)
        patterns.append(Pattern(produce, inputs, constants, label))

    def rewrite(m: Rewrite) -> tuple[fx.Node, ...]:
        node = m.call(producer.name, *_arguments(m, producer), **m.constants)
        return m.outputs_of(node, 2) if producer.residual else (node,)

    moved = f"{2 * len(producer.rows) + 2 + 2 * producer.residual}*num_tokens*hidden_size"
    return Fusion(
        name=producer.name,
        summary=summary,
        stage=3,
        priority=priority,
        patterns=tuple(patterns),
        rewrite=rewrite,
        bytes_before=moved,
        bytes_after=moved,
    )


def _label(name: str, constants: Mapping[str, Any], weight_dtype: torch.dtype | None) -> str:
    said = [name, *map(str, constants.values())]
    return ", ".join(said + ["float32 weight"] * (weight_dtype is not None))


def _arguments(m: Rewrite, producer: Producer) -> list[Any]:
    return [m.scalar(n) if n in producer.numbers else m.tensor(n) for n in producer.arguments]


def _patterns(producer: Producer, scheme: Scheme, name: str) -> list[Pattern]:
    patterns = []
    spelt = itertools.product(producer.spellings, (scheme.inputs, *scheme.also))
    for (produce, weight_dtype, constants), parameters in spelt:
        inputs: dict[str, Any] = dict.fromkeys(producer.rows, Tensor("num_tokens", scheme.last))
        if producer.weight:
            inputs["weight"] = Tensor(scheme.last, dtype=weight_dtype)
        inputs |= dict.fromkeys(producer.numbers, Scalar()) | dict(parameters)

        def fn(*, produce: Callable[..., Any] = produce, **values: Any) -> Any:
            made = produce(*(values[name] for name in producer.arguments))
            value, *residual = made if isinstance(made, tuple) else (made,)
            rest = {key: values[key] for key in values if key in scheme.inputs}
            kept = (value,) if _keeps(producer, scheme) else ()
            return *scheme.quantize(value, **rest), *kept, *residual

        label = _label(name, constants, weight_dtype)
        if parameters in scheme.also:
            label += ", " + ", ".join(f"{parameters[p].dtype} {p}" for p in parameters)
        patterns.append(Pattern(fn, inputs, constants, label))
    return patterns


def _keeps(producer: Producer, scheme: Scheme) -> bool:
    """Whether what is quantized may be an output besides."""
    return producer.weight and scheme.name in KEPT


def _read_elsewhere(match: Match, value: fx.Node) -> bool:
    others = [output for output in match.outputs if output is not value]
    return any(node is value for node, _ in escapes(match.nodes.values(), others))


def _rewrite(m: Rewrite, producer: Producer, scheme: Scheme, name: str) -> tuple[fx.Node, ...]:
    rest = [
        m.size(n)
        if isinstance(scheme.inputs[n], SizeOf)
        else m.tensor(n)
        if n in m.match.captured
        else None
        for n in scheme.arguments
    ]
    arithmetic = m.match.arithmetic
    assert arithmetic is not None
    keywords = dict(m.constants) | scheme.keywords(m) | arithmetic.arguments(*scheme.rounding)
    value = m.match.outputs[scheme.outputs] if _keeps(producer, scheme) else None
    kept = value is not None and _read_elsewhere(m.match, value)
    if kept:
        name = f"{producer.name}_and_{scheme.name}"
    node = m.call(name, *_arguments(m, producer), *rest, **keywords)
    count = scheme.outputs + kept + producer.residual
    made = m.outputs_of(node, count) if count > 1 else (node,)
    if value is None or kept:
        return made
    # nobody reads it: it stays what it is, for the pass to erase
    return (*made[: scheme.outputs], value, *made[scheme.outputs :])


def scale_layout(match: Match) -> str:
    """The layout for the quantization's scales: the GEMM's when only block-scaled GEMMs read them, else row-major."""
    scale = match.outputs[1]
    gemm = custom_ops.ops()["block_scaled_mm"].overload
    reading = list(readers(scale))
    if reading and all(reader.target is gemm for reader in reading):
        return custom_ops.gemm.preferred_scale_layout(match.device)
    return "row_major"


# ---- schemes ------------------------------------------------------------------------------------------------------


def _codes(values: T, scale: T) -> T:
    return (values.float() / scale).clamp(-MAX[FP8], MAX[FP8]).to(FP8)


def _scale(amax: T, min_amax: float) -> T:
    amax = amax.clamp(min=min_amax)
    return amax / amax.new_full((), MAX[FP8])


def _group_quant(x: T, group_size: int, min_amax: float) -> tuple[T, T]:
    groups = x.float().unflatten(-1, (-1, group_size))
    scale = _scale(groups.abs().amax(-1, keepdim=True), min_amax)
    return _codes(groups, scale).flatten(-2), scale.squeeze(-1)


def _token_quant(x: T, min_amax: float) -> tuple[T, T]:
    scale = _scale(x.float().abs().amax(-1, keepdim=True), min_amax)
    return _codes(x, scale), scale


def _tensor_quant(x: T, min_amax: float) -> tuple[T, T]:
    scale = _scale(x.float().abs().amax(), min_amax)
    return _codes(x, scale), scale


def _tensor_quant_static(x: T, scale: T) -> tuple[T]:
    return (_codes(x, scale),)


def _tensor_quant_static_asymmetric(x: T, scale: T, zero_point: T | None = None) -> tuple[T]:
    codes = torch.round(x.float() / scale)
    codes = codes if zero_point is None else codes + zero_point
    return (
        codes.clamp(asymmetric_quantizations.LEAST, asymmetric_quantizations.MOST).to(torch.int8),
    )


def _given(zero_point: torch.dtype) -> dict[str, Any]:
    return {
        "scale": Tensor("1", dtype=torch.float32),
        "zero_point": Tensor("1", dtype=zero_point),
    }


_ASYMMETRIC = asymmetric_quantizations.Asymmetric(bounded=False, zero_point=torch.int8)


def _is_whole_row(match: Match) -> bool:
    return match.sizes["num_groups"] == 1


_SUPPORTED_GROUPS = Constraint(
    holds=lambda match: match.sizes["group_size"] in GROUP_SIZES,
    reason=lambda match: (
        "" if _is_whole_row(match)  # one group a token: the subject of token_quant
        else f"groups of {match.sizes['group_size']}; supported: {', '.join(map(str, GROUP_SIZES))}"
    ),
)  # fmt: skip
FINITE_MIN_AMAX = Constraint(
    holds=lambda match: (
        isinstance(match.scalars["min_amax"], (int, float)) and match.scalars["min_amax"] >= 0
    ),
    reason=lambda match: (
        f"the lower bound of the largest magnitude is {match.scalars['min_amax']}, not a number >= 0"
    ),
)


def _min_amax(m: Rewrite) -> dict[str, Any]:
    return {"min_amax": m.scalar("min_amax")}


GROUP_QUANT = Scheme(
    "group_quant",
    "num_groups*group_size",
    {"group_size": SizeOf("group_size"), "min_amax": Scalar()},
    _group_quant,
    lambda m: {"scale_layout": scale_layout(m.match), **_min_amax(m)},
    needs="group_quant",
    constraints=(_SUPPORTED_GROUPS, FINITE_MIN_AMAX),
    arguments=("group_size",),
    scales="4*num_tokens*num_groups",
)
TOKEN_QUANT = Scheme(
    "token_quant",
    "hidden_size",
    {"min_amax": Scalar()},
    _token_quant,
    _min_amax,
    needs="group_quant",
    constraints=(FINITE_MIN_AMAX,),
    scales="4*num_tokens",
)
TENSOR_QUANT = Scheme(
    "tensor_quant",
    "hidden_size",
    {"min_amax": Scalar()},
    _tensor_quant,
    _min_amax,
    needs="tensor_quant",
    constraints=(FINITE_MIN_AMAX,),
    twice=True,
    scales="4",
)
TENSOR_QUANT_STATIC = Scheme(
    "tensor_quant_static",
    "hidden_size",
    {"scale": Tensor("1", dtype=torch.float32)},
    _tensor_quant_static,
    lambda m: {},
    needs="tensor_quant_static",
    arguments=("scale",),
    scales="4",
    outputs=1,
    rounding=("dtype", "code_mode"),  # a given scale is as it is
)
TENSOR_QUANT_ASYMMETRIC = Scheme(
    "tensor_quant_asymmetric",
    "hidden_size",
    {},
    functools.partial(_ASYMMETRIC.quantize, dims=asymmetric_quantizations.TENSOR),
    lambda m: {},
    needs="tensor_quant_asymmetric",
    twice=True,
    scales="5",
    outputs=3,
    rounding=("scale_mode", "code_mode", "min_scale"),
)
TENSOR_QUANT_STATIC_ASYMMETRIC = Scheme(
    "tensor_quant_static_asymmetric",
    "hidden_size",
    _given(torch.int8),
    _tensor_quant_static_asymmetric,
    lambda m: {},
    needs="tensor_quant_static_asymmetric",
    arguments=("scale", "zero_point"),
    scales="8",
    outputs=1,
    rounding=("code_mode",),
    also=(_given(torch.int32), {"scale": Tensor("1", dtype=torch.float32)}),
)
TOKEN_QUANT_ASYMMETRIC = Scheme(
    "token_quant_asymmetric",
    "hidden_size",
    {},
    _ASYMMETRIC.quantize,
    lambda m: {},
    needs="token_quant_asymmetric",
    scales="5*num_tokens",
    outputs=3,
    rounding=("scale_mode", "code_mode", "min_scale"),  # its codes are always int8
)


# ---- producers ----------------------------------------------------------------------------------------------------


def _norms(add: bool) -> tuple[tuple[Callable[..., Any], torch.dtype | None, dict[str, Any]], ...]:
    """A spelling for each meaning of a norm: its roundings, and the dtype of its weight."""
    found: dict[tuple[str, Any], tuple[Callable[..., Any], torch.dtype | None, dict[str, Any]]] = {}
    for pattern in meanings.NORMS:
        mode, dtype = pattern.constants["weight_mode"], pattern.inputs["weight"].dtype  # type: ignore[union-attr]
        spelling = _after_addition(pattern.fn) if add else pattern.fn
        found.setdefault((mode, dtype), (spelling, dtype, {"weight_mode": mode}))
    return tuple(found.values())


def _after_addition(norm: Callable[..., T]) -> Callable[..., tuple[T, T]]:
    def spelling(x: T, residual: T, weight: T, eps: float) -> tuple[T, T]:
        total = (
            x + residual
        )  # rounded before the norm reads it, as eager does; live or dead after it
        return norm(total, weight, eps), total

    return spelling


def _gated(name: str, activation: Callable[[T], T]) -> Producer:
    return Producer(name, ("gate", "up"), ((lambda gate, up: activation(gate) * up, None, {}),))


_VALUES = Producer("", ("x",), ((lambda x: x, None, {}),))
RMS_NORM = Producer("rms_norm", ("x",), _norms(add=False), weight=True, numbers=("eps",))
ADD_RMS_NORM = Producer(
    "add_rms_norm",
    ("x", "residual"),
    _norms(add=True),
    weight=True,
    numbers=("eps",),
    residual=True,
)
SILU_MUL = _gated("silu_mul", F.silu)
CLAMPED_SWIGLU = Producer(
    "clamped_swiglu",
    ("gate", "up"),
    (
        (
            lambda gate, up, alpha, limit: meanings.clamped_swiglu_as_spelt(
                gate, up, alpha, limit, -limit
            ),
            None,
            {},
        ),
    ),
    numbers=("alpha", "limit"),
)
GELU_TANH_MUL = _gated("gelu_tanh_mul", lambda gate: F.gelu(gate, approximate="tanh"))
