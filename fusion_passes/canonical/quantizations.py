"""Quantizations, in every spelling that real graphs showed, each with the arithmetic that it is.

    float, abs, amax, clamp, div, div, clamp, cast   ->   group_quant(x, group_size, min_amax, arithmetic)

One token is one group where the group is the whole row. Sources of the spellings: torchao 0.17 (Float8 and Int8
dynamic activations), the quantization of DeepSeek-V3 in plain PyTorch, and model code on the Hugging Face hub.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor as T
from torch import fx

import custom_ops
from fusion_passes import index_map
from fusion_passes.arithmetic import MAX, Arithmetic
from fusion_passes.canonical.marks import meaning
from fusion_passes.fusion import Constraint, Fusion, Pattern, Scalar, SizeOf, Tensor
from fusion_passes.matching import Match
from fusion_passes.operations import shape_of
from fusion_passes.rewriting import Rewrite

FP8, INT8 = torch.float8_e4m3fn, torch.int8


def _fake_group_quant(
    x: T, group_size: int, min_amax: float, arithmetic: Arithmetic
) -> tuple[T, T]:
    q = torch.empty(x.shape, dtype=arithmetic.dtype, device=x.device)
    groups = (*x.shape[:-1], x.shape[-1] // group_size)
    return q, torch.empty(groups, dtype=torch.float32, device=x.device)


@meaning("rowwise", _fake_group_quant)
def group_quant(x: T, group_size: int, min_amax: float, arithmetic: Arithmetic) -> tuple[T, T]:
    return _reference("group_quant", arithmetic, x, group_size, min_amax=float(min_amax))


def _fake_tensor_quant(x: T, min_amax: float, arithmetic: Arithmetic) -> tuple[T, T]:
    q = torch.empty(x.shape, dtype=arithmetic.dtype, device=x.device)
    return q, torch.empty(1, dtype=torch.float32, device=x.device)


@meaning("rowwise", _fake_tensor_quant)
def tensor_quant(x: T, min_amax: float, arithmetic: Arithmetic) -> tuple[T, T]:
    return _reference("tensor_quant", arithmetic, x, min_amax=float(min_amax))


def _fake_tensor_quant_static(x: T, scale: T, arithmetic: Arithmetic) -> T:
    return torch.empty(x.shape, dtype=arithmetic.dtype, device=x.device)


@meaning("rowwise", _fake_tensor_quant_static)
def tensor_quant_static(x: T, scale: T, arithmetic: Arithmetic) -> T:
    return _reference("tensor_quant_static", arithmetic, x, scale)


def _reference(op: str, arithmetic: Arithmetic, *args: Any, **kwargs: Any) -> Any:
    declared = custom_ops.ops()[op]
    return declared.reference(*args, **declared.defaults | kwargs | arithmetic.arguments())


class Spelling(NamedTuple):
    """One way to write a dynamic symmetric quantization.

    bound: what has a lower bound: "" nothing, "amax" or "scale". cast: where values become float32 on the way to the
    largest magnitude, which is the same number: "first", "after abs" or "after amax". by: what makes the scale: a
    division by a "number", which eager on a GPU turns into a product, or by a "tensor" of no dimensions, or a product
    with the "reciprocal". input_scale: the scale is rounded to the dtype of the input. inverse: values are multiplied
    by the scale's reciprocal. clamp_codes: before the cast (the codes are the same without: none rounds beyond the
    end).
    """

    dtype: torch.dtype
    bound: str = ""
    cast: str = "first"
    by: str = "number"
    input_scale: bool = False
    inverse: bool = False
    clamp_codes: bool = True

    def __str__(self) -> str:
        said = {
            str(self.dtype).removeprefix("torch."): True,
            f"clamped {self.bound}": bool(self.bound),
            f"cast {self.cast}": self.cast != "first",
            f"by {self.by}": self.by != "number",
            "16-bit scale": self.input_scale,
            "multiplied by the reciprocal": self.inverse,
            "unclamped codes": not self.clamp_codes,
        }
        return ", ".join(word for word, on in said.items() if on)

    def arithmetic(self, match: Match) -> Arithmetic:
        """What it computes on the device of the match."""
        # eager on a GPU divides by a number as it multiplies by the rounded reciprocal: the scales are one rounding off
        # then, and as 16-bit values over one another often lie on a tie, one code in a thousand
        divides = self.by == "tensor" or (self.by == "number" and match.device.type == "cpu")
        scale_mode = ("divide" if divides else "reciprocal") + "_input" * self.input_scale
        code_mode = "reciprocal" if self.inverse else "divide"
        bound = match.scalars["bound"] if self.bound == "scale" else 0.0
        assert isinstance(bound, (int, float))
        return Arithmetic(self.dtype, scale_mode, code_mode, float(bound))

    def quantize(self, x: T, amax: T, bound: float, lower: float, upper: float) -> tuple[T, T]:
        """Codes and scale of x in plain PyTorch, given the largest magnitudes before any bound."""
        amax = amax.clamp(min=bound) if self.bound == "amax" else amax
        largest = MAX[self.dtype]
        if self.by == "reciprocal":
            scale = (amax * (1.0 / largest)).float()
        else:
            scale = (
                amax / (amax.new_full((), largest) if self.by == "tensor" else largest)
            ).float()
        scale = scale.clamp(min=bound) if self.bound == "scale" else scale
        return self.codes(x, scale, lower, upper), scale

    def codes(self, x: T, scale: T, lower: float, upper: float) -> T:
        codes = x.float() * (1.0 / scale) if self.inverse else x.float() / scale
        codes = codes.round() if self.dtype is INT8 else codes
        codes = codes.clamp(lower, upper) if self.clamp_codes else codes
        return codes.to(self.dtype)

    def largest(self, x: T, dims: int | None) -> T:
        """The largest magnitude over a dimension that is kept, or over everything."""
        magnitudes = x.float().abs() if self.cast == "first" else x.abs()
        magnitudes = magnitudes.float() if self.cast == "after abs" else magnitudes
        amax = magnitudes.amax() if dims is None else magnitudes.amax(dims, keepdim=True)
        return amax if self.input_scale else amax.float()

    def inputs(self, x: Tensor, **more: Any) -> dict[str, Any]:
        bound = {"bound": Scalar()} if self.bound else {}
        clamp = {"lower": Scalar(), "upper": Scalar()} if self.clamp_codes else {}
        return {"x": x, **more, **bound, **clamp}


class Int8InInputDtype:
    """torchao's int8 dynamic quantization per token, whose every step is rounded to the dtype of the input.

    The largest magnitude is written as that of an asymmetric one would be, with a zero point of 0.
    """

    bound = "scale"

    def __str__(self) -> str:
        return "int8, rounded to 16 bits throughout"

    def arithmetic(self, match: Match) -> Arithmetic:
        scale_mode = "divide_input" if match.device.type == "cpu" else "reciprocal_input"
        bound = match.scalars["bound"]
        assert isinstance(bound, (int, float))
        return Arithmetic(INT8, scale_mode, "reciprocal_input", float(bound))

    def quantize(self, x: T, bound: float, lower: float, upper: float) -> tuple[T, T]:
        zeros = torch.zeros(x.shape[:-1], dtype=x.dtype, device=x.device)
        smallest = torch.minimum(x.amin(-1), zeros)
        largest = torch.maximum(x.amax(-1), zeros)
        scale = torch.maximum(-smallest, largest) / MAX[INT8]
        scale = scale.float().clamp(min=bound).to(x.dtype).unsqueeze(-1)
        codes = (x * (1.0 / scale)).round() + zeros.unsqueeze(-1)
        return codes.float().clamp(lower, upper).to(x.dtype).to(INT8), scale

    def inputs(self, x: Tensor) -> dict[str, Any]:
        return {"x": x, "bound": Scalar(), "lower": Scalar(), "upper": Scalar()}


def _spellings() -> list[Spelling]:
    """All of them, the usual ones first, as a pattern is traced when its turn comes."""
    usual = Spelling(FP8, "amax")
    every = [
        Spelling(dtype, bound, cast, by, False, inverse, clamp)
        for dtype, bound, cast, by, inverse, clamp in itertools.product(
            (FP8, INT8),
            ("amax", "", "scale"),
            ("first", "after abs", "after amax"),
            ("number", "tensor", "reciprocal"),
            (False, True),
            (True, False),
        )
    ]
    every.sort(key=lambda spelling: sum(a != b for a, b in zip(spelling, usual, strict=True)))
    # torchao's float8: the largest magnitude of 16-bit values is a 16-bit value, and so is the scale
    return [Spelling(FP8, cast="after amax", input_scale=True), *every]


_ROWS = Tensor("num_tokens", "hidden_size")
_GROUPS = Tensor("num_tokens", "num_groups * group_size")


def _group_pattern(spelling: Spelling) -> Pattern:
    def fn(
        x: T, group_size: int, bound: float = 0.0, lower: float = 0.0, upper: float = 0.0
    ) -> Any:
        groups = x.unflatten(-1, (-1, group_size))
        return spelling.quantize(groups, spelling.largest(groups, -1), bound, lower, upper)

    inputs = spelling.inputs(_GROUPS, group_size=SizeOf("group_size"))
    return Pattern(fn, inputs, {"spelling": spelling, "kind": "group"}, f"per group, {spelling}")


def _tensor_pattern(spelling: Spelling) -> Pattern:
    def fn(x: T, bound: float = 0.0, lower: float = 0.0, upper: float = 0.0) -> Any:
        return spelling.quantize(x, spelling.largest(x, None), bound, lower, upper)

    constants = {"spelling": spelling, "kind": "tensor"}
    return Pattern(fn, spelling.inputs(_ROWS), constants, f"per tensor, {spelling}")


def _static_pattern(spelling: Spelling) -> Pattern:
    def fn(x: T, scale: T, lower: float = 0.0, upper: float = 0.0) -> T:
        return spelling.codes(x, scale, lower, upper)

    inputs = spelling.inputs(_ROWS, scale=Tensor("1", dtype=torch.float32))
    return Pattern(
        fn, inputs, {"spelling": spelling, "kind": "static"}, f"by a given scale, {spelling}"
    )


def _torchao_int8() -> Pattern:
    spelling = Int8InInputDtype()

    def fn(x: T, group_size: int, bound: float, lower: float, upper: float) -> Any:
        return spelling.quantize(x.unflatten(-1, (-1, group_size)), bound, lower, upper)

    inputs = {**spelling.inputs(_GROUPS), "group_size": SizeOf("group_size")}
    return Pattern(fn, inputs, {"spelling": spelling, "kind": "group"}, f"per group, {spelling}")


def _rewrite_group(m: Rewrite) -> tuple[Any, ...]:
    spelling = m.constants["spelling"]
    arguments = (_min_amax(m), spelling.arithmetic(m.match))
    return _as_spelt(m, m.emit(group_quant, m.tensor("x"), m.size("group_size"), *arguments))


def _rewrite_tensor(m: Rewrite) -> tuple[Any, ...]:
    spelling = m.constants["spelling"]
    arguments = (_min_amax(m), spelling.arithmetic(m.match))
    if m.size("num_tokens") == 1:  # the whole of one token: the same, and one pass for a kernel
        node = m.emit(group_quant, m.tensor("x"), m.size("hidden_size"), *arguments)
    else:
        node = m.emit(tensor_quant, m.tensor("x"), *arguments)
    return _as_spelt(m, node)


def _min_amax(m: Rewrite) -> Any:
    return m.match.scalars["bound"] if m.constants["spelling"].bound == "amax" else 0.0


def _as_spelt(m: Rewrite, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Codes and scale in the dtype that the graph has them in: a scale of 16 bits is exact in float32 and back."""
    codes, scale = m.outputs_of(node, 2)
    dtype = m.match.outputs[1].meta["val"].dtype
    return codes, scale if dtype is torch.float32 else m.cast(scale, dtype)


