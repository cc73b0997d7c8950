"""`python -m bench.lora_model`: a step of a Llama-3-8B-shaped model with adapters on all linears, beside PEFT's.

A step is rows of tokens without a cache: at 1 token one row, else 32 rows, each with an adapter of its own, all of the
same length. A row of the results has the microseconds of a step, divided by the layers:

    base, base_plugin       the model without adapters, by stock torch.compile and by the plugin
    adapters                an AdapterManager's model with all adapters, by the plugin
    peft_single             PEFT with one adapter for all rows, by stock torch.compile
    peft_single_plugin      the same by the plugin, with lora_linear and shared_lora_shrink
    peft_mixed              PEFT's adapter_names, eagerly

All but the last are in CUDA graphs; that one waits for the GPU in each layer, and is wall clock. Adapters are in 16
bits (PEFT's default is float32).
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench import ahead, results
from bench.case import activation, close
from bench.results import FOLDER, Row
from bench.suites.layer import FULL, TINY, Stack
from bench.timer import Timer, timer_for

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CLOSE = 3e-2  # of norms, after some layers in 16 bits
WAYS = ("adapters", "base", "peft_mixed", "peft_single", "base_plugin", "peft_single_plugin")


class Models:
    """The model without adapters, with PEFT's, and with slots that have the same adapters."""

    def __init__(
        self, device: torch.device, layers: int, adapters: int, rank: int, tiny: bool
    ) -> None:
        import peft

        from fusion_passes.lora import from_peft

        torch.manual_seed(0)
        sizes = TINY if tiny else FULL
        self.hidden = sizes["hidden"]
        self.base = Stack(sizes, device).requires_grad_(False)
        more = [layer for _ in range(layers - 1) for layer in Stack(sizes, device).layers]
        self.base.layers = nn.ModuleList([*self.base.layers, *more]).requires_grad_(False)
        config = {"r": rank, "lora_alpha": 2 * rank, "target_modules": [*TARGETS]}
        self.names = [f"adapter_{index}" for index in range(adapters)]
        model: Any = copy.deepcopy(self.base)
        with torch.device(device):  # random numbers are made where they are needed
            for index, name in enumerate(self.names):
                # random, not zeros, in B: a wrong adapter would look right
                each = peft.LoraConfig(**config, init_lora_weights=False)
                if index == 0:
                    model = peft.get_peft_model(model, each, name, autocast_adapter_dtype=False)
                else:
                    model.add_adapter(name, each, autocast_adapter_dtype=False)
        self.peft = model.to(device).eval().requires_grad_(False)
        self.manager = from_peft(copy.deepcopy(self.peft))

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.base.layers.parameters())


# one process may compile several ways of the same models
_models = functools.lru_cache(maxsize=1)(Models)


def rows_of(tokens: int, adapters: int) -> int:
    return min(tokens, adapters)


@contextmanager
def way(
    models: Models, name: str, hidden: Tensor, names: list[str]
) -> Iterator[Callable[[], Tensor]]:
    """A step, ready to be called, of one way of running the model."""
    from fusion_passes import backend

    stock: dict[str, Any] = {"dynamic": False}
    # the function, not its name: a checkout that is not installed has no entry point
    plugin: dict[str, Any] = {"dynamic": False, "backend": backend.fusion_passes}
    count = hidden.shape[1]
    step: Any = nullcontext()
    if name in ("base", "base_plugin"):
        compiled = torch.compile(models.base, **(stock if name == "base" else plugin))
    elif name == "adapters":
        compiled, step = (
            torch.compile(models.manager.model, **plugin),
            models.manager.step(names, count),
        )
    elif name == "peft_mixed":
        compiled = functools.partial(models.peft, adapter_names=names)
    else:
        models.peft.set_adapter(models.names[0])
        models.peft.requires_grad_(False)  # which set_adapter undoes
        one = {**plugin, "options": {"fusions": "default,+lora_linear,+shared_lora_shrink"}}
        compiled = torch.compile(models.peft, **(stock if name == "peft_single" else one))
    with step:
        if hidden.is_cuda:
            torch.cuda.synchronize()  # what fills the slots is on another stream than a capture
        yield lambda: compiled(hidden)


