"""The ways in which a dynamic symmetric quantization is written, each with the arithmetic that it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor as T

from fusion_passes.arithmetic import MAX, Arithmetic
from fusion_passes.fusion import Scalar, Tensor
from fusion_passes.matching import Match

FP8, INT8 = torch.float8_e4m3fn, torch.int8


class Spelling(NamedTuple):
    """One way to write a dynamic symmetric quantization.

    bound: what has a lower bound: "" nothing, "amax" or "scale"; "or one": nothing, but what is not above 0 counts as
    1. cast: where values become float32 on the way to the largest magnitude, which is the same number: "first", "after
    abs" or "after amax". by: what makes the scale: a division by a "number", which eager on a GPU turns into a product,
    or by a "tensor" of no dimensions, or a product with the "reciprocal". input_scale: the scale is rounded to the
    dtype of the input. inverse: values are multiplied by the scale's reciprocal. clamp_codes: before the cast (the
    codes are the same without: none rounds beyond the end). power: the scale is raised to a power of two by "exp2" or
    "pow" of its logarithm rounded up; "" leaves it as it is. Values that a scale of one dimension or more widens are
    found as if they were cast.
    """

    dtype: torch.dtype
    bound: str = ""
    cast: str = "first"
    by: str = "number"
    input_scale: bool = False
    inverse: bool = False
    clamp_codes: bool = True
    power: str = ""

    def __str__(self) -> str:
        said = {
            str(self.dtype).removeprefix("torch."): True,
            "zeros by one" if self.bound == "or one" else f"clamped {self.bound}": bool(self.bound),
            f"cast {self.cast}": self.cast != "first",
            f"by {self.by}": self.by != "number",
            "16-bit scale": self.input_scale,
            "multiplied by the reciprocal": self.inverse,
            "unclamped codes": not self.clamp_codes,
            f"power of two by {self.power}": bool(self.power),
        }
        return ", ".join(word for word, on in said.items() if on)

    @property
    def bounded(self) -> bool:
        """Whether it has a number for a lower bound."""
        return self.bound in ("amax", "scale")

    def arithmetic(self, match: Match) -> Arithmetic:
        """What it computes on the device of the match."""
        # eager on a GPU divides by a number as it multiplies by the rounded reciprocal: the scales are one rounding off
        # then, and as 16-bit values over one another often lie on a tie, one code in a thousand
        divides = self.by == "tensor" or (self.by == "number" and match.device.type == "cpu")
        scale_mode = ("divide" if divides else "reciprocal") + "_input" * self.input_scale
        scale_mode += "_or_one" * (self.bound == "or one")
        code_mode = "reciprocal" if self.inverse else "divide"
        bound = match.scalars["bound"] if self.bound == "scale" else 0.0
        assert isinstance(bound, (int, float))
        scale_format = "ue8m0" if self.power else "float32"
        return Arithmetic(self.dtype, scale_mode, code_mode, float(bound), scale_format)

    def quantize(self, x: T, amax: T, bound: float, lower: float, upper: float) -> tuple[T, T]:
        """Codes and scale of x in plain PyTorch, given the largest magnitudes before any bound."""
        amax = amax.clamp(min=bound) if self.bound == "amax" else amax
        amax = amax.float() if self.cast == AFTER_BOUND else amax
        if self.bound == "or one":
            amax = torch.where(amax > 0, amax, torch.ones_like(amax))
        largest = MAX[self.dtype]
        if self.by == "reciprocal":
            scale = (amax * (1.0 / largest)).float()
        else:
            scale = (
                amax / (amax.new_full((), largest) if self.by == "tensor" else largest)
            ).float()
        scale = scale.clamp(min=bound) if self.bound == "scale" else scale
        if self.power:
            exponent = torch.ceil(torch.log2(scale))
            scale = torch.exp2(exponent) if self.power == "exp2" else torch.pow(2.0, exponent)
        return self.codes(x, scale, lower, upper), scale

    def codes(self, x: T, scale: T, lower: float, upper: float) -> T:
        codes = x.float() * (1.0 / scale) if self.inverse else x.float() / scale
        codes = codes.round() if self.dtype is INT8 else codes
        codes = codes.clamp(lower, upper) if self.clamp_codes else codes
        return codes.to(self.dtype)

    def largest(self, x: T, dims: int | tuple[int, ...] | None) -> T:
        """The largest magnitude over dimensions that are kept, or over everything."""
        magnitudes = x.float().abs() if self.cast == "first" else x.abs()
        magnitudes = magnitudes.float() if self.cast == "after abs" else magnitudes
        amax = magnitudes.amax() if dims is None else magnitudes.amax(dims, keepdim=True)
        return amax if self.input_scale or self.cast == AFTER_BOUND else amax.float()

    def inputs(self, x: Tensor, **more: Any) -> dict[str, Any]:
        bound = {"bound": Scalar()} if self.bounded else {}
        clamp = {"lower": Scalar(), "upper": Scalar()} if self.clamp_codes else {}
        return {"x": x, **more, **bound, **clamp}


class Int8InInputDtype(NamedTuple):
    """torchao's int8 dynamic quantization per token, whose scale is rounded to the dtype of the input at every step.

    The largest magnitude is written as that of an asymmetric one would be, with a zero point of 0. In version 1 of its
    configuration the codes are made in that dtype too; in version 2 (``full``, all that torchao 0.18 has) they are made
    in float32, and go from -128 to 127 by a scale of amax / 127.5.
    """

    full: bool = False

    @property
    def bound(self) -> str:
        return "scale"

    def __str__(self) -> str:
        return "int8, rounded to 16 bits " + ("up to its scale" if self.full else "throughout")

    def arithmetic(self, match: Match) -> Arithmetic:
        scale_mode = "divide" if match.device.type == "cpu" else "reciprocal"
        scale_mode += "_full_input" if self.full else "_input"
        bound = match.scalars["bound"]
        assert isinstance(bound, (int, float))
        code_mode = "reciprocal" if self.full else "reciprocal_input"
        return Arithmetic(INT8, scale_mode, code_mode, float(bound))

    def quantize(self, x: T, bound: float, lower: float, upper: float) -> tuple[T, T]:
        zeros = torch.zeros(x.shape[:-1], dtype=x.dtype, device=x.device)
        smallest = torch.minimum(x.amin(-1), zeros)
        largest = torch.maximum(x.amax(-1), zeros)
        scale = torch.maximum(-smallest, largest) / (127.5 if self.full else MAX[INT8])
        scale = scale.float().clamp(min=bound).to(x.dtype).unsqueeze(-1)
        if self.full:
            scale = scale.float()
            codes = torch.round(x * (1.0 / scale)) + zeros.unsqueeze(-1).to(INT8)
            return codes.clamp(lower, upper).to(INT8), scale
        codes = (x * (1.0 / scale)).round() + zeros.unsqueeze(-1)
        return codes.float().clamp(lower, upper).to(x.dtype).to(INT8), scale

    def inputs(self, x: Tensor) -> dict[str, Any]:
        return {"x": x, "bound": Scalar(), "lower": Scalar(), "upper": Scalar()}


_CASTS = ("first", "after abs", "after amax")
AFTER_BOUND = "after its bound"
"""A cast of the largest magnitude, whose lower bound then is a number of 16 bits."""


def _usual_first(found: Iterable[Spelling], usual: Spelling) -> list[Spelling]:
    """Ordered by how much they differ, as a pattern is traced when its turn comes."""
    return sorted(found, key=lambda one: sum(a != b for a, b in zip(one, usual, strict=True)))


def _every(
    dtypes: Iterable[torch.dtype],
    bounds: Iterable[str],
    casts: Iterable[str] = ("first",),
    by: Iterable[str] = ("number",),
    powers: Iterable[str] = ("",),
) -> list[Spelling]:
    return [
        Spelling(dtype, bound, cast, how, False, inverse, clamp, power)
        for dtype, bound, cast, how, inverse, clamp, power in itertools.product(
            dtypes, bounds, casts, by, (False, True), (True, False), powers
        )
    ]


def symmetric() -> list[Spelling]:
    """Those with float32 scales."""
    bounds = ("amax", "", "scale")
    # torchao's float8: the largest magnitude of 16-bit values is a 16-bit value, and so is the scale
    torchao = Spelling(FP8, cast="after amax", input_scale=True)
    every = _every((FP8, INT8), bounds, _CASTS, ("number", "tensor", "reciprocal"))
    every += _every((FP8, INT8), ("or one",), _CASTS, ("number", "tensor"))
    every += _every((FP8, INT8), ("amax",), (AFTER_BOUND,), ("number", "tensor", "reciprocal"))
    return [torchao, *_usual_first(every, Spelling(FP8, "amax"))]


def powers_of_two() -> list[Spelling]:
    """Those whose scales are powers of two. They are traced all at once, so the unlikely ones are left out."""
    powers, bounds = ("exp2", "pow"), ("amax", "scale")
    every = _every((FP8,), bounds, _CASTS, ("number", "tensor"), powers)
    every += _every((FP8,), ("",), _CASTS, powers=powers)
    return _usual_first(every, Spelling(FP8, "amax", power="exp2"))


def of_blocks() -> list[Spelling]:
    """Those that are written for blocks of a matrix."""
    every = _every((FP8, INT8), ("amax", "scale", ""), _CASTS, ("number", "tensor"))
    return _usual_first(every, Spelling(FP8, "amax"))
