"""The experts of a mixture alone, over tokens that lie by expert: what stands between a low-latency dispatch and
combine.

The batched format: [E, M, H], in which the first counts[e] rows of expert e are its tokens, and the others hold
whatever memory held, before and after.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from custom_ops import library
from custom_ops.implementation import Implementation
from custom_ops.library import require
from custom_ops.moe import activation as activations
from custom_ops.moe import experts_deep_gemm
from custom_ops.moe.checks import check_at_least, check_dims, check_dtype, check_shape
from custom_ops.moe.ops import _check as _check_experts
from custom_ops.moe.parts import ExpertTokensMetadata, Prepared
from custom_ops.moe.problem import BATCH_ALIGN, FP8, Problem, Sizes
from custom_ops.moe.reference import linear
from custom_ops.quantization.checks import check_device
from custom_ops.scales import BLOCK, known, quant_spec

_OP = "fused_moe_batched"


def fused_moe_batched(
    hidden_states: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    expected: int = 0,
    activation: str = "silu_mul",
    interleaved: bool = False,
    alpha: float = 1.702,
    limit: float = 7.0,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    min_amax: float = 1e-10,
    scale_mode: str = "divide",
    code_mode: str = "divide",
    hidden_scale: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Each row of a batch through its expert: c of `fused_moe`, which no top-k weight has multiplied.

    hidden_states: bfloat16 or float16, [E, M, H], any strides; or float8_e4m3fn codes, with hidden_scale, float32,
    [E, M, ceil(H / 128)]. counts: int32, [E]: how many rows each expert has; it is read on the device alone. expected:
    about how many that will be on average, from which a kernel may choose its tile; 0: not known. All else: as
    `fused_moe`, to whose arithmetic the rows in use are subject.

    Returns [E, M, H], contiguous. Nothing waits for the device in any implementation, so it can be captured in a CUDA
    graph. Implementations: DeepGEMM (Hopper; M a multiple of 256, of which it writes whole tiles), reference, which
    computes every row. Raises ValueError for another dtype, shape, device or value.
    """
    return torch.ops.custom_ops.fused_moe_batched(
        hidden_states,
        counts,
        gate_up,
        down,
        expected=expected,
        activation=activation,
        interleaved=interleaved,
        alpha=alpha,
        limit=limit,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        gate_up_scale=gate_up_scale,
        down_scale=down_scale,
        min_amax=min_amax,
        scale_mode=scale_mode,
        code_mode=code_mode,
        hidden_scale=hidden_scale,
        out_dtype=out_dtype,
    )


@dataclass(frozen=True)
class _BatchedSizes(Sizes):
    """num_tokens: the rows of an expert; top_k: how many are expected to be in use, or 0."""

    @property
    def pairs(self) -> int:
        return self.num_experts * (self.top_k or self.num_tokens)

    def batch_rows(self) -> int:
        return self.num_tokens


@dataclass(frozen=True, eq=False)
class _BatchedProblem(Problem):
    """Of [E, M, H] hidden states; nothing reads topk_ids and topk_weights."""

    expected: int = 0

    @functools.cached_property
    def sizes(self) -> Sizes:
        experts, rows, hidden = self.hidden_states.shape
        up = self.gate_up.shape[1]
        return _BatchedSizes(rows, self.expected, experts, hidden, self.activation.width(up), up)


def _problem(
    hidden_states: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, **kwargs: Any
) -> Problem:
    return _BatchedProblem.of(hidden_states, gate_up, down, counts, counts, **kwargs)


def problem_of(problem: Problem, batch: Tensor, scale: Tensor | None, counts: Tensor) -> Problem:
    """A batch [E, M, H] with the weights of a problem, of whose pairs this many are expected here."""
    sizes = problem.sizes
    given = {field.name: getattr(problem, field.name) for field in fields(Problem)}
    given |= {"hidden_states": batch, "topk_weights": counts, "topk_ids": counts}
    given |= {"hidden_scale": scale, "out_dtype": problem.dtype}
    return _BatchedProblem(**given, expected=-(-sizes.pairs // max(sizes.num_experts, 1)))


def _quantized(problem: Problem) -> Problem:
    """With codes and scales where the weights are FP8: of every row, as how many are in use is not known here."""
    x = problem.hidden_states
    if problem.weights != "fp8_block" or problem.hidden_scale is not None:
        return problem
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % BLOCK))
    codes, scale = torch.ops.custom_ops.group_quant(padded, BLOCK, **problem.quantization)
    return replace(
        problem, hidden_states=codes[..., : x.shape[-1]], hidden_scale=scale, out_dtype=x.dtype
    )


def _every_row(problem: Problem) -> Tensor:
    problem = _quantized(problem)
    hidden_states = problem.hidden_states
    product: Any = functools.partial(linear, dtype=problem.dtype, **problem.quantization)
    out = hidden_states.new_empty(hidden_states.shape, dtype=problem.dtype)
    for expert in range(problem.sizes.num_experts):

        def of(name: str, expert: int = expert) -> Any:
            tensor = getattr(problem, name)
            return None if tensor is None else tensor[expert]

        first = product(
            *(of(n) for n in ("hidden_states", "gate_up", "gate_up_bias", "gate_up_scale")),
            of("hidden_scale"),
        )
        between = problem.activation.reference(first)
        out[expert] = product(between, *(of(n) for n in ("down", "down_bias", "down_scale")))
    return out