def compile_one(name: str, tokens: int, layers: int, adapters: int, rank: int, tiny: bool) -> None:
    """Compile what a way of a step needs, into Inductor's cache on the disk. What raises says so when it is timed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = _models(device, layers, adapters, rank, tiny)
    rows = rows_of(tokens, adapters)
    hidden = activation(device, rows, tokens // rows, models.hidden)
    torch.compiler.reset()
    step = way(models, name, hidden, models.names[:rows])
    with torch.no_grad(), ahead.unlaunched(), suppress(Exception), step as call:
        call()


def wall_clock(call: Callable[[], Tensor], runs: int = 5) -> float:
    """Microseconds of a call, with what the host does; the median."""
    times = []
    for _ in range(runs + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e6 * sorted(times[1:])[runs // 2]


def empty_row(models: Models, tokens: int) -> Row:
    """The row of a step, before anything is measured."""
    rows, layers = rows_of(tokens, len(models.names)), len(models.base.layers)
    rank = models.manager.max_rank
    sizes = {"tokens": tokens, "adapters": rows, "layers": layers, "rank": rank}
    row = Row("lora_model_llama_3_8b", sizes, moved_bytes=2 * models.parameters() // layers)
    row.flops = 2 * tokens * models.parameters() // layers
    return row


def measure(models: Models, name: str, row: Row, timer: Timer) -> None:
    """One way of a row. Where it raises, or differs from the eager model, that is an error in the row."""
    tokens, rows = row.sizes["tokens"], row.sizes["adapters"]
    names = models.names[:rows]
    hidden = activation(next(models.base.parameters()).device, rows, tokens // rows, models.hidden)
    expected: dict[str, Callable[[], Tensor]] = {
        "adapters": lambda: models.peft(hidden, adapter_names=names),
        "base": lambda: models.base(hidden),
    }
    torch.compiler.reset()
    try:
        with torch.no_grad(), way(models, name, hidden, names) as call:
            result = call()
            wanted = expected.get(name.removesuffix("_plugin"), call)()
            if problem := close(CLOSE)(wanted, result):
                raise AssertionError(f"differs from eager: {problem}")
            clock = wall_clock if name == "peft_mixed" else timer.warm
            row.warm_us[name] = clock(call) / row.sizes["layers"]
    except Exception as error:  # one way must not cost the others their device time
        row.errors[name] = f"{type(error).__name__}: {error}".splitlines()[0][:400]
    if "adapters" in row.warm_us:
        ours = row.warm_us["adapters"]
        row.ratios = {f"of_{n}": us / ours for n, us in row.warm_us.items() if n != "adapters"}


def main(
    tokens: Annotated[list[int], typer.Option(help="tokens of a step")] = [1, 32, 256, 2048],  # noqa: B006
    layers: Annotated[int, typer.Option(help="decoder layers; times are per layer")] = 2,
    adapters: int = 32,
    rank: int = 16,
    seconds: Annotated[float, typer.Option(help="begin nothing new after so long")] = 100.0,
    ahead_seconds: Annotated[
        float, typer.Option(help="compile all ways side by side first, for no longer")
    ] = 0.0,
    way: Annotated[
        list[str] | None, typer.Option(help=f"of {', '.join(WAYS)}; all if not given")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for the JSON file")] = FOLDER,
    tiny: Annotated[bool, typer.Option(help="tiny sizes, to test this on a CPU")] = False,
    commit: Annotated[str, typer.Option(help="the commit, where git is not at hand")] = "",
) -> None:
    """Measure. Exits with 1 when a way raised or gave a wrong result."""
    console = Console(width=160)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timer = timer_for(device)
    for name in way or ():
        if name not in WAYS:
            raise typer.BadParameter(f"no way {name!r}; accepted: {', '.join(WAYS)}")
    if ahead_seconds > 0:
        sizes = layers, adapters, rank, tiny
        compiled = [name for name in way or WAYS if name != "peft_mixed"]
        tasks = [
            functools.partial(compile_one, name, count, *sizes)
            for name in compiled
            for count in tokens
        ]
        console.print(str(ahead.run(tasks, seconds=ahead_seconds)), markup=False)
    ahead._make_keys_alike()
    begun = time.monotonic()
    models = Models(device, layers, adapters, rank, tiny)
    session = results.describe("lora_model", device, timer.name, 0.0)
    session.commit = commit or session.commit
    session.rows = [empty_row(models, count) for count in tokens]
    path = session.save(out)
    for name in way or WAYS:  # in the order of what matters, all numbers of tokens of each
        for row in session.rows:
            if time.monotonic() - begun > seconds:
                break
            measure(models, name, row, timer)
            path = session.save(out)  # after each way: a run that is cut off keeps what it has
            tokens_of_row, us = row.sizes["tokens"], row.warm_us.get(name, float("nan"))
            spent = time.monotonic() - begun
            console.print(f"{spent:.0f} s: {name}, {tokens_of_row} tokens: {us:.1f} us")
    table = Table("tokens", *(f"{name}, us a layer" for name in WAYS), "adapters / base")
    for row in session.rows:
        times = [row.warm_us.get(name) for name in WAYS]
        ratio = 1 / row.ratios["of_base"] if "of_base" in row.ratios else None
        cells = (*times, ratio)
        table.add_row(str(row.sizes["tokens"]), *("" if v is None else f"{v:.2f}" for v in cells))
    console.print(table)
    for row in session.rows:
        for name, error in row.errors.items():
            console.print(f"{row.label}: {name}: {error}", markup=False)
    console.print(f"written to {path}", markup=False)
    raise typer.Exit(any(row.errors for row in session.rows))


if __name__ == "__main__":
    typer.run(main)
