"""Quantization to int8 with a zero point per token or tensor, in the spellings that real graphs showed.

    amin, amax, clamp, sub, div, clamp, div, round, sub, ..., cast   ->   token_quant_asymmetric(x, arithmetic)
    reciprocal, mul, round, add, clamp, cast   ->   tensor_quant_static_asymmetric(x, scale, zero_point, arithmetic)

Sources: torchao 0.17 and 0.18 (Int8 dynamic activations with MappingType.ASYMMETRIC, every step of which is rounded to
the dtype of the input; in version 1 of its configuration all but the codes; and static ones, in float32) and model code
in float32. What compressed-tensors runs in transformers is none of these: it never makes int8, and dequantizes what it
has rounded.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor as T

import custom_ops
from fusion_passes.arithmetic import Arithmetic
from fusion_passes.canonical import casts
from fusion_passes.canonical.marks import meaning
from fusion_passes.canonical.spellings import Spelling
from fusion_passes.fusion import Constraint, Fusion, Pattern, Scalar, Tensor
from fusion_passes.matching import Match
from fusion_passes.operations import shape_of
from fusion_passes.rewriting import Rewrite

LEAST, MOST = -128, 127


def _fake(x: T, arithmetic: Arithmetic) -> tuple[T, T, T]:
    tokens = (*x.shape[:-1], 1)
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(tokens, dtype=torch.float32, device=x.device),
        torch.empty(tokens, dtype=torch.int8, device=x.device),
    )


@meaning("rowwise", _fake)
def token_quant_asymmetric(x: T, arithmetic: Arithmetic) -> tuple[T, T, T]:
    op = custom_ops.ops()["token_quant_asymmetric"]
    return op.reference(x, **op.defaults | keywords(arithmetic))


def _fake_tensor(x: T, arithmetic: Arithmetic) -> tuple[T, T, T]:
    return (
        torch.empty(x.shape, dtype=torch.int8, device=x.device),
        torch.empty(1, dtype=torch.float32, device=x.device),
        torch.empty(1, dtype=torch.int8, device=x.device),
    )


@meaning("rowwise", _fake_tensor)
def tensor_quant_asymmetric(x: T, arithmetic: Arithmetic) -> tuple[T, T, T]:
    op = custom_ops.ops()["tensor_quant_asymmetric"]
    return op.reference(x, **op.defaults | keywords(arithmetic))


def _fake_static(x: T, scale: T, zero_point: T | None, arithmetic: Arithmetic) -> T:
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@meaning("rowwise", _fake_static)
def tensor_quant_static_asymmetric(
    x: T, scale: T, zero_point: T | None, arithmetic: Arithmetic
) -> T:
    op = custom_ops.ops()["tensor_quant_static_asymmetric"]
    return op.reference(x, scale, zero_point, **op.defaults | arithmetic.arguments("code_mode"))


def keywords(arithmetic: Arithmetic) -> dict[str, Any]:
    """The arguments of the op: its codes are always int8."""
    return arithmetic.arguments("scale_mode", "code_mode", "min_scale")


TOKEN, TENSOR = -1, (0, 1)
"""The dimensions of [tokens, channels] that share a scale."""


class Asymmetric(NamedTuple):
    """One way to write it in float32.

    bounded: whether the scale has a lower bound. by: 255 as a "number", which eager on a GPU turns into a product, or
    as a "tensor". inverse: values are multiplied by the scale's reciprocal. ends: what brings 0 into the range, "clamp"
    or "minimum" and maximum with zeros. zero_point: the dtype of the one that the codes are made with; one in another
    dtype may be made of it.
    """

    bounded: bool = True
    by: str = "number"
    inverse: bool = False
    ends: str = "clamp"
    zero_point: torch.dtype = torch.float32

    def __str__(self) -> str:
        said = {
            "int8": True,
            "clamped scale": self.bounded,
            f"by {self.by}": self.by != "number",
            "multiplied by the reciprocal": self.inverse,
            self.ends: self.ends != "clamp",
            f"{str(self.zero_point).removeprefix('torch.')} zero point": True,
        }
        return ", ".join(word for word, on in said.items() if on)

    def arithmetic(self, match: Match) -> Arithmetic:
        divides = self.by == "tensor" or match.device.type == "cpu"
        return Arithmetic(
            torch.int8,
            "divide" if divides else "reciprocal",
            "reciprocal" if self.inverse else "divide",
            _bound(match) if self.bounded else 0.0,
        )

    def quantize(
        self, x: T, bound: float = 0.0, dims: int | tuple[int, ...] = TOKEN
    ) -> tuple[T, T, T]:
        # a cast for each reader: code that has one for all of them has the same node three times
        low, high = x.float().amin(dims, keepdim=True), x.float().amax(dims, keepdim=True)
        if self.ends == "clamp":
            low, high = low.clamp(max=0), high.clamp(min=0)
        else:
            zeros = torch.zeros_like(low)
            low, high = torch.minimum(low, zeros), torch.maximum(high, zeros)
        extent = high - low
        scale = extent / (extent.new_full((), 255.0) if self.by == "tensor" else 255.0)
        scale = scale.clamp(min=bound) if self.bounded else scale
        zero = (LEAST - torch.round(low / scale)).clamp(LEAST, MOST)
        zero = zero.to(self.zero_point)
        values = x.float() * (1.0 / scale) if self.inverse else x.float() / scale
        codes = (torch.round(values) + zero).clamp(LEAST, MOST)
        return codes.to(torch.int8), scale, zero


class AsymmetricInInputDtype(NamedTuple):
    """torchao's, whose every step is rounded to the dtype of the input; with `wide`, all but those of the codes."""

    wide: bool = False

    @property
    def bounded(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"int8, rounded to 16 bits {'up to its scale' if self.wide else 'throughout'}"

    def arithmetic(self, match: Match) -> Arithmetic:
        scale_mode = "divide_input" if match.device.type == "cpu" else "reciprocal_input"
        code_mode = "reciprocal" if self.wide else "reciprocal_input"
        return Arithmetic(torch.int8, scale_mode, code_mode, _bound(match))

    def quantize(self, x: T, bound: float, dims: int | tuple[int, ...] = TOKEN) -> tuple[T, T, T]:
        low, high = x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)
        zeros = torch.zeros_like(low)
        low, high = torch.minimum(low, zeros), torch.maximum(high, zeros)
        scale = ((high - low) / 255.0).float().clamp(min=bound).to(x.dtype)
        zero = (LEAST - torch.round(low / scale)).float().clamp(LEAST, MOST).to(x.dtype)
        zero_point = zero.to(torch.int8)
        if self.wide:
            scale = scale.float()
            codes = (torch.round(x * (1.0 / scale)) + zero_point).clamp(LEAST, MOST)
        else:
            codes = torch.round(x * (1.0 / scale)) + zero_point
            codes = codes.float().clamp(LEAST, MOST).to(x.dtype)
        return codes.to(torch.int8), scale, zero_point


