"""Two halves of a batch against the whole of it: times, and a picture of what ran when on which stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import custom_ops
from bench import plots
from bench.expert_parallel_layers import Layer
from bench.expert_parallel_world import Call, World, graphed, row
from bench.results import Row

TOKENS = (512, 1024, 2048, 4096, 8192)
DRAWN = 4096
DRAWN_WAYS = {
    "overlap_off": "dispatch and combine, whole",
    "ours": "dispatch and combine, in halves",
    "gathered_in_halves": "gathered, in halves",
}
# What a kernel does, by what its name has in it.
KINDS = {
    "dispatch": ("intranode::dispatch", "notify_dispatch", "get_dispatch_layout"),
    "combine": ("intranode::combine", "cached_notify_combine"),
    "all-gather": ("AllGather",),
    "reduce-scatter": ("ReduceScatter",),
    "other": ("Memcpy", "Memset", "at::native"),
}  # fmt: skip


def fp8_of(layer: Layer) -> tuple[Layer, dict[str, Any]]:
    """The layer with weights of codes, and their scales: random ones, which take no longer and no shorter."""
    given, scales = [], {}
    for name in ("gate_up", "down"):
        weight = getattr(layer, name)
        given.append(torch.empty_like(weight, dtype=torch.float8_e4m3fn))
        for codes, part in zip(given[-1], weight, strict=True):
            codes.copy_(part)
        blocks = [-(-size // 128) for size in weight.shape[1:]]
        scales[f"{name}_scale"] = torch.ones(len(weight), *blocks, device=weight.device)
    return Layer(layer.world, *given), scales


def rows(world: World, drawn: bool = True) -> Iterator[Row]:
    """Each way of exchanging, in two halves and in one; the results are to have the same bits."""
    layer = Layer.of(world)
    for kind in ("bf16", "fp8"):
        scales: dict[str, Any] = {}
        if kind == "fp8":
            if world.sizes.hidden % 128 or world.sizes.intermediate % 128:
                return
            layer, scales = fp8_of(layer)
            if world.cuda:
                torch.cuda.empty_cache()
        for tokens in TOKENS if world.cuda else (world.sizes.tokens,):
            x, ids, weights = world.draw(tokens)
            scale = None
            if kind == "fp8":
                x, scale = custom_ops.group_quant(x, 128)
            run = partial(layer.whole, x, ids, weights, scale, max_tokens=tokens, **scales)
            calls: dict[str, Call] = {
                "ours": partial(run, split_from=1),
                "overlap_off": run,
                "gathered_in_halves": partial(run, exchange="gather", split_from=1),
                "gathered": partial(run, exchange="gather"),
            }
            times = graphed(world, calls, repeats=2, replays=7)
            made = row(world, f"ep_overlap_{kind}", tokens, times)
            wanted = run()
            for name, call in calls.items():
                if not layer.close(call(), wanted):
                    made.errors[name] = "differs from the whole batch by more than its roundings"
            found = world.slowest({"differ": float((calls["ours"]() != wanted).sum())})
            made.ratios["elements_that_differ"] = found["differ"]
            if drawn and world.cuda and tokens == DRAWN:
                for name in DRAWN_WAYS:
                    record(world, f"{kind}-{name}", calls[name])
            yield made


def record(world: World, name: str, call: Callable[[], Any]) -> None:
    """What this call launches: start and duration in microseconds, stream and name of each kernel, as a JSON file."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        call()
    world.together()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    world.together()
    if world.rank:
        return
    path = world.plan.out / f"timeline-{name}.trace.json"
    seen.export_chrome_trace(str(path))
    events = [
        {
            "start": event["ts"],
            "us": event["dur"],
            "stream": event["args"].get("stream", 0),
            "name": event["name"],
        }
        for event in json.loads(path.read_text())["traceEvents"]
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    path.unlink()
    (world.plan.out / f"timeline-{name}.json").write_text(json.dumps(events))


def kind_of(name: str) -> str:
    for kind, signs in KINDS.items():
        if any(sign in name for sign in signs):
            return kind
    return "experts"


def last_call(events: list[dict[str, Any]], calls: int = 3) -> list[dict[str, Any]]:
    """The kernels of the last of several calls that launch the same ones."""
    ordered = sorted(events, key=lambda e: e["start"])
    return ordered[-(len(ordered) // calls) :]


def overlap_of(events: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds in which tokens travel, in which experts run, in which both do, and from begin to end."""
    moving = _union(e for e in events if kind_of(e["name"]) not in ("experts", "other"))
    working = _union(e for e in events if kind_of(e["name"]) == "experts")
    both = sum(max(0.0, min(b, d) - max(a, c)) for a, b in moving for c, d in working)
    ends = [e["start"] + e["us"] for e in events]
    return {
        "communication": sum(b - a for a, b in moving),
        "experts": sum(b - a for a, b in working),
        "both": both,
        "whole": max(ends) - min(e["start"] for e in events),
    }


def _union(events: Any) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for start, end in sorted((e["start"], e["start"] + e["us"]) for e in events):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def draw_all(out: Path, device: str) -> Path | None:
    """The picture of what `record` left in a folder, in its folder `plots`; None if it left nothing."""
    found = {
        f"{kind}, {label}": path
        for kind in ("bf16", "fp8")
        for name, label in DRAWN_WAYS.items()
        if (path := out / f"timeline-{kind}-{name}.json").exists()
    }
    if not found:
        return None
    title = f"Experts on two {device}, {DRAWN} tokens a rank, 64 experts of which 8: what runs when on rank 0"
    path = out / "plots" / plots.file_name("overlap", device)
    draw(found, path, title)
    return path


def draw(files: dict[str, Path], out: Path, title: str) -> None:
    """A picture of what ran when, a panel for each way and a line for each of its streams."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    colours = {
        "experts": "#4878a8",
        "dispatch": "#d9822b",
        "combine": "#b5453c",
        "all-gather": "#e0b13c",
        "reduce-scatter": "#8c5a9e",
        "other": "#9a9a9a",
    }
    figure, axes = pyplot.subplots(len(files), 1, sharex=True, figsize=(11, 1.9 * len(files) + 1.2))
    seen: set[str] = set()
    for axis, (label, path) in zip([axes] if len(files) == 1 else axes, files.items(), strict=True):
        events = last_call(json.loads(path.read_text()))
        begin = min(e["start"] for e in events)
        streams = sorted({e["stream"] for e in events}, key=lambda s: _first(events, s))
        for e in events:
            kind = kind_of(e["name"])
            seen.add(kind)
            line = streams.index(e["stream"])
            place = {"left": e["start"] - begin, "height": 0.7}
            axis.barh(line, e["us"], color=colours[kind], edgecolor="white", linewidth=0.4, **place)
        found = overlap_of(events)
        axis.set_yticks(range(len(streams)), [f"stream {s}" for s in streams])
        axis.invert_yaxis()
        axis.set_title(
            f"{label}: {found['whole']:.0f} us; communication {found['communication']:.0f}, of which "
            f"{found['both']:.0f} beside the experts",
            fontsize=10,
            loc="left",
        )
        axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("microseconds")
    handles = [Patch(color=colours[kind], label=kind) for kind in colours if kind in seen]
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 0.99))
    figure.legend(handles=handles, loc="lower left", ncol=len(handles), fontsize=9, frameon=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _first(events: list[dict[str, Any]], stream: int) -> float:
    """A key that puts the stream with the most of the experts first."""
    return -sum(
        e["us"] for e in events if e["stream"] == stream and kind_of(e["name"]) == "experts"
    )
