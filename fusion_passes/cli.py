"""`fusion-passes list | explain | doctor | build | warmup | demo`, each with `--json`."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fused kernels for stock PyTorch models: torch.compile(model, backend='fusion_passes').",
)
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of tables")]

# Import name -> what having it unlocks.
OPTIONAL = {
    "triton": "the Triton kernels of every op",
    "deep_gemm": "block_scaled_mm on Hopper's FP8 tensor cores (extra: deepgemm)",
    "tvm_ffi": "loading DeepGEMM (extra: deepgemm)",
    "flashinfer": "FlashInfer's kernels (extra: flashinfer)",
    "deep_ep": "experts on several GPUs by DeepEP in place of NCCL (no extra: it is built from its sources)",
    "transformers": "`fusion-passes demo`, and the models to compile (extra: models)",
    "peft": "models with LoRA adapters (extra: models)",
    "safetensors": "loading block-FP8 checkpoints and adapters (extra: models or lora)",
}


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List every fusion, its toggle, its state on this machine, and why."""
    from fusion_passes import settings
    from fusion_passes.registered import registry

    arch = _arch()
    with _clear_errors():
        current = settings.current()
    rows = []
    for fusion in registry().values():
        on, why = current.enabled(fusion.name, *fusion.default_state(arch))
        rows.append(
            {
                "fusion": fusion.name,
                "summary": fusion.summary,
                "variable": fusion.environment_variable,
                "on": on,
                "why": why,
            }
        )
    if as_json:
        _print_json({"arch": arch, "fusions": rows})
        return
    toggle = Column("toggle", no_wrap=True)  # to be copied
    table = Table("fusion", toggle, "state", "why", title=f"fusions on {arch}")
    for row in rows:
        state = "[green]on[/]" if row["on"] else "off"
        table.add_row(
            f"{row['fusion']}\n[dim]{row['summary']}[/]",
            str(row["variable"]),
            state,
            str(row["why"]),
        )
    _console().print(table)
    if arch == "cpu" and not current.allow_reference:
        _console().print(
            "A CPU has reference implementations only, so a fusion that is on fires here only with "
            "FUSION_PASSES_ALLOW_REFERENCE=1."
        )


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show the machine, its toolkits and optional packages, and what each unlocks."""
    import torch

    from custom_ops import cuda_build, library, platform
    from fusion_passes import torch_internals

    build = cuda_build.status()
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    facts = {
        "python": sys.version.split()[0],
        "torch": torch.__version__
        + ("" if torch_internals.is_supported() else " (not supported: compiles unfused)"),
        "GPU": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "architecture": _arch(),
        "nvcc": f"{build.toolkit} at {build.nvcc}"
        if build.nvcc
        else "none: CUDA C++ kernels cannot be built here",
        "CUDA C++ kernels": build.why_not or "usable",
        "built": ", ".join(build.built) or "nothing yet: `fusion-passes build`, or the first use",
        "cache": str(build.cache_dir),
    }
    packages = {
        name: platform.package_version(name) if platform.has_package(name) else None
        for name in OPTIONAL
    }
    ops = {name: list(op.usable(device)) for name, op in library.ops().items()}
    if as_json:
        _print_json({"machine": facts, "packages": packages, "ops": ops})
        return
    console = _console()
    machine = Table("", "", title="machine", show_header=False)
    for name, fact in facts.items():
        machine.add_row(name, fact)
    console.print(machine)
    optional = Table("package", "version", "unlocks", title="optional packages")
    for name, version in packages.items():
        optional.add_row(name, version or "[yellow]missing[/]", OPTIONAL[name])
    console.print(optional)
    usable = Table(
        "op", "implementations usable here, preferred first", title=f"custom_ops on {device.type}"
    )
    for name, names in ops.items():
        usable.add_row(name, ", ".join(names))
    console.print(usable)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def explain(context: typer.Context, script: Path, as_json: Json = False) -> None:
    """Run SCRIPT with its arguments, every torch.compile in it on this backend, and print the reports.

    Options of this command go before SCRIPT. What the script prints goes to stderr with --json.
    """
    if not script.is_file():
        raise typer.BadParameter(f"there is no file {script}", param_hint="SCRIPT")
    import fusion_passes

    fusion_passes.reset_reports()
    output, arguments, path = sys.stdout, sys.argv, list(sys.path)
    try:
        if as_json:
            sys.stdout = sys.stderr
        sys.argv = [str(script), *context.args]
        sys.path.insert(0, str(script.resolve().parent))
        with _clear_errors(), _backend_forced():
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            raise
    finally:
        sys.stdout, sys.argv, sys.path[:] = output, arguments, path
    reports = fusion_passes.reports()
    if as_json:
        _print_json([json.loads(report.to_json()) for report in reports])
        return
    for report in reports:
        print(report)
    if not reports:
        _console().print(f"{script} compiled nothing: it has to call what torch.compile returned")
        raise typer.Exit(1)


@app.command()
def build(
    arch: Annotated[
        list[str] | None, typer.Option(help="such as 9.0a, repeatable; this GPU's if not given")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build the CUDA C++ kernels ahead of time."""
    from custom_ops import cuda_build

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with (
        _clear_errors(RuntimeError, ValueError),
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task("nothing to do", total=0, visible=False)

        def advance(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what, visible=True)

        folder = cuda_build.build(arch, advance)
        progress.update(task, visible=True)
    status = cuda_build.status()
    if as_json:
        _print_json({"cache": str(folder), "built": list(status.built)})
    else:
        _console().print(f"{', '.join(status.built)} in {folder}")


@app.command()
def warmup(
    plan: Path,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="processes at once; what cores and memory allow if not given"),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0, help="seconds to wait for another process that compiles")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile every kernel of PLAN, which `warmup_plan().to_json()` wrote. Needs no GPU and no model."""
    from custom_ops.jit.building import CompileError
    from custom_ops.jit.store import WaitedTooLong
    from fusion_passes import warming

    if not plan.is_file():
        raise typer.BadParameter(f"there is no file {plan}", param_hint="PLAN")
    with _clear_errors(ValueError, CompileError, WaitedTooLong):
        read = warming.WarmupPlan.from_json(plan.read_text())
        outcome = warming.warmup(
            plan=read, load=False, workers=workers, timeout=timeout, progress=True
        )
    if as_json:
        _print_json(
            {
                "kernels": len(read.kernels),
                "compiled": [kernel.to_json() for kernel in outcome.compiled],
                "found": len(outcome.found),
                "seconds": outcome.wall,
            }
        )
        return
    _console().print(
        f"{len(outcome.compiled)} kernels compiled, {len(outcome.found)} found compiled, "
        f"in {outcome.wall:.1f} s"
    )


@app.command()
def demo(as_json: Json = False) -> None:
    """Compile small stock models with the plugin and compare their logits with eager's.

    Exits with 1 when a model differs or nothing fires in it.
    """
    from fusion_passes.demo import SLACK, run

    log = Console(stderr=True)
    results = run(_device_type(), progress=lambda text: log.print(f"[dim]{text}[/]"))
    if as_json:
        _print_json([result.as_dict() for result in results])
    else:
        print(results[-1].report)
        title = "logits: norm of the difference over the norm"
        columns = (
            "eager, to float32",
            "fused, to float32",
            "fused, to eager",
            "same next token",
            "verdict",
        )
        table = Table("model", "fused", *columns, title=title, show_lines=True)
        for result in results:
            table.add_row(
                f"{result.model}, {result.weights}",
                "\n".join(f"{count} {name}" for name, count in result.matches.items()),
                *(
                    f"{error:.2e}"
                    for error in (result.eager_error, result.error, result.difference)
                ),
                f"{result.same_token:.1%}",
                "[green]same[/]" if result.passed else "[red]differs[/]",
            )
        _console().print(table)
        _console().print(f"same: no more than {SLACK:g} times as far from float32 as eager is")
    raise typer.Exit(not all(result.passed for result in results))


@contextmanager
def _backend_forced() -> Iterator[None]:
    """Every torch.compile on this backend, whatever backend it names."""
    import torch

    original: Callable[..., Any] = torch.compile

    def compile_with_plugin(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "backend": "fusion_passes"})

    torch.compile = compile_with_plugin
    try:
        yield
    finally:
        torch.compile = original


@contextmanager
def _clear_errors(*expected: type[Exception]) -> Iterator[None]:
    """What a user got wrong is a line on stderr and exit code 2, not a traceback."""
    from fusion_passes.settings import SettingsError

    try:
        yield
    except Exception as error:
        cause = getattr(error, "inner_exception", error)  # Dynamo wraps what a backend raises
        if not isinstance(cause, (SettingsError, *expected)):
            raise
        print(f"{type(cause).__name__}: {cause}", file=sys.stderr)
        raise typer.Exit(2) from None


def _device_type() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _arch() -> str:
    import torch

    from fusion_passes import tables

    return tables.arch_of(torch.device(_device_type()))


def _console() -> Console:
    # a log has no width of its own, and eighty columns fold the tables
    return Console(width=None if sys.stdout.isatty() else 160)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))
