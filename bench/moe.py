"""`python -m bench moe`: where the time of a mixture of experts goes, and how much memory it takes.

The profile times the parts of `fused_moe` on their own, each in a CUDA graph, beside the whole block in one: the
difference is what parts gain or lose by following each other. The floor is the weights of the experts that the drawn
tokens hit, read once at 3.0 TB/s, or the operations of the pairs at 790 TFLOP/s (twice that in FP8).
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bench.results import Row, Run
from bench.suites import moe
from bench.suites.moe import Model
from bench.timer import Timer
from custom_ops.moe import choice, parts
from custom_ops.moe.problem import Problem

PARTS = ("router", "prepare", "experts", "finalize")
COLOURS = ("#d98c3f", "#7fb069", "#0b6e99", "#a05195")
MEMORY_TOKENS = 65536
CHUNKS = (4096, 8192, 16384, 65536)


def models(names: Iterable[str] | None, tiny: bool) -> list[Model]:
    """By name, or all. Raises ValueError for a name that is none."""
    chosen = list(names or moe.MODELS)
    for name in chosen:
        if name not in moe.MODELS:
            raise ValueError(f"no model {name!r}; accepted: {', '.join(moe.MODELS)}")
    return [moe.small(moe.MODELS[name]) if tiny else moe.MODELS[name] for name in chosen]


def call(model: Model, dtype: str, tokens: int, device: torch.device) -> tuple[Any, ...]:
    """Hidden states, the router's result for them, and the arguments of `fused_moe`."""
    rows = moe.draw(model, tokens, device)
    hidden_states = rows.unsqueeze(0)
    routed = moe.route(model, moe.block(model, "bf16", device), rows)
    return hidden_states, routed, moe.experts_call(model, dtype, rows, *routed)


def profile(
    model: Model, dtype: str, tokens: int, device: torch.device, timer: Timer, experts: str = ""
) -> Row:
    """One block, part by part. experts: of which name, or those that the tables choose."""
    row, finish = prepared_profile(model, dtype, tokens, device, timer, experts)
    finish()
    return row


def prepared_profile(
    model: Model, dtype: str, tokens: int, device: torch.device, timer: Timer, experts: str = ""
) -> tuple[Row, Callable[[], None]]:
    """As `profile`, and what computes the ratios of the row from its times: a timer may fill them in later."""
    hidden_states, (_, ids), (args, kwargs) = call(model, dtype, tokens, device)
    rows, problem = args[0], Problem.of(*args, **kwargs)
    pipeline = chosen(problem, experts)
    prepared = pipeline.prepare.run(problem, pipeline.experts)
    results = pipeline.experts.run(problem, prepared)
    module = moe.block(model, "bf16", device)
    times = {
        "router": timer.warm(lambda: moe.route(model, module, rows)),
        "prepare": timer.warm(lambda: pipeline.prepare.run(problem, pipeline.experts)),
        "experts": timer.warm(lambda: pipeline.experts.run(problem, prepared)),
        "finalize": timer.warm(lambda: pipeline.finalize.run(problem, results, prepared.metadata)),
    }
    whole = pipeline if experts else None
    times["block"] = timer.warm(lambda: moe.by_hand(model, dtype, hidden_states, whole))
    counts = moe.hit(model, ids)
    moved, flops = moe.least(model, dtype, tokens, counts)
    row = Row(
        f"moe_profile_{model.name}_{dtype}",
        {"tokens": tokens},
        moved_bytes=moved,
        flops=flops,
        fusion=None,
        warm_us=times,
    )
    row.fired = {pipeline.experts.name: 1}
    return row, partial(_profiled, row, dtype, counts)


def _profiled(row: Row, dtype: str, counts: Sequence[int]) -> None:
    """The ratios of a row of `profile`, from its times and the pairs that each expert has."""
    times, used = row.warm_us, [count for count in counts if count] or [0]
    floor = moe.floor_us(row.moved_bytes, row.flops, dtype)
    row.ratios = {
        "floor_us": floor,
        "of_floor": floor / times["block"],
        "align_and_permute": (times["prepare"] + times["finalize"]) / times["block"],
        "experts_tflops": row.flops / times["experts"] / 1e6,
        "experts_gbps": row.moved_bytes / times["experts"] / 1e3,
        "experts_hit": len(used) if any(counts) else 0,
        "tokens_per_expert_least": min(used),
        "tokens_per_expert_median": statistics.median(used),
        "tokens_per_expert_most": max(used),
    }


def chosen(problem: Problem, experts: str) -> parts.Pipeline:
    """The pipeline of that name, or the one that the op takes on this device."""
    if experts:
        return choice.pipelines()[experts]
    from custom_ops import library

    # on a CPU the op takes its reference, which has no parts
    usable = library.ops()["fused_moe"].usable(problem.hidden_states.device)
    families = [name for name in usable if name != "reference"] or ["grouped_mm"]
    pipeline, rejected = choice.decide(problem, families)
    if pipeline is None:
        where = problem.hidden_states.device.type
        raise ValueError(
            f"no parts take this problem on {where} (--dtype bf16 leaves it out): {rejected}"
        )
    return pipeline


