"""`python -m bench moe --blocks`: whole blocks of every model, router included, stock's and ours, in CUDA graphs.

The rows of `moe_block_*` of the suite "moe" in less time: the graphs and our kernels are compiled first, in several
processes (see `bench.ahead`), and only what the table shows is timed. FP8 is held against our own bfloat16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import torch
from rich.table import Table

from bench import ahead, measure
from bench.case import Case
from bench.results import Row
from bench.suites import moe
from bench.suites.moe import Model
from bench.timer import Timer

PREFIX = "moe_block_"
BY_HAND = "by_hand"
BF16 = "by_hand_bf16"
_SHARES = 3
"""Tasks for each model and kind of weights."""
_BESIDE = 9
"""Processes: each has the weights of a model on the GPU, up to 8 GB with those that stock dequantizes."""


def cases(
    models: Iterable[Model], dtypes: Sequence[str], tokens: Sequence[int], tiny: bool = False
) -> list[Case]:
    """Those of the suite, with only stock, the plugin, our ops and, for FP8, our bfloat16. Empty: all."""
    chosen = {
        f"{PREFIX}{m.name}{moe.of_hits(hits)}_{d}"
        for m in models
        for d in m.dtypes
        for hits in (None, *moe.QWEN_HIT.values())
        if not dtypes or d in dtypes
    }
    return [
        dataclasses.replace(
            case, launched=(), others={k: v for k, v in case.others.items() if k in (BY_HAND, BF16)}
        )
        for case in moe.cases(tiny)
        if case.name in chosen and (not tokens or case.sizes["tokens"] in tokens)
    ]


def plan_of(device: torch.device) -> measure.Plan:
    return measure.Plan(device, max_autotune=False, cold=False)


def compile_ahead(
    chosen: Sequence[Case], device: torch.device, seconds: float, tiny: bool = False
) -> ahead.Done:
    """Compile what the cases will run, in processes that take a share of a model's numbers of tokens each."""
    tasks = []
    for name in dict.fromkeys(case.name for case in chosen):
        tokens = [case.sizes["tokens"] for case in chosen if case.name == name]
        for first in range(_SHARES):
            if share := tuple(tokens[first::_SHARES]):
                tasks.append(partial(compile_some, name, share, str(device), tiny))
    return ahead.run(tasks, _BESIDE, seconds)


def compile_some(name: str, tokens: tuple[int, ...], device: str, tiny: bool = False) -> None:
    """In a process of `ahead`: run each way once, so that Inductor's and our kernels are on the disk."""
    for case in cases(moe.MODELS.values(), (), tokens, tiny):
        if case.name != name:
            continue
        plan = plan_of(torch.device(device))
        with torch.no_grad(), ahead.unlaunched():
            inputs = case.inputs(plan.device)
            for _, make in measure.ways(case, plan, inputs):
                torch.compiler.reset()
                make()()


def rows(
    chosen: Sequence[Case], device: torch.device, timer: Timer, copy_gbps: float
) -> Iterator[Row]:
    """One row for each case, in their order."""
    for case in chosen:
        yield measure.measure(case, plan_of(device), timer, copy_gbps)


def table(found: Sequence[Row]) -> Table:
    """Ours, what it stands beside, and the floor: of the experts that the drawn tokens hit, their weights read once."""
    shown = Table(
        title="blocks of mixtures of experts, router included, microseconds in a CUDA graph"
    )
    for column in (
        "block",
        "tokens",
        "stock",
        "ours",
        "stock / ours",
        "of our bf16",
        "experts hit",
        "floor",
        "of floor",
    ):
        shown.add_column(column, justify="left" if column == "block" else "right")
    for row in found:
        times, name = row.warm_us, row.case.removeprefix(PREFIX)
        ours, stock, bf16 = (times.get(way) for way in (measure.PLUGIN, measure.INDUCTOR, BF16))
        floor, experts = (row.ratios.get(name) for name in ("floor_us", "experts_hit"))
        shown.add_row(
            name,
            str(row.sizes["tokens"]),
            f"{stock:.1f}" if stock else "",
            f"{ours:.1f}" if ours else "; ".join(row.errors.values())[:60],
            f"{stock / ours:.2f}" if stock and ours else "",
            f"{ours / bf16:.2f}" if ours and bf16 else "",
            f"{experts:.0f}" if experts else "",
            f"{floor:.1f}" if floor else "",
            f"{floor / ours:.2f}" if floor and ours else "",
        )
    return shown