def _rewrite_static(m: Rewrite) -> tuple[Any, ...]:
    arithmetic = m.constants["spelling"].arithmetic(m.match)
    return (m.emit(tensor_quant_static, m.tensor("x"), m.tensor("scale"), arithmetic),)


def _known_bounds(match: Match) -> bool:
    names = [name for name in match.scalars if name != "bound"]
    if match.constants["spelling"].bound == "scale":
        names.append("bound")
    return all(isinstance(match.scalars[name], (int, float)) for name in names)


def _whole_range(match: Match) -> bool:
    end = MAX[match.outputs[0].meta["val"].dtype]
    lower, upper = match.scalars.get("lower"), match.scalars.get("upper")
    if match.constants["kind"] == "static":  # what is beyond is saturated, so the ends matter
        return (lower, upper) == (-end, end)
    # a dynamic scale leaves nothing beyond the range of the codes
    return lower is None or (lower <= -end and upper is not None and upper >= end)


def _within_tokens(match: Match) -> bool:
    group = match.sizes.get("group_size")
    if match.constants["kind"] != "group" or group is None:
        return True
    return any(
        index_map.divide(shape_of(node)[-1], group) is not None
        for node, *_ in match.captured["x"]
        if node.meta["val"].dim()
    )


_CONSTRAINTS = (
    Constraint(_within_tokens, lambda match: "one group spans several tokens"),
    Constraint(
        _known_bounds,
        lambda match: "a bound of its codes or of its scale is known only at run time",
    ),
    Constraint(
        _whole_range,
        lambda match: (
            f"its codes are clamped to {match.scalars.get('lower')} .. {match.scalars.get('upper')}, "
            f"not to +-{MAX[match.outputs[0].meta['val'].dtype]}"
        ),
    ),
)
DYNAMIC = Fusion(
    "quantization",
    "Dynamic quantization to 8 bits, per group, token or tensor",
    0,
    patterns=(
        _torchao_int8(),
        # per tensor first: over several tokens it is also one group of one long token
        *(of(spelling) for spelling in _spellings() for of in (_tensor_pattern, _group_pattern)),
    ),
    rewrite=lambda m: (_rewrite_tensor if m.constants["kind"] == "tensor" else _rewrite_group)(m),
    constraints=_CONSTRAINTS,
    signature="cast",
    exclusive=True,
)
STATIC = Fusion(  # after the dynamic ones, which end in the same
    "static_quantization",
    "Quantization to 8 bits by a given scale",
    0,
    patterns=tuple(
        _static_pattern(Spelling(dtype, inverse=inverse))
        for dtype in (FP8, INT8)
        for inverse in (False, True)
    ),
    rewrite=_rewrite_static,
    constraints=_CONSTRAINTS,
    signature="cast",
    exclusive=True,
)
