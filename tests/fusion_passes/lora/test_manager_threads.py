"""A model with slots, from several threads at once."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from fusion_passes.lora import AdapterCacheFull, AdapterManager
from tests.fusion_passes.lora.managers import Counting, counting

pytestmark = pytest.mark.usefixtures("references")


class Interrupted(Counting):
    """Lets another thread run in the middle of it."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.layers[0](x)
        time.sleep(0.001)
        return first, self.layers[1](x)


@pytest.mark.parametrize("compiled", [False, True])
def test_adapters_are_added_while_another_thread_runs_the_model(compiled: bool) -> None:
    manager = AdapterManager(
        Counting().eval().requires_grad_(False),
        max_loaded=6,
        max_resident=3,
        max_rank=16,
        max_tokens=64,
    )
    if compiled:
        torch.compiler.reset()
        manager.compile(backend="aot_eager", fullgraph=True)
    values = {f"adapter {k}": k for k in range(1, 9)}
    stop, failures = threading.Event(), []
    x = torch.ones(4, 3, 64, dtype=torch.bfloat16)

    def churn(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        while not stop.is_set():
            name = f"adapter {int(torch.randint(1, 9, (), generator=generator))}"
            action = int(torch.randint(0, 8, (), generator=generator))
            try:
                if action == 0:
                    manager.remove(name)
                elif action < 4:
                    manager.add(name, counting(values[name]))
                else:
                    manager.activate(name)
            except (KeyError, ValueError, AdapterCacheFull):
                pass  # another thread was faster, or a step uses every slot
            except BaseException as error:
                failures.append(error)
                raise

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in (1, 2)]
    seen, generator = 0, torch.Generator().manual_seed(0)
    deadline = time.monotonic() + 60
    for thread in threads:
        thread.start()
    try:
        with torch.no_grad():
            while seen < 80 and time.monotonic() < deadline:
                loaded = [info.name for info in manager.list()]
                if len(loaded) < 2:
                    continue
                picks = torch.randint(0, len(loaded), (2,), generator=generator).tolist()
                names = [loaded[picks[0]], None, loaded[picks[1]], loaded[picks[0]]]
                try:
                    outputs = manager(x, adapter_names=names)
                except (KeyError, AdapterCacheFull):
                    continue
                seen += 1
                for output in outputs:
                    wanted = [0 if name is None else values[name] for name in names]
                    found = [output[row].float().unique().tolist() for row in range(4)]
                    assert found == [[value] for value in wanted]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert seen == 80


def test_steps_of_two_threads_do_not_mix() -> None:
    manager = AdapterManager(
        Interrupted().eval().requires_grad_(False),
        max_loaded=4,
        max_resident=2,
        max_rank=16,
        max_tokens=64,
    )
    for k in range(1, 5):
        manager.add(str(k), counting(k))
    wrong: list[Any] = []

    def run(own: tuple[str, str]) -> None:
        x = torch.ones(2, 5, 64, dtype=torch.bfloat16)
        with torch.no_grad():
            for _ in range(20):
                try:
                    outputs = manager(x, adapter_names=own)
                except BaseException as error:
                    wrong.append(error)
                    raise
                for output in outputs:
                    found = [output[row].float().unique().tolist() for row in range(2)]
                    if found != [[float(name)] for name in own]:
                        wrong.append((own, found))

    threads = [threading.Thread(target=run, args=(own,)) for own in (("1", "2"), ("3", "4"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