def _bound(match: Match) -> float:
    bound = match.scalars["bound"]
    assert isinstance(bound, (int, float))
    return float(bound)


def _patterns(spelling: Asymmetric | AsymmetricInInputDtype) -> list[Pattern]:
    """Per tensor first: over several tokens it is also one long token."""
    inputs: dict[str, Any] = {"x": Tensor("num_tokens", "hidden_size")}
    if spelling.bounded:
        inputs["bound"] = Scalar()
    return [
        Pattern(
            functools.partial(spelling.quantize, dims=dims),
            inputs,
            {"spelling": spelling, "dims": dims},
            f"per {kind}, {spelling}",
        )
        for kind, dims in (("tensor", TENSOR), ("token", TOKEN))
    ]


def static_patterns(spelling: Spelling) -> list[Pattern]:
    """By a given scale and zero point, which the addition widens, or a cast before it."""

    def pattern(dtype: torch.dtype, cast: bool) -> Pattern:
        def fn(x: T, scale: T, zero_point: T, lower: float, upper: float) -> T:
            values = x.float() * (1.0 / scale) if spelling.inverse else x.float() / scale
            codes = torch.round(values) + (zero_point.float() if cast else zero_point)
            return codes.clamp(lower, upper).to(torch.int8)

        inputs: dict[str, Any] = {
            "x": Tensor("num_tokens", "hidden_size"),
            "scale": Tensor("1", dtype=torch.float32),
            "zero_point": Tensor("1", dtype=dtype),
            "lower": Scalar(),
            "upper": Scalar(),
        }
        name = f"by a given scale and {str(dtype).removeprefix('torch.')} zero point, {spelling}"
        constants = {"spelling": spelling, "kind": "static asymmetric"}
        return Pattern(fn, inputs, constants, name + ", cast zero point" * cast)

    return [pattern(dtype, cast) for cast in (False, True) for dtype in (torch.int8, torch.int32)]


def _rewrite(m: Rewrite) -> tuple[Any, ...]:
    arithmetic = m.constants["spelling"].arithmetic(m.match)
    # the whole of one token: the same, and one pass for a kernel
    per_tensor = m.constants["dims"] == TENSOR and m.size("num_tokens") != 1
    quantize = tensor_quant_asymmetric if per_tensor else token_quant_asymmetric
    node = m.emit(quantize, m.tensor("x"), arithmetic)
    made = zip(m.outputs_of(node, 3), m.match.outputs, strict=True)
    # a scale of 16 bits is exact in float32 and back, and so is a zero point in any dtype
    dtypes = [
        (m.view(result, shape_of(output)), output.meta["val"].dtype) for result, output in made
    ]
    return tuple(
        r if r.meta["val"].dtype is dtype else casts.lossless(m.cast(r, dtype))
        for r, dtype in dtypes
    )


ASYMMETRIC = Fusion(
    "asymmetric_quantization",
    "Dynamic quantization to int8 with a zero point per token or tensor",
    0,
    patterns=(
        *_patterns(AsymmetricInInputDtype()),
        *_patterns(AsymmetricInInputDtype(wide=True)),
        *(
            pattern
            for zero_point, bounded, by, inverse, ends in itertools.product(
                (torch.float32, torch.int8),
                (True, False),
                ("number", "tensor"),
                (False, True),
                ("clamp", "minimum"),
            )
            for pattern in _patterns(Asymmetric(bounded, by, inverse, ends, zero_point))
        ),
    ),
    rewrite=_rewrite,
    constraints=(
        Constraint(
            lambda match: isinstance(match.scalars.get("bound", 0.0), (int, float)),
            lambda match: "the lower bound of its scale is known only at run time",
        ),
    ),
    signature="amin aten.round.default",
)
