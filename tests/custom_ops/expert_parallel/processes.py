"""Processes that are ranks of a gloo group, and what each of them found."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

TIMEOUT_S = 30.0
PRELOADED = ["torch", "custom_ops", "tests.custom_ops.expert_parallel.properties"]


def spawn(
    work: Callable[..., Any],
    ranks: int,
    folder: Path,
    *args: Any,
    timeout_s: float = TIMEOUT_S,
    backend: str = "gloo",
) -> list[Any]:
    """work(group, rank, *args) in each of so many processes; what each returned, "died" where it returned nothing.

    work must be a function of a module. One that raises returns its traceback as a string. backend: with "nccl", each
    rank has a GPU of its own.
    """
    folder = Path(tempfile.mkdtemp(dir=folder))
    given = (work, ranks, folder, timeout_s, backend, args)
    # Ranks are forked off a process that has imported what they need and done nothing else. Not those with a GPU: an
    # import may ask how many there are, and CUDA does not start in a fork of a process that did.
    method = "spawn" if backend == "nccl" else "forkserver"
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(_rank, given, nprocs=ranks, start_method=method)
    results = [folder / f"result_{rank}" for rank in range(ranks)]
    return [torch.load(path) if path.exists() else "died" for path in results]


def _rank(
    rank: int,
    work: Callable[..., Any],
    ranks: int,
    folder: Path,
    timeout_s: float,
    backend: str,
    args: tuple[Any, ...],
) -> None:
    # The interpreter of Triton takes seconds for what the reference does at once.
    os.environ |= {"CUSTOM_OPS_DISABLE": "triton", "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    if backend == "nccl":
        del os.environ["CUSTOM_OPS_DISABLE"]
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend,
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    try:
        result = work(torch.distributed.group.WORLD.group_name, rank, *args)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, folder / f"result_{rank}")
    # Not destroy_process_group: a group that failed would wait for peers that are gone.
    os._exit(0)
