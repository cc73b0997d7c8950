"""Quantizations, in every spelling that real graphs showed, each with the arithmetic that it is.

    float, abs, amax, clamp, div, div, clamp, cast   ->   group_quant(x, group_size, min_amax, arithmetic)

One token is one group where the group is the whole row. Sources of the spellings: torchao 0.17 (Float8 and Int8
dynamic activations), transformers' compressed-tensors linears, the quantization of DeepSeek-V3 and of DeepGEMM in plain
PyTorch, and model code on the Hugging Face hub. What has a zero point is in `asymmetric_quantizations`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor as T
from torch import fx

import custom_ops
from fusion_passes import index_map
from fusion_passes.arithmetic import MAX, Arithmetic
from fusion_passes.canonical import casts, spellings
from fusion_passes.canonical.asymmetric_quantizations import (
    LEAST,
    MOST,
    static_patterns,
    tensor_quant_static_asymmetric,
)
from fusion_passes.canonical.marks import meaning
from fusion_passes.canonical.spellings import FP8, INT8, Int8InInputDtype, Spelling
from fusion_passes.fusion import Constraint, Fusion, Pattern, Scalar, SizeOf, Tensor
from fusion_passes.matching import Match
from fusion_passes.operations import is_constant, shape_of
from fusion_passes.rewriting import NotRewritten, Rewrite

BLOCK = custom_ops.scales.BLOCK


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
    op = custom_ops.ops()["tensor_quant_static"]
    return op.reference(x, scale, **op.defaults | arithmetic.arguments("dtype", "code_mode"))


def _fake_block_quant(x: T, min_amax: float, arithmetic: Arithmetic) -> tuple[T, T]:
    blocks = [-(-size // BLOCK) for size in x.shape]
    q = torch.empty(x.shape, dtype=arithmetic.dtype, device=x.device)
    return q, torch.empty(blocks, dtype=torch.float32, device=x.device)


@meaning("opaque", _fake_block_quant)
def block_quant(x: T, min_amax: float, arithmetic: Arithmetic) -> tuple[T, T]:
    return _reference("block_quant", arithmetic, x, min_amax=float(min_amax))


def _reference(op: str, arithmetic: Arithmetic, *args: Any, **kwargs: Any) -> Any:
    declared = custom_ops.ops()[op]
    return declared.reference(*args, **declared.defaults | kwargs | arithmetic.arguments())


_ROWS = Tensor("num_tokens", "hidden_size")
_GROUPS = Tensor("num_tokens", "num_groups * group_size")
_BLOCKS = Tensor(f"num_row_blocks * {BLOCK}", f"num_column_blocks * {BLOCK}")


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


def _row_patterns(spelling: Spelling) -> list[Pattern]:
    """Per tensor first: over several tokens it is also one group of one long token."""
    return [_tensor_pattern(spelling), _group_pattern(spelling)]


def _block_pattern(spelling: Spelling) -> Pattern:
    def fn(x: T, bound: float = 0.0, lower: float = 0.0, upper: float = 0.0) -> Any:
        blocks = x.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        return spelling.quantize(blocks, spelling.largest(blocks, (1, 3)), bound, lower, upper)

    constants = {"spelling": spelling, "kind": "block"}
    return Pattern(fn, spelling.inputs(_BLOCKS), constants, f"per block, {spelling}")


def _bits_pattern() -> Pattern:
    """DeepGEMM's power of two, from the bits of the scale: no meaning of ours, see _power_of_two_is_ours."""
    spelling = Spelling(FP8, "amax", "after abs", inverse=True, clamp_codes=False, power="bits")

    def fn(x: T, group_size: int, bound: float) -> Any:
        groups = x.unflatten(-1, (-1, group_size))
        scale = groups.abs().float().amax(-1).clamp(bound) / MAX[FP8]
        bits = scale.abs().float().view(torch.int32)
        exponent = ((bits >> 23) & 0xFF) + (bits & 0x7FFFFF).bool().int()
        scale = (exponent.clamp(1, 254) << 23).view(torch.float32)
        return spelling.codes(groups, scale.unsqueeze(-1), 0.0, 0.0), scale

    inputs: dict[str, Any] = {
        "x": _GROUPS,
        "group_size": SizeOf("group_size"),
        "bound": Scalar(),
    }
    return Pattern(fn, inputs, {"spelling": spelling, "kind": "group"}, f"per group, {spelling}")


def _static_pattern(spelling: Spelling) -> Pattern:
    def fn(x: T, scale: T, lower: float = 0.0, upper: float = 0.0) -> T:
        return spelling.codes(x, scale, lower, upper)

    inputs = spelling.inputs(_ROWS, scale=Tensor("1", dtype=torch.float32))
    return Pattern(
        fn, inputs, {"spelling": spelling, "kind": "static"}, f"by a given scale, {spelling}"
    )


def _torchao_int8(spelling: Int8InInputDtype) -> Pattern:

    def fn(x: T, group_size: int, bound: float, lower: float, upper: float) -> Any:
        return spelling.quantize(x.unflatten(-1, (-1, group_size)), bound, lower, upper)

    inputs = {**spelling.inputs(_GROUPS), "group_size": SizeOf("group_size")}
    return Pattern(fn, inputs, {"spelling": spelling, "kind": "group"}, f"per group, {spelling}")