def _check(
    hidden_states: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    expected: int,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    min_amax: float,
    scale_mode: str,
    code_mode: str,
    hidden_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    check_dims(_OP, "hidden_states", hidden_states, 3)
    check_dtype(_OP, "counts", counts, (torch.int32,))
    check_dims(_OP, "gate_up", gate_up, 3)
    check_shape(_OP, "counts", counts, (gate_up.shape[0],))
    check_device(_OP, "counts", counts, "hidden_states", hidden_states)
    require(
        hidden_states.shape[0] == gate_up.shape[0],
        lambda: (
            f"{_OP}: hidden_states.shape is {tuple(hidden_states.shape)}; accepted: the "
            f"{gate_up.shape[0]} experts of gate_up first"
        ),
    )
    check_at_least(_OP, "expected", expected, 0)
    activations.check(_OP, activation, interleaved, alpha, limit)
    # Rows one after the other are tokens to the checks of fused_moe, whose errors name the same arguments.
    rows = hidden_states.new_empty((0, hidden_states.shape[2]))
    ids = rows.new_empty((0, 1), dtype=torch.int64)
    scale = hidden_scale
    if hidden_scale is not None:
        groups = hidden_scale.shape[-1]
        check_shape(_OP, "hidden_scale", hidden_scale, (*hidden_states.shape[:2], groups))
        scale = hidden_scale.new_empty((0, groups))
    _check_experts(
        rows,
        gate_up,
        down,
        rows.new_empty((0, 1), dtype=torch.float32),
        ids,
        activation=activation,
        interleaved=interleaved,
        alpha=alpha,
        limit=limit,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        gate_up_scale=gate_up_scale,
        down_scale=down_scale,
        expert_map=None,
        min_amax=min_amax,
        scale_mode=scale_mode,
        code_mode=code_mode,
        hidden_scale=scale,
        out_dtype=out_dtype,
        routed_experts=0,
        up=None,
    )


def _empty(
    hidden_states: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    expected: int,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    min_amax: float,
    scale_mode: str,
    code_mode: str,
    hidden_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    dtype = hidden_states.dtype if hidden_scale is None else out_dtype
    return torch.empty(hidden_states.shape, dtype=dtype, device=hidden_states.device)


def reference(
    hidden_states: Tensor,
    counts: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    expected: int,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
    min_amax: float,
    scale_mode: str,
    code_mode: str,
    hidden_scale: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The semantics, of every row: how many are in use stays on the device."""
    return _every_row(
        _problem(
            hidden_states,
            counts,
            gate_up,
            down,
            expected=expected,
            activation=activation,
            interleaved=interleaved,
            alpha=alpha,
            limit=limit,
            gate_up_bias=gate_up_bias,
            down_bias=down_bias,
            gate_up_scale=gate_up_scale,
            down_scale=down_scale,
            min_amax=min_amax,
            scale_mode=scale_mode,
            code_mode=code_mode,
            hidden_scale=hidden_scale,
            out_dtype=out_dtype,
        )
    )


_EXPERTS = {e.weights: e for e in experts_deep_gemm.EXPERTS if e.activation_format == "batched"}


def _deep_gemm(
    hidden_states: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, **kwargs: Any
) -> Tensor:
    problem = _quantized(_problem(hidden_states, counts, gate_up, down, **kwargs))
    x, scale = problem.hidden_states.contiguous(), problem.hidden_scale
    if scale is not None:
        spec = quant_spec(FP8, (1, BLOCK), "float32", "column_major_tma")
        _, wanted = spec.empty_of_experts(x.shape, x.device)
        scale = scale if scale.stride() == wanted.stride() else wanted.copy_(scale)
    metadata = ExpertTokensMetadata(counts=counts)
    return _EXPERTS[problem.weights].run(problem, Prepared(x, scale, metadata))


def _unsupported(
    hidden_states: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor, **kwargs: Any
) -> str | None:
    problem = _problem(hidden_states, counts, gate_up, down, **kwargs)
    experts = _EXPERTS.get(problem.weights)
    if experts is None:
        return f"reads weights of {', '.join(_EXPERTS)}, not {problem.weights}"
    if not known(hidden_states.shape[1] % BATCH_ALIGN == 0):
        rows = hidden_states.shape[1]
        return f"writes whole tiles: needs a multiple of {BATCH_ALIGN} rows for each expert, here are {rows}"
    return experts.unsupported(problem)


FUSED_MOE_BATCHED = library.define(
    fused_moe_batched,
    "(Tensor hidden_states, Tensor counts, Tensor gate_up, Tensor down, *, SymInt expected=0, "
    "str activation='silu_mul', bool interleaved=False, float alpha=1.702, float limit=7.0, "
    "Tensor? gate_up_bias=None, Tensor? down_bias=None, Tensor? gate_up_scale=None, "
    "Tensor? down_scale=None, float min_amax=1e-10, str scale_mode='divide', str code_mode='divide', "
    "Tensor? hidden_scale=None, ScalarType out_dtype=bfloat16) -> Tensor",
    check=_check,
    empty=_empty,
    reference=reference,
    implementations=(
        Implementation(
            experts_deep_gemm.FAMILY,
            lambda: _deep_gemm,
            experts_deep_gemm.unavailable,
            _unsupported,
        ),
    ),
)
