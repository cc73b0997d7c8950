"""Process groups that are destroyed and made anew, with the buffers and the agreements of those before them."""

from __future__ import annotations

import datetime
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import custom_ops
from custom_ops.expert_parallel import ExchangeError, agreement, buffers, groups, release_buffers
from tests.custom_ops.expert_parallel import deep_ep_stand_in, layer_properties, properties
from tests.custom_ops.expert_parallel.processes import spawn

RANKS = 2


def anew(folder: str, name: str, rank: int) -> str:
    """Destroy the group of all and make another."""
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{name}",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=30),
    )
    return torch.distributed.group.WORLD.group_name


def dispatched(group: str, rank: int, hidden: int, max_tokens: int = 0) -> set[str]:
    case = properties.Case(
        (5, 3), 2 * RANKS, 2, hidden, 0, 2 * RANKS, max_tokens=max_tokens, distinct=True
    )
    return properties.check(case, group, rank, elastic=bool(max_tokens))


def gathered(group: str, rank: int, hidden: int) -> str:
    """What a gathering of rows of so many channels says; with the same on both ranks, nothing."""
    case = layer_properties.Case((3, 3), hidden=hidden, inner=8)
    args, how = layer_properties.draw(case, rank, "cpu")
    try:
        custom_ops.ep_fused_moe(*args, group, exchange="gather", max_tokens=4, **how)
    except ExchangeError as error:
        return str(error)
    return ""


def several_groups(group: str, rank: int, folder: str, mode: str) -> dict[str, Any]:
    module = deep_ep_stand_in.install()
    most = 6 * (mode == "elastic")
    with pytest.MonkeyPatch.context() as patched:
        if mode == "elastic":
            patched.setenv("CUSTOM_OPS_DISABLE", "triton,deep_ep")
        found: dict[str, Any] = {"ran": [], "warned": [], "groups": [groups.number("", group)]}
        for turn, hidden in enumerate((256, 512, 256, 512, 512)):
            if turn == 4:  # as one should
                release_buffers()
            if turn:
                group = anew(folder, f"{mode}{turn}", rank)
                found["groups"].append(groups.number("", group))
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                found["ran"].append(sorted(dispatched(group, rank, hidden, most)))
                found["ran"].append(sorted(dispatched(group, rank, hidden, most)))
            found["warned"].append([str(w.message) for w in seen if "earlier group" in str(w)])
            found["gathered"] = gathered(group, rank, 16)
        # Only the first time that sizes are used by a group are they compared: by this one they never were.
        found["said"] = gathered(anew(folder, f"{mode}last", rank), rank, 32 if rank else 16)
    found["made"], found["left"] = module.Buffer.made, len(buffers._buffers)
    release_buffers()
    found["destroyed"], found["agreed"] = module.Buffer.destroyed, len(agreement._agreed)
    return found


@pytest.mark.parametrize("mode", ["high_throughput", "elastic"])
def test_a_group_made_anew_has_buffers_of_its_own(tmp_path, mode):
    """The name is that of the group before. Its buffers are not used, and not freed, which would wait for its ranks."""
    folder = tempfile.mkdtemp(dir=tmp_path)
    name = "deep_ep" if mode == "high_throughput" else "deep_ep_elastic"
    for found in spawn(several_groups, RANKS, tmp_path, folder, mode):
        assert isinstance(found, dict), found
        assert len(set(found["groups"])) == 5
        assert found["ran"] == [[f"ep_combine {name}", f"ep_dispatch {name}"]] * 10
        assert [len(each) for each in found["warned"]] == [0, 1, 1, 1, 0]
        assert (
            "release_buffers() on every rank before destroy_process_group" in found["warned"][1][0]
        )
        assert found["gathered"] == ""
        assert "ep_fused_moe: the last dimension of x is" in found["said"]
        # One in each group; the fourth's was freed in time, and the others' groups were gone.
        assert (found["made"], found["left"], found["destroyed"]) == (5, 1, 1)
        assert found["agreed"]


def two_widths(group: str, rank: int) -> list[set[str]]:
    """Two models in one process, in turns."""
    deep_ep_stand_in.install()
    return [dispatched(group, rank, hidden) for hidden in (256, 768, 256, 768, 1024)]


def test_two_models_of_different_widths(tmp_path):
    for found in spawn(two_widths, RANKS, tmp_path):
        assert isinstance(found, list), found
        assert found == [{"ep_dispatch deep_ep", "ep_combine deep_ep"}] * 5


def test_a_number_is_of_one_group(tmp_path):
    """The same as long as the group is there; another afterwards, and none in between."""
    numbers = []
    for turn in range(2):
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{Path(tmp_path, str(turn))}", rank=0, world_size=1
        )
        name = torch.distributed.group.WORLD.group_name
        numbers.append(groups.number("ep_dispatch", name))
        assert groups.current(name) == groups.number("ep_combine", name) == numbers[-1]
        torch.distributed.destroy_process_group()
        assert groups.current(name) is None
    assert len(set(numbers)) == 2


class Freed:
    """A buffer that notes in which order it was freed."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def destroy(self) -> None:
        self.order.append(self.name)


@pytest.mark.parametrize(
    ("now", "freed"),
    [
        (0, ["high_throughput", "low_latency", "elastic"]),
        (None, ["high_throughput", "low_latency"]),  # an ElasticBuffer needs the communicator
        (1, []),  # whose ranks nobody knows
    ],
)
def test_what_is_freed_of_a_group(monkeypatch, now, freed):
    """now: the number of the group that has the name of the one they were made for, or None."""
    order: list[str] = []
    modes = ("high_throughput", "low_latency", "elastic")
    made = {("0", 0, mode, 64, 0): Freed(mode, order) for mode in modes}
    monkeypatch.setattr(buffers, "_buffers", made)
    monkeypatch.setattr(buffers.groups, "current", lambda group: now)
    buffers.release()
    assert order == freed
    assert not made


def test_nothing_is_freed_after_a_failure(monkeypatch):
    order: list[str] = []
    monkeypatch.setattr(buffers, "_buffers", {("0", 0, "low_latency", 64): Freed("", order)})
    monkeypatch.setattr(buffers, "_failed", True)
    buffers.release()
    assert not order
    assert not buffers._buffers