def _rewrite_group(m: Rewrite) -> tuple[Any, ...]:
    spelling = m.constants["spelling"]
    arguments = (_min_amax(m), spelling.arithmetic(m.match))
    return _as_spelt(m, m.emit(group_quant, m.tensor("x"), m.size("group_size"), *arguments))


def _rewrite_block(m: Rewrite) -> tuple[Any, ...]:
    x = m.tensor("x")
    if len(shape_of(x)) != 2:
        raise NotRewritten("the matrix that its blocks are of is not in the graph")
    arithmetic = m.constants["spelling"].arithmetic(m.match)
    return _as_spelt(m, m.emit(block_quant, x, _min_amax(m), arithmetic))


def _rewrite_tensor(m: Rewrite) -> tuple[Any, ...]:
    spelling = m.constants["spelling"]
    arguments = (_min_amax(m), spelling.arithmetic(m.match))
    if m.size("num_tokens") == 1:  # the whole of one token: the same, and one pass for a kernel
        node = m.emit(group_quant, m.tensor("x"), m.size("hidden_size"), *arguments)
    else:
        node = m.emit(tensor_quant, m.tensor("x"), *arguments)
    return _as_spelt(m, node)


def _min_amax(m: Rewrite) -> Any:
    spelling = m.constants["spelling"]
    if spelling.bound != "amax":
        return 0.0
    bound = m.match.scalars["bound"]
    if spelling.cast == spellings.AFTER_BOUND:
        if not isinstance(bound, (int, float)):
            raise NotRewritten("the lower bound of its largest magnitude is known only at run time")
        return float(torch.tensor(bound, dtype=m.dtype))
    return bound


def _rewrite_dynamic(m: Rewrite) -> tuple[Any, ...]:
    rewrites: dict[str, Callable[[Rewrite], tuple[Any, ...]]] = {
        "group": _rewrite_group,
        "tensor": _rewrite_tensor,
        "block": _rewrite_block,
    }
    return rewrites[m.constants["kind"]](m)


