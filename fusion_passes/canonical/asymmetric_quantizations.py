"""Quantization to int8 with a zero point per token, in the spellings that real graphs showed.

    amin, amax, clamp, sub, div, clamp, div, round, sub, ..., cast   ->   token_quant_asymmetric(x, arithmetic)

Sources: torchao 0.17 (Int8 dynamic activations with MappingType.ASYMMETRIC, every step of which is rounded to the dtype
of the input; in version 1 of its configuration all but the codes) and model code in float32. What compressed-tensors
runs in transformers is none of these: it never makes int8, and dequantizes what it has rounded.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor as T

import custom_ops
from fusion_passes.arithmetic import Arithmetic
from fusion_passes.canonical import casts
from fusion_passes.canonical.marks import meaning
from fusion_passes.fusion import Constraint, Fusion, Pattern, Scalar, Tensor
from fusion_passes.matching import Match
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


def keywords(arithmetic: Arithmetic) -> dict[str, Any]:
    """The arguments of the op: its codes are always int8."""
    return arithmetic.arguments("scale_mode", "code_mode", "min_scale")


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

    def quantize(self, x: T, bound: float = 0.0) -> tuple[T, T, T]:
        # a cast for each reader: code that has one for all of them has the same node three times
        low, high = x.float().amin(-1, keepdim=True), x.float().amax(-1, keepdim=True)
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

    def quantize(self, x: T, bound: float) -> tuple[T, T, T]:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
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


def _pattern(spelling: Asymmetric | AsymmetricInInputDtype) -> Pattern:
    inputs: dict[str, Any] = {"x": Tensor("num_tokens", "hidden_size")}
    if spelling.bounded:
        inputs["bound"] = Scalar()
    return Pattern(spelling.quantize, inputs, {"spelling": spelling}, f"per token, {spelling}")


def _rewrite(m: Rewrite) -> tuple[Any, ...]:
    arithmetic = m.constants["spelling"].arithmetic(m.match)
    node = m.emit(token_quant_asymmetric, m.tensor("x"), arithmetic)
    made = zip(m.outputs_of(node, 3), m.match.outputs, strict=True)
    # a scale of 16 bits is exact in float32 and back, and so is a zero point in any dtype
    dtypes = [(result, output.meta["val"].dtype) for result, output in made]
    return tuple(
        r if r.meta["val"].dtype is dtype else casts.lossless(m.cast(r, dtype))
        for r, dtype in dtypes
    )


ASYMMETRIC = Fusion(
    "asymmetric_quantization",
    "Dynamic quantization to int8 with a zero point per token",
    0,
    patterns=(
        _pattern(AsymmetricInInputDtype()),
        _pattern(AsymmetricInInputDtype(wide=True)),
        *(
            _pattern(Asymmetric(bounded, by, inverse, ends, zero_point))
            for zero_point, bounded, by, inverse, ends in itertools.product(
                (torch.float32, torch.int8),
                (True, False),
                ("number", "tensor"),
                (False, True),
                ("clamp", "minimum"),
            )
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
