"""An int8 matmul and the scales of its operands become one GEMM: the int32 sums are never written.

    torch._int_mm(q, w8.T) * scale * w_scale [+ bias]      ->   scaled_mm(q, scale, w8, w_scale, bias, epilogue=...)

int8 sums are exact, so that every rounding of eager is kept: with 16-bit scales (Int8DynamicActivationInt8Weight of
torchao 0.17) each product is rounded to 16 bits; with float32 scales the last one only, or each (torchao 0.18).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor as T
from torch import fx

from fusion_passes.arithmetic import Arithmetic
from fusion_passes.fusion import Fusion, Pattern, Tensor
from fusion_passes.operations import describe
from fusion_passes.passes.scaled_linear import FITS_INT32, INT8
from fusion_passes.rewriting import Rewrite


def _each(q: T, scale: T, weight: T, weight_scale: T, bias: T | None = None) -> T:
    out = torch._int_mm(q, weight.t()) * scale * weight_scale
    return out if bias is None else out + bias


def _promoted(q: T, scale: T, weight: T, weight_scale: T, bias: T | None = None) -> T:
    out = _each(q, scale, weight, weight_scale, bias)
    return out.to(torch.bfloat16 if bias is None else bias.dtype)


def _cast(q: T, scale: T, weight: T, weight_scale: T, bias: T | None = None) -> T:
    out = torch._int_mm(q, weight.t()).float() * scale * weight_scale
    return out.to(torch.bfloat16) if bias is None else (out + bias).to(bias.dtype)


def _between(q: T, scale: T, weight: T, weight_scale: T, bias: T | None = None) -> T:
    dtype = torch.bfloat16 if bias is None else bias.dtype
    out = ((torch._int_mm(q, weight.t()) * scale).to(dtype) * weight_scale).to(dtype)
    return out if bias is None else out + bias


def _pattern(fn: Any, wide: torch.dtype | None, epilogue: str, biased: bool, name: str) -> Pattern:
    inputs = {
        "q": Tensor("num_tokens", "hidden_size", dtype=INT8),
        "scale": Tensor("num_tokens", "1", dtype=wide),
        "weight": Tensor("out_features", "hidden_size", dtype=INT8),
        "weight_scale": Tensor("out_features", dtype=wide),
        **({"bias": Tensor("out_features")} if biased else {}),
    }
    return Pattern(fn, inputs, {"epilogue": epilogue}, name + ", bias" * biased)


def _rewrite(m: Rewrite) -> tuple[Any, ...]:
    operands = {name: m.tensor(name) for name in m.match.captured}
    exact = _before_rounding(m.match.base("scale"))
    if exact is not None:
        operands["scale"] = m.view(exact, operands["scale"].meta["val"].shape)
    order = [
        operands[name]
        for name in ("q", "scale", "weight", "weight_scale", "bias")
        if name in operands
    ]
    return (m.call("scaled_mm", *order, out_dtype=m.dtype, epilogue=m.constants["epilogue"]),)


def _before_rounding(scale: fx.Node) -> fx.Node | None:
    """The float32 scale behind a cast to 16 bits that changes nothing: a quantization returned it rounded already."""
    operation = describe(scale)
    source = operation.operands[0] if operation and operation.name == "cast" else None
    if not isinstance(source, fx.Node) or source.meta["val"].dtype is not torch.float32:
        return None
    made_by = source.args[0] if source.target is operator.getitem else None
    if not isinstance(made_by, fx.Node):
        return None
    arithmetics = [argument for argument in made_by.args if isinstance(argument, Arithmetic)]
    rounded = bool(arithmetics) and arithmetics[0].scale_mode.endswith("_input")
    return (
        source if rounded and made_by.args[0].meta["val"].dtype == scale.meta["val"].dtype else None
    )


# the longer ones first: a sum with a bias contains a product without one
FUSION = Fusion(
    name="scaled_int_mm",
    summary="int8 matmul and its scales as one GEMM",
    stage=2,
    patterns=tuple(
        _pattern(fn, wide, epilogue, biased, name)
        for biased in (True, False)
        for fn, wide, epilogue, name in (
            (_each, None, "out_dtype", "16-bit scales"),
            (_cast, torch.float32, "float32", "float32 scales"),
            (_promoted, torch.float32, "float32", "float32 scales, promoted"),
            (_between, torch.float32, "out_dtype_between", "float32 scales, rounded between"),
        )
    ),
    rewrite=_rewrite,
    constraints=(FITS_INT32,),
    signature="aten._int_mm.default",
    needs="aten._int_mm.default",
    # stock: the GEMM writes int32 sums, which a second kernel reads
    bytes_before="num_tokens*hidden_size + out_features*hidden_size + 10*num_tokens*out_features",
    bytes_after="num_tokens*hidden_size + out_features*hidden_size + 2*num_tokens*out_features",
)