def _as_spelt(m: Rewrite, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Codes and scale in the dtype that the graph has them in: a scale of 16 bits is exact in float32 and back."""
    codes, scale = m.outputs_of(node, 2)
    dtype = m.match.outputs[1].meta["val"].dtype
    return codes, scale if dtype is torch.float32 else casts.lossless(m.cast(scale, dtype))


def _rewrite_static(m: Rewrite) -> tuple[Any, ...]:
    arithmetic = m.constants["spelling"].arithmetic(m.match)
    if _has_all_codes(m.match):
        with_zero_point = (
            m.constants["kind"] == "static asymmetric" and _constant_zero_point(m.match) is None
        )
        given = (m.tensor("scale"), m.tensor("zero_point") if with_zero_point else None)
        return (m.emit(tensor_quant_static_asymmetric, m.tensor("x"), *given, arithmetic),)
    return (m.emit(tensor_quant_static, m.tensor("x"), m.tensor("scale"), arithmetic),)


def _known_bounds(match: Match) -> bool:
    names = [name for name in match.scalars if name != "bound"]
    if match.constants["spelling"].bound == "scale":
        names.append("bound")
    return all(isinstance(match.scalars[name], (int, float)) for name in names)


def _whole_range(match: Match) -> bool:
    end = MAX[match.outputs[0].meta["val"].dtype]
    lower, upper = match.scalars.get("lower"), match.scalars.get("upper")
    if _has_all_codes(match):
        return (lower, upper) == (LEAST, MOST)  # by amax / 127.5 the largest value is beyond
    if match.constants["kind"] == "static":  # what is beyond is saturated, so the ends matter
        return (lower, upper) == (-end, end)
    # a dynamic scale leaves nothing beyond the range of the codes
    return lower is None or (lower <= -end and upper is not None and upper >= end)


def _has_all_codes(match: Match) -> bool:
    spelling = match.constants["spelling"]
    kind, lower = match.constants["kind"], match.scalars.get("lower")
    if kind.startswith("static"):  # without a zero point either end will do
        return kind == "static asymmetric" or (spelling.dtype is INT8 and lower == LEAST)
    return isinstance(spelling, Int8InInputDtype) and spelling.full


def _constant_zero_point(match: Match) -> float | None:
    """The zero point as a number, where the graph has it as one."""
    if match.constants["kind"] != "static asymmetric":
        return None
    base = match.base("zero_point")
    return base.args[1] if is_constant(base) else None


def _range(match: Match) -> str:
    end = MAX[match.outputs[0].meta["val"].dtype]
    return "-128 .. 127" if _has_all_codes(match) else f"+-{end}"


def _within_tokens(match: Match) -> bool:
    group = match.sizes.get("group_size")
    if match.constants["kind"] != "group" or group is None:
        return True
    return any(
        index_map.divide(shape_of(node)[-1], group) is not None
        for node, *_ in match.captured["x"]
        if node.meta["val"].dim()
    )


def _least_scale(match: Match) -> float | None:
    """The scale of zeros in a quantization by powers of two, before it is raised to one; None if that is not known."""
    spelling, bound = match.constants["spelling"], match.scalars.get("bound", 0.0)
    if not isinstance(bound, (int, float)):
        return None
    return float(bound) if spelling.bound == "scale" else float(bound) / MAX[spelling.dtype]


def _power_of_two_is_ours(match: Match) -> bool:
    """Whether it is the power of two that `custom_ops` finds in the bits of the scale.

    All largest magnitudes of 16 bits over 448 are powers of two, or so far from one that no rounding of a logarithm
    matters; the least scale, a number of the user's, need not be.
    """
    if match.constants["spelling"].power == "bits":
        return False
    least = _least_scale(match)
    if least is None or least < torch.finfo(torch.float32).tiny:
        return False
    exponent = math.log2(least)
    return math.frexp(least)[0] == 0.5 or abs(exponent - round(exponent)) > 1e-4


def _why_not_our_power_of_two(match: Match) -> str:
    if match.constants["spelling"].power == "bits":
        return (
            "the power of two of Inf and of NaN is 2^127 in these bits, while the op has Inf and NaN; "
            "exp2(ceil(log2(scale))) with a lower bound is the op's"
        )
    least = _least_scale(match)
    if least is None:
        return "a bound of its scale is known only at run time"
    if least < torch.finfo(torch.float32).tiny:
        return f"zeros have the scale {least:g} before it is a power of two; accepted: a bound from 2^-126 up"
    return f"its least scale, {least:g}, is so close to a power of two that the logarithm decides which it is"


def _is_input_of_the_graph(match: Match) -> bool:
    return match.base("scale").op in ("placeholder", "get_attr")


_CONSTRAINTS = (
    Constraint(
        _within_tokens,
        lambda match: (
            "one group spans several tokens"
            if isinstance(match.sizes["group_size"], int)
            else f"how many channels have one scale, {match.sizes['group_size']}, is known only at run time"
        ),
    ),
    Constraint(
        _known_bounds,
        lambda match: "a bound of its codes or of its scale is known only at run time",
    ),
    Constraint(
        _whole_range,
        lambda match: (
            f"its codes are clamped to {match.scalars.get('lower')} .. {match.scalars.get('upper')}, "
            f"not to {_range(match)}"
        ),
    ),
)
POWER_OF_TWO = Fusion(  # before the others, whose spellings are many, and none of which it is
    "power_of_two_quantization",
    "Dynamic quantization to 8 bits by powers of two, per group, token or tensor",
    0,
    patterns=(
        *itertools.chain.from_iterable(map(_row_patterns, spellings.powers_of_two())),
        _bits_pattern(),
    ),
    rewrite=_rewrite_dynamic,
    constraints=(*_CONSTRAINTS, Constraint(_power_of_two_is_ours, _why_not_our_power_of_two)),
    signature="aten.log2.default aten.__lshift__.Scalar",
)
DYNAMIC = Fusion(
    "quantization",
    "Dynamic quantization to 8 bits, per group, token or tensor",
    0,
    patterns=(
        _torchao_int8(Int8InInputDtype(full=True)),
        _torchao_int8(Int8InInputDtype()),
        *itertools.chain.from_iterable(map(_row_patterns, spellings.symmetric())),
    ),
    rewrite=_rewrite_dynamic,
    constraints=_CONSTRAINTS,
    signature="cast",
    exclusive=True,
)
STATIC = Fusion(  # after the dynamic ones, which end in the same
    "static_quantization",
    "Quantization to 8 bits by a given scale",
    0,
    patterns=(
        *(
            _static_pattern(Spelling(dtype, inverse=inverse))
            for dtype in (FP8, INT8)
            for inverse in (False, True)
        ),
        *static_patterns(Spelling(INT8, inverse=True)),
        *static_patterns(Spelling(INT8)),
    ),
    rewrite=_rewrite_static,
    constraints=(
        *_CONSTRAINTS,
        Constraint(
            lambda match: _constant_zero_point(match) in (None, 0),
            lambda match: (
                f"its zero point is the number {_constant_zero_point(match)}; accepted: 0, or a tensor"
            ),
        ),
    ),
    signature="cast",
    exclusive=True,
)
CALIBRATED = dataclasses.replace(  # before the dynamic ones, none of which need then be traced for a calibrated model
    STATIC,
    name="calibrated_quantization",
    summary="Quantization to 8 bits by a scale that the graph is given",
    constraints=(Constraint(_is_input_of_the_graph, lambda match: ""), *STATIC.constraints),
)
BLOCKS = Fusion(  # last, as blocks are rare; those of one column of blocks look like groups that span tokens
    "block_quantization",
    f"Dynamic quantization to 8 bits per block of {BLOCK} x {BLOCK}",
    0,
    patterns=tuple(map(_block_pattern, spellings.of_blocks())),
    rewrite=_rewrite_dynamic,
    constraints=_CONSTRAINTS,
    signature="cast",
    exclusive=True,
)
