"""Which parts run a problem: the first that can, in the order that the tables measured.

`pipelines()` are all combinations of parts that fit. The table of a GPU architecture (`python -m bench tune --family
moe`) has what each of them took for some sizes and numbers of pairs; a problem takes the nearest sizes, by their
ratios, and the least measured number of pairs that is not below its own. What no table knows comes after, in the order
of the catalogue.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops import platform, tables
from custom_ops.implementation import Implementation
from custom_ops.moe import (
    experts_deep_gemm,
    experts_flashinfer,
    experts_grouped_mm,
    experts_hopper,
    experts_hopper_fp8,
    experts_triton,
    parts,
)
from custom_ops.moe.finalize import FINALIZES
from custom_ops.moe.parts import CHUNK_VARIABLE, Experts, Pipeline
from custom_ops.moe.prepare import PREPARES
from custom_ops.moe.problem import Problem

EXPERTS: tuple[Experts, ...] = (
    *experts_triton.EXPERTS,
    *experts_deep_gemm.EXPERTS,
    *experts_grouped_mm.EXPERTS,
    *experts_flashinfer.EXPERTS,
    *experts_hopper.EXPERTS,
    *experts_hopper_fp8.EXPERTS,
)
FAMILIES = tuple(dict.fromkeys(experts.family for experts in EXPERTS))
TABLE = "fused_moe"


@functools.cache
def pipelines() -> dict[str, Pipeline]:
    """Every combination of parts that fits, by the name of its experts: one for each."""
    found: dict[str, Pipeline] = {}
    for pipeline in parts.pipelines(PREPARES, EXPERTS, FINALIZES):
        found.setdefault(pipeline.experts.name, pipeline)
    return found


def kind(problem: Problem) -> str:
    """What a table calls the dtypes of a problem: that of 16-bit weights, or how they are quantized."""
    return (
        str(problem.dtype).removeprefix("torch.")
        if problem.weights == "16_bit"
        else problem.weights
    )


def expected_pairs(problem: Problem) -> int:
    """How many pairs a problem of known sizes has here, when tokens go to all experts alike."""
    sizes = problem.sizes
    return max(1, round(sizes.pairs * sizes.num_experts / problem.everywhere))


def measured(problem: Problem) -> dict[str, float]:
    """Microseconds by the name of the experts, of the nearest problem in the tables; {} where there is none."""
    device = problem.hidden_states.device
    capability = platform.cuda_capability(device) if device.type == "cuda" else None
    sizes = problem.sizes
    if capability is None or not all(isinstance(n, int) for n in vars(sizes).values()):
        return {}
    if not sizes.num_experts or not sizes.num_tokens:
        return {}
    rows = (tables.nearest(capability) or {}).get(TABLE, {}).get(kind(problem), [])
    return nearest(
        rows,
        (sizes.num_experts, sizes.hidden_size, sizes.intermediate_size),
        expected_pairs(problem),
    )


def nearest(
    rows: Sequence[dict[str, Any]], sizes: tuple[int, int, int], pairs: int
) -> dict[str, float]:
    """The times of the row that is nearest to (num_experts, hidden_size, intermediate_size) and pairs."""
    if not rows:
        return {}
    names = ("experts", "hidden", "intermediate")

    def place(row: dict[str, Any]) -> tuple[int, ...]:
        return tuple(row[name] for name in names)

    def distance(row: dict[str, Any]) -> float:
        return sum(abs(math.log(a / b)) for a, b in zip(place(row), sizes, strict=True))

    closest = place(min(rows, key=lambda row: (distance(row), place(row))))
    here = [row for row in rows if place(row) == closest]
    above = [row for row in here if row["pairs"] >= pairs]
    row = min(above, key=lambda r: r["pairs"]) if above else max(here, key=lambda r: r["pairs"])
    return dict(row["us"])


def decide(problem: Problem, families: Sequence[str]) -> tuple[Pipeline | None, dict[str, str]]:
    """The pipeline of these families that runs a problem, and why those before it do not, by their experts."""
    times = measured(problem)
    order = sorted(pipelines(), key=lambda name: times.get(name, math.inf))
    rejected: dict[str, str] = {}
    for name in order:
        pipeline = pipelines()[name]
        if pipeline.experts.family not in families:
            continue
        reason = pipeline.unsupported(problem)
        if reason is None:
            return pipeline, rejected
        rejected[name] = reason
    return None, rejected


_memory: dict[Any, tuple[Pipeline | None, dict[str, str]]] = {}
_MOST = 4096


def _decided(problem: Problem) -> tuple[Pipeline | None, dict[str, str]]:
    """As `decide` among the families that may run; remembered, as a decoding step asks the same over and over."""
    from custom_ops import library

    device = problem.hidden_states.device
    weights = (*problem.first_weights, problem.down)
    key = (
        device,
        problem.dtype,
        problem.sizes,
        problem.activation,
        tuple((w.dtype, w.stride(), w.storage_offset() % 16) for w in weights),
        problem.expert_map is None or problem.expert_map.shape[0],
        problem.routed_experts,
        problem.hidden_scale is None,
        os.environ.get("CUSTOM_OPS_DISABLE", ""),
        os.environ.get(CHUNK_VARIABLE, ""),
    )
    plain = all(isinstance(n, int) for n in vars(problem.sizes).values())
    if plain and key in _memory:
        return _memory[key]
    found = decide(problem, library.ops()["fused_moe"].usable(device))
    if plain:
        if len(_memory) >= _MOST:
            _memory.clear()
        _memory[key] = found
    return found


def _unsupported(family: str) -> Callable[..., str | None]:
    def unsupported(*args: Any, **kwargs: Any) -> str | None:
        pipeline, rejected = _decided(Problem.of(*args, **kwargs))
        if pipeline is not None and pipeline.experts.family == family:
            return None
        own = {
            name: reason
            for name, reason in rejected.items()
            if pipelines()[name].experts.family == family
            and not reason.endswith(f"not {Problem.of(*args, **kwargs).weights}")
        }
        said = "; ".join(f"{name}: {reason}" for name, reason in own.items())
        if pipeline is not None:
            said = "; ".join(
                filter(None, (said, f"{pipeline.experts.name} is preferred (custom_ops/tables)"))
            )
        return said or "no parts of it fit"

    return unsupported


def _direct(family: str) -> Callable[..., Tensor]:
    """The best of one family, whatever else there is: what its implementation does when it is called by itself."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        problem = Problem.of(*args, **kwargs)
        pipeline, rejected = _decided(problem)
        if pipeline is None or pipeline.experts.family != family:
            pipeline, rejected = decide(problem, (family,))
        if pipeline is None:
            raise ValueError(f"fused_moe: {family} cannot run: {rejected}")
        return pipeline(problem)

    return run


def _unavailable(family: str) -> Callable[[torch.device], str | None]:
    def unavailable(device: torch.device) -> str | None:
        if family == experts_grouped_mm.FAMILY and device.type != "cuda":
            return f"needs a CUDA tensor to be worth it, this one is on {device.type}"
        reasons = [e.unavailable(device) for e in EXPERTS if e.family == family]
        return None if None in reasons else reasons[0]

    return unavailable


def implementations() -> tuple[Implementation, ...]:
    """The families as implementations of the op."""
    return tuple(
        Implementation(
            family, functools.partial(_direct, family), _unavailable(family), _unsupported(family)
        )
        for family in FAMILIES
    )
