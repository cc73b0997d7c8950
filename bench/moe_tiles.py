"""`python -m bench.moe_tiles`: which tiles of experts are fastest where, into `custom_ops/tables/moe_<arch>.json`.

For each model of `bench.suites.moe`, kind of weights and number of tokens, every candidate of each kernel is timed in a
CUDA graph on uniform routing; a block size wins by the sum of its fastest two, and the kernels for few pairs are noted
where they beat that and what the index and the sum cost beside it. Sizes that are not measured anew stay as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import custom_ops
from bench.results import ROOT
from bench.suites.moe import MODELS, Model
from bench.timer import CudaTimer
from custom_ops.moe import triton_decode, triton_experts
from custom_ops.moe.activation import Activation
from custom_ops.moe.tiles import PREFIX, Aligned, Strip, Tile, as_row

TOKENS = (1, 2, 4, 8, 16, 64, 512, 4096)
FEW = 4  # tokens up to which the kernels that sort nothing are tried
# Microseconds of the kernels that a grouped product needs beside it: index and sum, and the quantization for FP8.
BESIDE = {"16_bit": 6.0, "fp8_block": 10.0}


def tiles(kind: str, product: str, pairs_per_expert: float) -> Iterator[tuple[int, Tile]]:
    """(block size, tile) worth trying; product: "gate_up" or "down", whose tiles have twice the columns.

    Where most of the time goes by reading weights, each also with what it may ask of L2.
    """
    for block, tile in _tiles(kind, product, pairs_per_expert):
        yield block, tile
        if block < 128:
            yield block, replace(tile, ahead=8, keep=True)


def _tiles(kind: str, product: str, pairs_per_expert: float) -> Iterator[tuple[int, Tile]]:
    wide = 2 if product == "down" else 1
    if kind == "fp8_block":
        if pairs_per_expert <= 64:
            for block in (16, 32, 64):
                for warps, stages, swap in (
                    (4, 3, True),
                    (4, 4, True),
                    (8, 4, False),
                    (4, 2, False),
                ):
                    yield block, Tile(128, 128, warps, stages, swap, 1, block > 16)
        if pairs_per_expert > 16:
            for band in (4, 8):
                yield 128, Tile(128, 128, 8, 4, False, band, True)
                yield 128, Tile(128, 128, 4, 4, False, band, roles=True)
        return
    if pairs_per_expert <= 64:
        for block in (16, 32, 64):
            for n, warps, stages in ((64, 4, 4), (64, 4, 2), (64 * wide, 4, 3), (128, 8, 2)):
                yield block, Tile(n, 128, warps, stages, True, 1, block > 16)
            yield block, Tile(64, 256, 4, 3)
            yield block, Tile(128, 128, 8, 2, False, 2, block > 16)
    if pairs_per_expert > 16:
        for band in (2, 4, 8, 16):
            yield 128, Tile(128 * wide, 64, 8, 4, False, band, True)
            yield 128, Tile(128 * wide, 64, 8, 4, True, band, True)
            yield 128, Tile(128, 64, 4, 4, False, band, roles=True)


def strips(transposed: bool) -> Iterator[tuple[Strip, Strip]]:
    """Pairs of strips worth trying; transposed: weights kept as [E, K, N], of which a strip takes whole cache lines."""
    if transposed:
        for first in (Strip(16, 128, 4), Strip(16, 256, 8), Strip(32, 64, 4)):
            for second in (Strip(32, 128, 8), Strip(64, 32, 4), Strip(32, 256, 16)):
                yield first, second
        return
    for first in (Strip(8, 512, 4), Strip(4, 1024, 4), Strip(8, 512, 2), Strip(2, 1024, 4)):
        for second in (Strip(8, 256, 4), Strip(4, 1024, 4)):
            for options in ({}, {"prefetch": True}, {"choices": 1}):
                yield first, replace(second, **options)


def winner(times: dict[tuple[str, int, Tile], float]) -> tuple[float, int, Tile, Tile] | None:
    """(microseconds, block size, tile of gate_up, tile of down) of the best block size that both products have."""
    best: dict[tuple[str, int], tuple[float, Tile]] = {}
    for (product, block, tile), us in times.items():
        if (product, block) not in best or us < best[product, block][0]:
            best[product, block] = (us, tile)
    sums = [
        (best["gate_up", block][0] + best["down", block][0], block)
        for product, block in best
        if product == "gate_up" and ("down", block) in best
    ]
    if not sums:
        return None
    us, block = min(sums)
    return us, block, best["gate_up", block][1], best["down", block][1]


def row(
    model: Model,
    pairs: int,
    kind: str,
    grouped: tuple[float, int, Tile, Tile],
    few: tuple[float, tuple[Strip, Strip]] | None,
) -> dict[str, Any]:
    """A row of the table, as `custom_ops.moe.tiles` reads it."""
    us, block, first, second = grouped
    found: dict[str, Any] = {
        "experts": model.experts,
        "hidden": model.hidden,
        "intermediate": model.intermediate,
        "pairs": pairs,
        "block_size": block,
        "gate_up": as_row(first),
        "down": as_row(second),
        "us": {"grouped": round(us, 1)},
    }
    if few is not None:
        found["us"]["few"] = round(few[0], 1)
        if few[0] < us + BESIDE[kind]:
            found["strips"] = [as_row(strip) for strip in few[1]]
    return found


def measure(
    model: Model, kind: str, tokens: Iterable[int], timer: CudaTimer
) -> list[dict[str, Any]]:
    """The rows of a model and a kind of weights."""
    problem = _Problem(model, kind)
    rows = []
    for count in tokens:
        x, weights, ids, expert_map = problem.routing(count)
        pairs = max(1, count * model.top_k * model.experts // model.everywhere)
        times: dict[tuple[str, int, Tile], float] = {}
        for product in ("gate_up", "down"):
            for block, tile in tiles(kind, product, pairs / model.experts):
                call = problem.grouped(product, x, ids, expert_map, block, tile)
                times[product, block, tile] = _time(timer, call)
        few = None
        if count <= FEW:
            tried = {
                pair: _time(timer, partial(problem.few, x, weights, ids, expert_map, pair))
                for pair in strips(problem.transposed)
            }
            best = min(tried, key=lambda pair: tried[pair])
            few = (tried[best], best)
        if grouped := winner(times):
            rows.append(row(model, pairs, kind, grouped, few))
            print(model.name, kind, count, rows[-1]["us"], flush=True)
    return rows


def _time(timer: CudaTimer, call: Any) -> float:
    try:
        return timer.warm(call)
    except Exception as error:  # a tile that does not fit the device: said, and out of the race
        print("  left out:", type(error).__name__, str(error).splitlines()[0][:100])
        return float("inf")


class _Problem:
    """Weights of a model on the GPU, and calls of the kernels on them."""

    def __init__(self, model: Model, kind: str) -> None:
        self.model, self.kind = model, kind
        self.transposed = model.name.startswith("gpt_oss")
        name = "clamped_swiglu" if self.transposed else "silu_mul"
        self.activation = Activation(name, interleaved=self.transposed)
        rows = 2 * model.intermediate
        self.gate_up, self.gate_up_scale = self._weight(rows, model.hidden)
        self.down, self.down_scale = self._weight(model.hidden, model.intermediate)
        self.gate_up_bias = self.down_bias = None
        if self.transposed:
            self.gate_up_bias = torch.randn(model.experts, rows, device="cuda").bfloat16()
            self.down_bias = torch.randn(model.experts, model.hidden, device="cuda").bfloat16()

    def _weight(self, n: int, k: int) -> tuple[Tensor, Tensor | None]:
        shape = (self.model.experts, k, n) if self.transposed else (self.model.experts, n, k)
        weight = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        for expert in weight:
            expert.normal_(0, k**-0.5)
        weight = weight.mT if self.transposed else weight
        if self.kind != "fp8_block":
            return weight, None
        blocks = (self.model.experts, -(-n // 128), -(-k // 128))
        scale = torch.rand(blocks, device="cuda") * 0.01 + 0.05
        return (weight * 20).to(torch.float8_e4m3fn), scale

    def routing(self, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        model = self.model
        generator = torch.Generator("cuda").manual_seed(0)
        scores = torch.randn(tokens, model.everywhere, device="cuda", generator=generator)
        weights, ids = scores.softmax(-1).topk(model.top_k)
        expert_map = None
        if model.everywhere != model.experts:
            expert_map = torch.full((model.everywhere,), -1, dtype=torch.int32, device="cuda")
            expert_map[: model.experts] = torch.arange(model.experts, device="cuda")
        x = torch.randn(tokens, model.hidden, device="cuda").bfloat16()
        return x, weights.bfloat16(), ids, expert_map

    def grouped(
        self,
        product: str,
        x: Tensor,
        ids: Tensor,
        expert_map: Tensor | None,
        block: int,
        tile: Tile,
    ) -> Any:
        model = self.model
        index = custom_ops.moe_align_block_size(ids, block, model.experts, expert_map=expert_map)
        aligned = Aligned(*index, block)
        if product == "down":
            x = torch.randn(len(aligned.sorted_ids), model.intermediate, device="cuda").bfloat16()
        scale = None
        if self.kind == "fp8_block":
            x, scale = custom_ops.group_quant(x, 128)
        if product == "down":
            return lambda: triton_experts.down(
                x,
                self.down,
                aligned,
                ids.numel(),
                bias=self.down_bias,
                act_scale=scale,
                w_scale=self.down_scale,
                dtype=torch.bfloat16,
                tile=tile,
            )
        return lambda: triton_experts.gate_up(
            x,
            self.gate_up,
            aligned,
            model.top_k,
            activation=self.activation,
            bias=self.gate_up_bias,
            x_scale=scale,
            w_scale=self.gate_up_scale,
            quantize=scale is not None,
            dtype=torch.bfloat16,
            tile=tile,
        )

    def few(
        self,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        expert_map: Tensor | None,
        pair: tuple[Strip, Strip],
    ) -> Tensor:
        return triton_decode.moe_decode(
            x,
            self.gate_up,
            self.down,
            weights,
            ids,
            activation=self.activation,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            gate_up_scale=self.gate_up_scale,
            down_scale=self.down_scale,
            expert_map=expert_map,
            strips=pair,
        )


def write(path: Path, device: str, fresh: dict[str, list[dict[str, Any]]]) -> None:
    """Put rows into a table, in place of those of the same sizes and pairs; one row to a line."""

    def place(row: dict[str, Any]) -> tuple[int, ...]:
        return tuple(row[name] for name in ("experts", "hidden", "intermediate", "pairs"))

    old = json.loads(path.read_text())["tiles"] if path.exists() else {}
    lines = []
    for kind in sorted({*old, *fresh}):
        rows = {place(row): row for row in (*old.get(kind, []), *fresh.get(kind, []))}
        body = ",\n".join("   " + json.dumps(rows[key]) for key in sorted(rows))
        lines.append(f'  "{kind}": [\n{body}\n  ]')
    arch = path.stem.removeprefix("moe_")
    head = f'{{"arch": "{arch}", "device": "{device}",\n "tiles": {{\n'
    path.write_text(head + ",\n".join(lines) + "\n }}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), action="append")
    parser.add_argument("--kind", choices=sorted(BESIDE), action="append")
    parser.add_argument("--tokens", type=int, action="append")
    options = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    path = ROOT / "custom_ops" / "tables" / f"{PREFIX}{major}{minor}.json"
    timer = CudaTimer(rep_ms=10)
    for name in options.model or MODELS:
        for kind in options.kind or BESIDE:
            if kind == "fp8_block" and "fp8_block" not in MODELS[name].dtypes:
                continue
            rows = measure(MODELS[name], kind, options.tokens or TOKENS, timer)
            write(path, torch.cuda.get_device_name(), {kind: rows})
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
