"""Distils results into `fusion_passes/tables/<arch>.json`: which fusions are on by default, and the rows that say so.

A fusion is on where it is ahead of stock `torch.compile`: never below 0.97 of it (the noise of a run), and
above 1 somewhere. A fusion with cases of its own is judged by those, any other by the models in which it
fired. The time of the plugin counts, not that of the bare op. A quantization alone is on only where it is not what is
left of a fusion that is behind or was not measured: stock makes one kernel of a producer and its quantization.

A fusion that leaves to stock what is nearest to a row that was behind (`Fusion.measured_as`) is on where it is ahead
anywhere. Where another that is on was behind in the map of sizes (`bench.heat`), the token counts and widths around
stand with it as "behind", and the plugin leaves such places to stock (see `fusion_passes/slower.py`).

Also writes `custom_ops/tables/<arch>.json`: which implementation, and which Triton tile, of scaled_mm won where, and
what the parts of fused_moe took. What of these was not measured stays as it is in the table.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import heat_map, lora_table
from bench.results import ROOT, Row, Run, newest
from fusion_passes.tables import NOISE

TABLES = ROOT / "fusion_passes" / "tables"
PRODUCTS = ROOT / "custom_ops" / "tables"
UNPROVEN = {
    "silu_mul": "as fast as stock for many tokens (1.00), and in the way of what stock fuses with it",
    "gelu_tanh_mul": "as fast as stock for many tokens (1.00), and in the way of what stock fuses with it",
}
"""Off whatever was measured, and why: what is taken out here is on where it is ahead."""
SCHEMES = (
    "group_quant",
    "token_quant",
    "token_quant_asymmetric",
    "tensor_quant",
    "tensor_quant_asymmetric",
    "tensor_quant_static",
    "tensor_quant_static_asymmetric",
)
PRODUCERS = ("rms_norm", "add_rms_norm", "silu_mul", "gelu_tanh_mul", "clamped_swiglu")
PRODUCT = "scaled_mm"
BLOCK_PRODUCT = "block_scaled_mm"
BLOCK_WAYS = ("flashinfer", "cublaslt", "deep_gemm", "triton")
FAR = 16
"""From one token count of the map to the next, where it is coarse: beyond it nothing is said of a point."""
MOE = "fused_moe"
FAMILIES = ("moe",)


def write(runs: Sequence[Run], folder: Path, family: str = "") -> list[Path]:
    """The tables of each GPU architecture in the results; returns the paths.

    Those of fusions go to `folder`; those of products to `PRODUCTS`, or below `folder` where that is not `TABLES`.
    family: one of FAMILIES, to leave all other tables alone.
    """
    from fusion_passes.registered import registry

    paths = []
    on_gpus = [run for run in runs if run.device["arch"] != "cpu"]
    for arch in dict.fromkeys(run.device["arch"] for run in on_gpus):
        devices = newest([run for run in on_gpus if run.device["arch"] == arch])
        pairs = [pair for pairs in devices.values() for pair in pairs]
        if not family:
            paths.append(_write(folder / f"{arch}.json", distil(pairs, list(registry()))))
        path = (PRODUCTS if folder == TABLES else folder / "products") / f"{arch}.json"
        fresh: dict[str, Any] = {}
        if not family and any(product_kind(row) for _, row in pairs):
            fresh |= distil_products(pairs)
        if not family and any(_has_flashinfer(row) for _, row in pairs):
            fresh |= distil_block_products(pairs)
        if any(moe_kind(row) for _, row in pairs):
            fresh |= distil_moe(pairs)
        if fresh:
            kept = json.loads(path.read_text()) if path.exists() else {}
            paths.append(_write(path, {**kept, **fresh}))
        # all runs: the ways of one size may have been timed in several
        every = [(run, row) for run in on_gpus if run.device["arch"] == arch for row in run.rows]
        if not family and any(lora_table.has_ways(row) for _, row in every):
            paths.append(_write(path.with_name(f"lora_{arch}.json"), lora_table.distil(every)))
    return paths


def _write(path: Path, table: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1) + "\n")
    return path


def distil(pairs: Sequence[tuple[Run, Row]], fusions: Sequence[str]) -> dict[str, Any]:
    rows = [row for run, row in pairs if run.suite != heat_map.SUITE]
    maps = [row for run, row in pairs if run.suite == heat_map.SUITE]
    verdicts = {name: verdict(name, rows) for name in fusions}
    for name in UNPROVEN.keys() & verdicts.keys():
        verdicts[name] |= {"on": False, "why": UNPROVEN[name]}
    for name in SCHEMES:
        after = [f"{producer}_{name}" for producer in PRODUCERS]
        lost = [pair for pair in after if pair in verdicts and not verdicts[pair]["on"]]
        if lost and verdicts.get(name, {}).get("on"):
            why = f"it would take a part of {lost[0]}, which is {verdicts[lost[0]]['why']}"
            verdicts[name] |= {"on": False, "why": why}
    for name, found in verdicts.items():
        if found["on"] and (regions := behind(name, maps)):
            found["behind"] = regions
    return {**_provenance(pairs), "fusions": verdicts}


def behind(fusion: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The regions of a map where a fusion was slower than stock, each of them one width and a span of tokens.

    A region goes on to the next point that was not slower, in tokens (no further than FAR times) and half-way (as a
    ratio) in widths that were measured at such tokens, but not beyond the map: nothing is known there.
    """
    found: dict[tuple[str, int], dict[int, float]] = {}
    for row in rows:
        if row.fusion == fusion and "of_inductor" in row.ratios:
            int8 = row.case.endswith(("_int8", "_asymmetric"))
            dtype = "int8" if int8 else "float8_e4m3fn"
            ratios = found.setdefault((dtype, row.sizes["width"]), {})
            count = row.sizes["tokens"]  # of two devices of an architecture the slower one counts
            ratios[count] = min(ratios.get(count, math.inf), row.ratios["of_inductor"])
    regions = []
    for (dtype, width), ratios in sorted(found.items()):
        for first, last in _slow_spans(ratios):
            widths = sorted(
                other
                for (kind, other), there in found.items()
                if kind == dtype and any(first <= count <= last for count in there)
            )
            tokens = [count for count in ratios if first <= count <= last]
            slow = [ratios[count] for count in tokens if ratios[count] < NOISE]
            regions.append(
                {
                    "dtype": dtype,
                    "tokens": [first, last],
                    "width": _nearest_to(width, widths),
                    "why": f"{min(slow):.2f} times stock torch.compile at {_span(tokens)} tokens of width {width}",
                }
            )
    return regions


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _slow_spans(ratios: Mapping[int, float]) -> Iterator[tuple[int, int]]:
    """Of speeds by token counts: each span of counts whose measured ones are all slow, up to the next that is not."""
    counts = sorted(ratios)
    for slow, group in itertools.groupby(range(len(counts)), lambda i: ratios[counts[i]] < NOISE):
        if slow:
            places = list(group)
            first, last = counts[places[0]], counts[places[-1]]
            before, after = places[0] - 1, places[-1] + 1
            yield (
                max(counts[before] + 1, first // FAR + 1) if before >= 0 else first,
                min(counts[after] - 1, last * FAR - 1) if after < len(counts) else last,
            )


def _nearest_to(width: int, widths: Sequence[int]) -> list[int]:
    """The least and the largest width that is nearer to this one of the map than to the others."""
    place = widths.index(width)
    low = math.isqrt(widths[place - 1] * width) + 1 if place else width
    high = math.isqrt(width * widths[place + 1]) if place + 1 < len(widths) else width
    return [low, high]


def _provenance(pairs: Sequence[tuple[Run, Row]]) -> dict[str, Any]:
    latest = max((run for run, _ in pairs), key=lambda run: run.date)
    return {
        "arch": latest.device["arch"],
        "device": ", ".join(dict.fromkeys(run.device["name"] for run, _ in pairs)),
        "commit": latest.commit,
    }


def product_kind(row: Row) -> str | None:
    """The kind of product that a row measured, as `custom_ops.tables` calls it; None for other rows."""
    if not row.case.startswith(f"{PRODUCT}_"):
        return None
    return " ".join(row.case.removeprefix(f"{PRODUCT}_").rsplit("_", 1))


def distil_products(pairs: Sequence[tuple[Run, Row]]) -> dict[str, Any]:
    """The winners by kind, N, K and number of tokens; of two devices the one measured last decides."""
    measured = [(run, row) for run, row in pairs if product_kind(row)]
    winners: dict[str, dict[tuple[int, ...], dict[str, Any]]] = {}
    for _, row in sorted(measured, key=lambda pair: pair[0].date):
        tiles = {
            way.removeprefix("tile "): us
            for way, us in row.warm_us.items()
            if way.startswith("tile ")
        }
        if not tiles:
            continue
        tile = min(tiles, key=lambda name: tiles[name])
        us = {"triton": tiles[tile]}
        if "cublaslt" in row.warm_us:
            us["cublaslt"] = row.warm_us["cublaslt"]
        n, k, m = (row.sizes[name] for name in ("n", "k", "tokens"))
        winners.setdefault(str(product_kind(row)), {})[n, k, m] = {
            "n": n,
            "k": k,
            "m": m,
            "implementation": min(us, key=lambda name: us[name]),
            "tile": tile,
            "us": {name: round(time, 2) for name, time in us.items()},
        }
    kinds = {kind: [rows[key] for key in sorted(rows)] for kind, rows in sorted(winners.items())}
    return {**_provenance(measured), PRODUCT: kinds}


def _has_flashinfer(row: Row) -> bool:
    return row.case == BLOCK_PRODUCT and "flashinfer" in row.warm_us


def distil_block_products(pairs: Sequence[tuple[Run, Row]]) -> dict[str, Any]:
    """The winners of block-scaled products where FlashInfer was measured too; elsewhere the op has rules of its own."""
    from custom_ops.gemm.flashinfer_sm90 import KIND

    found: dict[tuple[int, ...], dict[str, Any]] = {}
    for _, row in sorted(pairs, key=lambda pair: pair[0].date):
        if not _has_flashinfer(row):
            continue
        us = {name: row.warm_us[name] for name in BLOCK_WAYS if name in row.warm_us}
        n, k, m = (row.sizes[name] for name in ("n", "k", "tokens"))
        usual = min(us.keys() - {"flashinfer"}, key=lambda name: us[name], default="flashinfer")
        ahead = us["flashinfer"] < NOISE * us[usual]  # it compiles for minutes: not for nothing
        found[n, k, m] = {
            "n": n,
            "k": k,
            "m": m,
            "implementation": "flashinfer" if ahead else usual,
            "tile": "",
            "us": {name: round(time, 2) for name, time in us.items()},
        }
    return {BLOCK_PRODUCT: {KIND: [found[key] for key in sorted(found)]}}


def moe_kind(row: Row) -> str | None:
    """How `custom_ops.moe.choice` calls the weights of a row of `fused_moe` alone; None for other rows."""
    if not row.case.startswith(f"{MOE}_"):
        return None
    return "fp8_block" if row.case.endswith("_fp8_block") else "bfloat16"


def lost_block(row: Row) -> bool:
    """Whether stock was ahead in a block of experts in 16 bits, where its products are grouped_mm's.

    `distil_moe` gives such a place to grouped_mm, which these times are not of.
    """
    ratio = row.ratios.get("plugin_of_inductor", math.inf)
    return row.case.startswith("moe_block_") and row.case.endswith("_bf16") and ratio < NOISE


def distil_moe(pairs: Sequence[tuple[Run, Row]]) -> dict[str, Any]:
    """What each experts took, by kind, sizes and pairs; of two devices the one measured last decides.

    Of a model with a lost block, whose experts were not measured one by one, the blocks count: stock's for grouped_mm.
    """
    measured = [(run, row) for run, row in pairs if moe_kind(row)]
    found: dict[str, dict[tuple[int, ...], dict[str, Any]]] = {}
    names = ("experts", "hidden", "intermediate", "pairs")
    lost = {row.case for _, row in pairs if lost_block(row)}
    blocks = [(run, row) for run, row in pairs if row.case in lost and row.inductor_us is not None]
    for _, row in sorted(measured + blocks, key=lambda pair: pair[0].date):
        us = {
            way.removeprefix("experts "): round(time, 2)
            for way, time in row.warm_us.items()
            if way.startswith("experts ")
        }
        if row.case in lost and row.inductor_us is not None:
            ours = "triton_decode" if row.sizes["tokens"] == 1 else "triton"
            us = {ours: round(row.warm_us["plugin"], 2), "grouped_mm": round(row.inductor_us, 2)}
        if us:
            place = {name: row.sizes[name] for name in names}
            fastest_first = dict(sorted(us.items(), key=lambda item: item[1]))
            kind = moe_kind(row) or "bfloat16"
            found.setdefault(kind, {})[tuple(place.values())] = {
                **place,
                "us": fastest_first,
            }
    kinds = {kind: [rows[key] for key in sorted(rows)] for kind, rows in sorted(found.items())}
    return {**_provenance(measured + blocks), MOE: kinds}


def _is_a_token(row: Row) -> bool:
    """Whether a row of per-tensor quantization says nothing of it: the whole of one token is a token.

    There `token_quant` fires, and is what the row is measured for since.
    """
    return row.sizes.get("tokens") == 1 and str(row.fusion).endswith("tensor_quant")


def _only_ours_runs(row: Row) -> bool:
    """Whether stock raised where the plugin ran: torch._int_mm takes 17 tokens or more, and nothing is behind there."""
    return "inductor" in row.errors and "plugin" in row.warm_us


def verdict(fusion: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Whether a fusion is on, the sentence that says why, and the rows behind it."""
    own = [row for row in rows if row.fusion == fusion]
    judged = [
        row for row in (own or rows) if fusion in row.fired or (own and "plugin" in row.errors)
    ]
    # what failed on one device of the architecture counts as measured where another has the same sizes
    measured = {row.key for row in judged if "plugin_of_inductor" in row.ratios}
    judged = [
        row for row in judged if "plugin_of_inductor" in row.ratios or row.key not in measured
    ]
    judged = [row for row in judged if not (_is_a_token(row) or _only_ours_runs(row))]
    # run without stock, beside rows that were run with it: it says nothing of who is ahead
    if any("plugin_of_inductor" in row.ratios for row in judged):
        judged = [row for row in judged if row.errors or "plugin_of_inductor" in row.ratios]
    nearby = fusion in _by_rows()
    if nearby:  # a size without stock's time is nearest to one that has it
        judged = [
            row for row in judged if "plugin_of_inductor" in row.ratios or "plugin" in row.errors
        ]
    lost = [row for row in judged if lost_block(row)]
    judged = [row for row in judged if not lost_block(row)]
    if not judged:
        return {"on": False, "why": "not measured", "rows": []}
    speedups = [round(row.ratios.get("plugin_of_inductor", 0.0), 3) for row in judged]
    evidence = [
        {"case": row.case, **row.sizes, **(_adapter(row) if nearby else {}), "speedup": speedup}
        for row, speedup in zip(judged, speedups)
    ]
    slow = [speedup for speedup in speedups if speedup < NOISE]
    on = max(speedups) > 1.0 and (not slow or (nearby and min(slow) > 0.0))
    if broken := [row for row in judged if "plugin_of_inductor" not in row.ratios]:
        why = f"{broken[0].label} was not measured"
    else:
        other = "the graph without it" if "off" in judged[0].warm_us else "stock torch.compile"
        span = f"{min(speedups):.2f} to {max(speedups):.2f} times {other}"
        what = "tokens" if "tokens" in judged[0].sizes else "rows"  # a weight has no tokens
        sizes = sorted(row.sizes[what] for row in judged)
        why = f"{'ahead' if on else 'not ahead'}: {span} at {sizes[0]} to {sizes[-1]} {what}"
        if on and slow:
            why += f"; what is nearest to the {len(slow)} of {len(speedups)} rows that are behind is left to stock"
    for row in lost:
        ratio = row.ratios["plugin_of_inductor"]
        why += f"; {ratio:.2f} in {row.case} at {row.sizes['tokens']}, whose products are stock's since (not measured)"
    return {"on": on, "why": why, "rows": evidence}


def _by_rows() -> frozenset[str]:
    from fusion_passes.registered import registry

    return frozenset(name for name, fusion in registry().items() if fusion.measured_as is not None)


def _adapter(row: Row) -> dict[str, str]:
    return {"adapter": "float32" if row.case.endswith("_float32") else "16 bits"}
