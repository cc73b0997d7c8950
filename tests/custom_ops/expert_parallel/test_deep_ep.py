"""The implementations of DeepEP on CPUs, over a stand-in for its Buffer that refuses what the real one refuses."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import custom_ops
from custom_ops import library
from custom_ops.expert_parallel import (
    ExchangeError,
    buffers,
    deep_ep,
    deep_ep_elastic,
    groups,
    watchdog,
)
from tests.custom_ops.expert_parallel import (
    deep_ep_stand_in,
    low_latency_properties,
    properties,
)
from tests.custom_ops.expert_parallel.processes import spawn

HIGH = {"hiddens": (16, 32, 256, 256), "most_tokens": 24}


def everything(group: str, rank: int, ranks: int) -> dict:
    module = deep_ep_stand_in.install()
    few = 40 if ranks == 2 else 15
    found = {
        "named": properties.named(group, rank, ranks),
        "every code": properties.every_code(group, rank, ranks),
        "high": properties.random_routings(group, rank, ranks, 0, 3 * few, **HIGH),
        "low": low_latency_properties.random_routings(group, rank, ranks, few // 2, (2048, 384)),
        "strided": strided(group, rank, ranks),
        "made": (module.Buffer.made, sorted(key[2:] for key in buffers._buffers)),
        "timeout": timeout(group, rank, ranks, module),
    }
    buffers.release()
    return found | {"left": len(buffers._buffers), "destroyed": module.Buffer.destroyed}


def elastic(group: str, rank: int, ranks: int) -> Counter[str]:
    """The other buffer of DeepEP 2, with the first one left out."""
    module = deep_ep_stand_in.install()
    os.environ["CUSTOM_OPS_DISABLE"] = "triton,deep_ep"
    used: Counter[str] = Counter()
    for seed in range(90):
        drawn = properties.draw(ranks, seed, hiddens=(256, 512, 40))
        dtype, scales = ((torch.bfloat16, 0), (properties.FP8, 3), (torch.float32, 0))[seed % 3]
        lowest = 0 if seed % 2 else -1
        case = replace(drawn, distinct=True, lowest=lowest, highest=2 * ranks, experts=2 * ranks)
        top_k, most = min(drawn.top_k, 2 * ranks), drawn.max_tokens
        case = replace(case, dtype=dtype, groups=scales, top_k=top_k, max_tokens=most)
        names = [f"ep_dispatch {n}" for n in ("deep_ep_elastic", "reference")]
        known = dtype == torch.float32 or not most or drawn.hidden == 40
        try:
            ran = properties.check(case, group, rank, elastic=not known)
        except Exception as error:
            raise AssertionError(f"{case}") from error
        assert (names[known] in ran) == (names[not known] not in ran)
        used.update(ran)
    made = len(buffers._buffers)
    buffers.release()
    assert module.Buffer.destroyed == made > 0
    return used


@pytest.mark.parametrize("ranks", [2, 4])
def test_elastic_equals_the_reference(tmp_path, ranks):
    for found in spawn(elastic, ranks, tmp_path, ranks):
        assert isinstance(found, Counter), found
        for op in ("ep_dispatch", "ep_combine"):
            assert found[f"{op} deep_ep_elastic"] > 3
            assert found[f"{op} reference"] > 3


def strided(group: str, rank: int, ranks: int) -> bool:
    """Tokens, weights and results that DeepEP could not read where they are."""
    wide = (torch.arange(4 * 257, dtype=torch.float32) % 251).view(4, 257).bfloat16()
    ids = torch.zeros(2, 4, dtype=torch.int64).t()
    weights = torch.rand(2, 4).t()
    for x in (wide[:, 1:], wide[:, :256], wide.flatten()[1:1025].view(4, 256)):
        out = custom_ops.ep_dispatch(x, None, ids, weights, ranks, group)
        if rank == 0:
            assert torch.equal(out[0], x.repeat(ranks, 1))
        y = torch.cat([out[0], out[0]], 1)[:, :256]
        assert torch.equal(custom_ops.ep_combine(y, *out[5:], group), x)
    return True


def timeout(group: str, rank: int, ranks: int, module: Any) -> str:
    """What DeepEP says after its own time-out names neither the op nor a rank."""

    def dispatch(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("DeepEP error: CPU recv timeout")

    x, ids = torch.ones(2, 16).bfloat16(), torch.zeros(2, 1, dtype=torch.int64)
    args = x, None, ids, torch.ones(2, 1), ranks, group
    kept = module.Buffer.dispatch
    if rank != 0:
        custom_ops.ep_dispatch(*args[:2], ids, torch.ones(2, 1), ranks, group)
        return ""
    custom_ops.ep_dispatch(*args)
    module.Buffer.dispatch = dispatch
    with pytest.raises(ExchangeError) as caught:
        custom_ops.ep_dispatch(*args)
    module.Buffer.dispatch = kept
    buffers._failed = False  # here nobody is gone
    return str(caught.value)


@pytest.mark.parametrize("ranks", [2, 4])
def test_it_equals_the_reference(tmp_path, ranks):
    """Bit for bit: what arrives, the handles, what comes back; whichever of the two each op of a pair runs on."""
    for rank, found in enumerate(spawn(everything, ranks, tmp_path, ranks)):
        assert isinstance(found, dict), found
        assert found["named"] == list(properties.named_cases(ranks))
        assert found["strided"]
        for op in ("ep_dispatch", "ep_combine"):
            assert found["high"][f"{op} deep_ep"] > 5
            assert found["high"][f"{op} reference"] > 5
            assert found["low"][f"{op}_low_latency deep_ep_low_latency"] > 1
            assert found["low"][f"{op}_low_latency reference"] > 1
        # One for each size and for whether the host waits, whatever the dtypes and however often they are used.
        made, keys = found["made"]
        assert made == len(keys) == len(set(keys))
        for mode in ("counted", "not counted"):
            assert {key[2] for key in keys if key[:2] == ("high_throughput", mode)} >= {64, 512}
        assert (found["left"], found["destroyed"]) == (0, made)
        if rank == 0:
            message = found["timeout"]
            assert message.startswith(f"ep_dispatch: rank 0 of {ranks} (group ")
            assert message.endswith("DeepEP error: CPU recv timeout")


@pytest.fixture
def supported(monkeypatch):
    """DeepEP as if it were installed, and a group of so many ranks without any processes."""
    monkeypatch.setattr(deep_ep, "why_not", lambda device: None)
    sizes = SimpleNamespace(ranks=2)
    monkeypatch.setattr(groups, "size", lambda op, group: sizes.ranks)
    library._usable.cache_clear()
    yield sizes
    library._usable.cache_clear()


def dispatch_arguments(hidden: int = 64, top_k: int = 2, experts: int = 8, **more: Any) -> tuple:
    x = torch.zeros(3, hidden, dtype=more.get("dtype", torch.bfloat16))
    scale = torch.zeros(3, more["groups"]) if "groups" in more else None
    ids, weights = torch.zeros(3, top_k, dtype=torch.int64), torch.zeros(3, top_k)
    return x, scale, ids, weights, experts, "0"


@pytest.mark.parametrize(
    ("arguments", "ranks", "reason"),
    [
        ({"hidden": 40}, 2, "rows of a multiple of 32 and at most 16368 bytes, those of x have 80"),
        ({"hidden": 8192}, 2, "at most 16368 bytes, those of x have 16384"),
        ({"top_k": 33}, 2, "takes at most 32 experts for a token, here are 33"),
        ({"experts": 512}, 2, "takes at most 128 experts for a rank, here are 256"),
        ({}, 3, "takes 2, 4 or 8 ranks, group '0' has 3"),
        ({"groups": 1}, 2, "takes scales with codes of 8 bits, x is torch.bfloat16"),
        ({"groups": 129, "dtype": torch.int8}, 2, "takes at most 128 scales for a token"),
    ],
)
def test_explain_says_why_not(supported, arguments, ranks, reason):
    supported.ranks = ranks
    choice = custom_ops.explain("ep_dispatch", *dispatch_arguments(**{"experts": 24} | arguments))
    assert choice.implementation.name == "reference"
    assert reason in choice.rejected["deep_ep"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn, torch.int8])
def test_rows_of_any_dtype_go(supported, dtype):
    choice = custom_ops.explain("ep_dispatch", *dispatch_arguments(dtype=dtype))
    assert (choice.implementation.name, choice.rejected) == ("deep_ep", {})


def test_sums_of_bfloat16_only(supported):
    handle = [torch.zeros(s, dtype=torch.int32) for s in ((3, 2), (5,), (2, 2), (2, 10))]
    for dtype, name in {torch.bfloat16: "deep_ep", torch.float32: "reference"}.items():
        y = torch.zeros(5, 256, dtype=dtype)
        choice = custom_ops.explain("ep_combine", y, *handle, "0")
        assert choice.implementation.name == name
    assert choice.rejected["deep_ep"] == "adds up bfloat16 only, y is torch.float32"
    choice = custom_ops.explain("ep_combine", torch.zeros(5, 320).bfloat16(), *handle, "0")
    assert "takes rows of a multiple of 512 and at most" in choice.rejected["deep_ep"]


def test_elastic_is_for_those_who_leave_the_other_out(supported, monkeypatch):
    monkeypatch.setattr(deep_ep_elastic, "why_not", lambda device: None)
    x = torch.zeros(3, 256).bfloat16()
    args = x, None, *dispatch_arguments(experts=24)[2:]

    def reason(**kwargs: int) -> str:
        library._usable.cache_clear()
        choice = custom_ops.explain("ep_dispatch", *args, **kwargs)
        assert choice.implementation.name == "reference"
        return choice.rejected["deep_ep_elastic"]

    supported.ranks = 3
    assert "deep_ep.Buffer is there, and measured" in reason(max_tokens=6)
    supported.ranks = 2
    monkeypatch.setenv("CUSTOM_OPS_DISABLE", "deep_ep")
    assert reason() == "needs max_tokens"
    choice = custom_ops.explain("ep_dispatch", *args, max_tokens=6)
    assert choice.implementation.name == "deep_ep_elastic"


def test_without_deep_ep_2_there_is_no_elastic_buffer(supported, monkeypatch):
    deep_ep_elastic._has_elastic.cache_clear()
    device = torch.device("cpu")
    assert deep_ep_elastic.why_not(device) == "this deep_ep has no ElasticBuffer (DeepEP 2)"


def test_one_host_only(supported, monkeypatch):
    supported.ranks = 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    choice = custom_ops.explain("ep_dispatch", *dispatch_arguments())
    assert "takes the GPUs of one host" in choice.rejected["deep_ep"]


@pytest.mark.parametrize(
    ("hidden", "top_k", "most", "reason"),
    [
        (7168, 8, 128, None),
        (7168, 12, 128, "takes at most 11 experts for a token, here are 12"),
        (3072, 8, 128, "takes rows of 2048, 2560, 4096, 5120, 6144, 7168, 8192 elements, here are"),
        (7168, 8, 3, "takes a multiple of 4 of rows for each expert"),
    ],
)
def test_explain_says_why_not_low_latency(supported, hidden, top_k, most, reason):
    x, ids = torch.zeros(3, hidden).bfloat16(), torch.zeros(3, top_k, dtype=torch.int64)
    choice = custom_ops.explain("ep_dispatch_low_latency", x, ids, 16, most, "0")
    assert choice.implementation.name == ("reference" if reason else "deep_ep_low_latency")
    assert not reason or reason in choice.rejected["deep_ep_low_latency"]


def test_a_cpu_says_why_not():
    assert deep_ep.why_not(torch.device("cpu")) == "needs a CUDA tensor, this one is on cpu"


class Event:
    """An event that is reached, or not, or that says that the GPU failed."""

    def __init__(self, done: bool | Exception) -> None:
        self.done = done

    def query(self) -> bool:
        if isinstance(self.done, Exception):
            raise self.done
        return self.done


@pytest.fixture
def dog(monkeypatch):
    """A watchdog without a thread, what it ended the process with, and a group whose rank 1 did not answer."""
    pg = SimpleNamespace(rank=lambda: 0, size=lambda: 2)
    monkeypatch.setattr(groups, "resolve", lambda op, group: pg)
    monkeypatch.setattr(groups, "absent", lambda op, pg: [1])
    codes: list[int] = []
    watching = watchdog.Watchdog(codes.append)
    watching.thread = SimpleNamespace()  # type: ignore[assignment]
    return watching, codes


def test_the_watchdog_drops_what_is_done(dog, capsys):
    watching, codes = dog
    events = [Event(True), Event(True), Event(False), Event(True)]
    for event in events:
        watching.add("ep_combine", "0", event, 5.0)
    watching.look(time.monotonic())
    assert watching.spare == events[:2]
    assert len(watching.pending) == 2
    assert not codes
    assert not capsys.readouterr().err


def test_the_watchdog_names_the_first_op_that_hangs(dog, capsys):
    watching, codes = dog
    watching.add("ep_combine_low_latency", "0", Event(False), 5.0)
    watching.add("ep_dispatch_low_latency", "0", Event(False), 5.0)
    watching.look(time.monotonic() + 6)
    assert codes == [watchdog.EXIT_CODE]
    said = capsys.readouterr().err
    assert said.startswith("ep_combine_low_latency: rank 0 of 2 (group '0') got no answer from")
    assert "ranks [1]: nothing for 5.0 s" in said


def test_the_watchdog_names_the_op_in_which_a_gpu_failed(dog, capsys):
    """The process goes on: whoever calls CUDA next gets the error."""
    watching, codes = dog
    error = RuntimeError("CUDA error: unspecified launch failure")
    watching.add("ep_combine", "0", Event(error), 5.0)
    watching.look(time.monotonic())
    assert not codes
    assert not watching.pending
    assert "ep_combine: rank 0 of 2" in capsys.readouterr().err