def profile_table(rows: Sequence[Row]) -> Table:
    table = Table(title="mixtures of experts, microseconds in a CUDA graph")
    for column in (
        "block",
        "experts by",
        *PARTS,
        "sum",
        "block",
        "floor",
        "of floor",
        "align + permute",
        "TFLOP/s",
        "GB/s",
        "experts hit",
        "tokens each",
    ):
        left = column in ("block", "experts by")
        table.add_column(column, justify="left" if left else "right")
    for row in rows:
        times, ratios = row.warm_us, row.ratios
        each = [ratios[f"tokens_per_expert_{which}"] for which in ("least", "median", "most")]
        table.add_row(
            row.label.removeprefix("moe_profile_"),
            next(iter(row.fired)),
            *(f"{times[name]:.1f}" for name in PARTS),
            f"{sum(times[name] for name in PARTS):.1f}",
            f"{times['block']:.1f}",
            f"{ratios['floor_us']:.1f}",
            f"{ratios['of_floor']:.2f}",
            f"{100 * ratios['align_and_permute']:.0f}%",
            f"{ratios['experts_tflops']:.0f}",
            f"{ratios['experts_gbps']:.0f}",
            f"{ratios['experts_hit']:.0f}",
            "/".join(f"{count:g}" for count in each),
        )
    return table


def draw(rows: Sequence[Row], device: str, folder: Path) -> list[Path]:
    """A stacked bar of the parts for each number of tokens, one PNG per block; the floor is a line across the bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for case in dict.fromkeys(row.case for row in rows):
        line = sorted(
            (row for row in rows if row.case == case), key=lambda row: row.sizes["tokens"]
        )
        figure = Figure(figsize=(8, 4.5))
        axes = figure.add_subplot()
        bottoms = [0.0] * len(line)
        for part, colour in zip(PARTS, COLOURS, strict=True):
            heights = [row.warm_us[part] for row in line]
            axes.bar(range(len(line)), heights, bottom=bottoms, color=colour, label=part, width=0.6)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        for index, row in enumerate(line):
            floor, label = row.ratios["floor_us"], "_" if index else "floor"
            axes.hlines(floor, index - 0.4, index + 0.4, color="black", label=label)
            axes.text(
                index, bottoms[index], f"{row.warm_us['block']:.0f}", ha="center", va="bottom"
            )
        axes.set_xticks(range(len(line)), [str(row.sizes["tokens"]) for row in line])
        axes.set_xlabel("tokens (above the bars: the whole block in one CUDA graph)")
        axes.set_ylabel("microseconds")
        title = case.removeprefix("moe_profile_")
        axes.set_title(f"{title}, {device}", loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        paths.append(folder / picture(case, device))
        figure.savefig(paths[-1], dpi=144, bbox_inches="tight")
    return paths


def picture(case: str, device: str) -> Path:
    """The name of the file that `draw` writes for a block."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return Path(f"{case.replace('_', '-')}-{slug}.png")


def memory(
    model: Model, dtype: str, device: torch.device, tokens: int = MEMORY_TOKENS
) -> Iterator[Row]:
    """Peak extra memory of one call by the size of a chunk, in MiB, and what the parts declare. Needs a GPU."""
    _, _, (args, kwargs) = call(model, dtype, tokens, device)
    problem = Problem.of(*args, **kwargs)
    for most in CHUNKS:
        with _chunk(most):
            pipeline = chosen(problem, "")
            pipeline(problem)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            out = pipeline(problem)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            sizes = {"tokens": tokens, "chunk": most}
            row = Row(f"moe_memory_{model.name}_{dtype}", sizes)
            chunked = problem.of_tokens(0, min(most, tokens)).sizes
            row.ratios = {
                "peak_mib": peak / 2**20,
                "output_mib": out.numel() * out.element_size() / 2**20,
                "declared_mib": pipeline.workspace(chunked, out.element_size()) / 2**20,
            }
            row.fired = {pipeline.experts.name: 1}
            del out
        yield row


@contextmanager
def _chunk(most: int) -> Iterator[None]:
    before = os.environ.get(parts.CHUNK_VARIABLE)
    os.environ[parts.CHUNK_VARIABLE] = str(most)
    try:
        yield
    finally:
        if before is None:
            del os.environ[parts.CHUNK_VARIABLE]
        else:
            os.environ[parts.CHUNK_VARIABLE] = before


def memory_table(rows: Sequence[Row]) -> Table:
    table = Table(title="peak extra memory of one call, MiB")
    for column in ("block", "experts by", "peak", "of it output", "declared by the parts"):
        table.add_column(column, justify="left" if column in ("block", "experts by") else "right")
    for row in rows:
        amounts = [f"{row.ratios[f'{name}_mib']:.0f}" for name in ("peak", "output", "declared")]
        table.add_row(row.label.removeprefix("moe_memory_"), next(iter(row.fired)), *amounts)
    return table


def kernels(
    model: Model,
    dtype: str,
    tokens: int,
    device: torch.device,
    experts: str = "",
    calls: int = 10,
) -> Table:
    """What each kernel of the block takes, launched by the host: microseconds a call. Needs a GPU.

    experts: of which name, or those that the tables choose.
    """
    from torch.profiler import ProfilerActivity

    hidden_states = moe.draw(model, tokens, device).unsqueeze(0)
    pipeline = choice.pipelines()[experts] if experts else None
    for _ in range(3):
        moe.by_hand(model, dtype, hidden_states, pipeline)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            moe.by_hand(model, dtype, hidden_states, pipeline)
        torch.cuda.synchronize()
    by = f" by {experts}" if experts else ""
    table = Table(title=f"kernels of {model.name} {dtype}{by}, {tokens} tokens")
    for column in ("kernel", "us a call", "launches"):
        table.add_column(column)
    found = [e for e in profiler.key_averages() if getattr(e, "device_time_total", 0)]
    for event in sorted(found, key=lambda e: -e.device_time_total):
        micros = event.device_time_total / calls
        table.add_row(event.key[:90], f"{micros:.2f}", f"{event.count / calls:g}")
    return table


def add(session: Run, rows: Iterable[Row], folder: Path) -> list[Row]:
    """Measure, and write after each row: a run that is cut off keeps what it has."""
    found = []
    for row in rows:
        session.rows.append(row)
        session.save(folder)
        found.append(row)
    return found
