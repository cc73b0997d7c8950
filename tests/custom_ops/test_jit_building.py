"""Compiling ahead with a stand-in compiler: once for all processes, whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from custom_ops.jit import building, store
from custom_ops.jit.building import CompileError, compile_all, worker_count
from custom_ops.jit.kernel import Kernel, Target
from custom_ops.jit.store import WaitedTooLong
from tests.custom_ops.jit_stand_in import CPU, StandIn, kernels

fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUSTOM_OPS_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return tmp_path


@pytest.fixture
def children() -> Iterator[Callable[..., list[multiprocessing.process.BaseProcess]]]:
    """Starts processes, and ends those that a test leaves."""
    started: list[multiprocessing.process.BaseProcess] = []

    def start(
        function: Callable[..., None], *args: object, count: int = 1
    ) -> list[multiprocessing.process.BaseProcess]:
        new = [fork.Process(target=function, args=args) for _ in range(count)]
        for process in new:
            process.start()
        started.extend(new)
        return new

    yield start
    for process in started:
        if process.is_alive():
            process.kill()
        process.join(10)


def build(
    wanted: list[Kernel], compiler: StandIn, target: Target = CPU, **options: object
) -> building.Outcome:
    return compile_all(wanted, {"stand_in": compiler}, target, **options)  # type: ignore[arg-type]


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_each_kernel_is_compiled_once_and_the_progress_is_known_in_advance() -> None:
    compiler, steps = StandIn(), []
    wanted = kernels(5)
    outcome = build(wanted * 2, compiler, progress=lambda *step: steps.append(step))
    assert sorted(k["tile"] for k in outcome.compiled) == [1, 2, 4, 8, 16]
    assert compiler.count() == 5
    assert [step[:2] for step in steps] == [(done, 5) for done in range(6)]
    assert all(compiler.output(k).read_text() == f"half whole {k['tile']}" for k in wanted)


def test_a_second_start_compiles_nothing_and_takes_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = StandIn()
    build(kernels(3), compiler)
    monkeypatch.setattr(building.subprocess, "Popen", None)  # any process would be a TypeError
    monkeypatch.setattr(store, "locked", None)
    outcome = build(kernels(3), StandIn())
    assert len(outcome.found) == 3
    assert outcome.compiled == []


@pytest.mark.parametrize(
    ("toolchain", "target"),
    [
        ("2", CPU),
        ("1", Target("9.0a")),
        ("1", Target("cpu", driver="580.1")),
    ],
    ids=["version", "architecture", "driver"],
)
def test_another_environment_misses(toolchain: str, target: Target) -> None:
    build(kernels(2), StandIn())
    outcome = build(kernels(2), StandIn(toolchain=toolchain), target)
    assert len(outcome.compiled) == 2


@given(keep=st.floats(0, 0.99), garbage=st.booleans())
def test_a_truncated_or_changed_file_is_built_again(keep: float, garbage: bool) -> None:
    compiler, (kernel,) = StandIn(), kernels(1)
    build([kernel], compiler)
    path = compiler.output(kernel)
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)) if garbage else whole[: int(keep * len(whole))])
    assert build([kernel], compiler).compiled == [kernel]
    assert path.read_bytes() == whole


@given(damage=st.sampled_from([b"", b"{", b"[]", b"null", b"{}", b'{"files": 3}', b"\xff"]))
def test_a_damaged_marker_is_no_marker(damage: bytes) -> None:
    compiler, (kernel,) = StandIn(), kernels(1)
    build([kernel], compiler)
    store.marker(compiler, kernel, CPU).write_bytes(damage)
    assert build([kernel], compiler).compiled == [kernel]


def test_a_kernel_that_fails_is_named_and_the_others_are_compiled() -> None:
    compiler = StandIn(fails=frozenset({2, 8}))
    with pytest.raises(CompileError, match="2 of 4 kernels failed") as caught:
        build(kernels(4), compiler)
    assert "tile 2 does not compile" in str(caught.value)
    assert "tile 8 does not compile" in str(caught.value)
    again = build(kernels(4), StandIn())
    assert sorted(k["tile"] for k in again.compiled) == [2, 8]


def test_a_failed_kernel_leaves_no_private_folder(cache: Path) -> None:
    with pytest.raises(CompileError):
        build(kernels(1), StandIn(fails=frozenset({1})))
    assert list((cache / "jit" / "private").iterdir()) == []


def test_they_run_at_the_same_time() -> None:
    compiler = StandIn(sleep=0.5)
    outcome = build(kernels(4), compiler, workers=4)
    assert outcome.workers == 4
    assert outcome.wall < 0.75 * sum(outcome.seconds.values())


@given(
    cores=st.integers(1, 256),
    free=st.integers(0, 1 << 40),
    count=st.integers(1, 1000),
    memory=st.integers(1, 1 << 36),
)
def test_no_more_workers_than_cores_memory_and_kernels_allow(
    cores: int, free: int, count: int, memory: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building.os, "sched_getaffinity", lambda pid: range(cores))
        patch.setattr(building, "free_memory", lambda: free)
        workers = worker_count(count, memory)
    assert 1 <= workers <= min(cores, count)
    assert workers == 1 or workers * memory <= free


def test_free_memory_is_what_the_system_says() -> None:
    assert 1 << 20 < building.free_memory() < 1 << 50


def test_eight_processes_that_start_cold_compile_each_kernel_once(children) -> None:
    compiler = StandIn(sleep=0.2)
    processes = children(build, kernels(4), compiler, count=8)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    assert compiler.count() == 4
    assert all(store.is_compiled(compiler, kernel, CPU) for kernel in kernels(4))


def test_eight_processes_with_overlapping_wishes_compile_each_kernel_once(children) -> None:
    compiler = StandIn(sleep=0.1)
    processes = []
    for first in range(8):
        processes += children(build, kernels(9)[first // 2 : first // 2 + 5], compiler)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 8
    assert compiler.count() == 8


def test_after_a_killed_writer_the_next_start_recovers(children, cache: Path) -> None:
    (process,) = children(build, kernels(2), StandIn(sleep=2))
    until(lambda: StandIn().count() == 2)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert not any(store.is_compiled(StandIn(), kernel, CPU) for kernel in kernels(2))
    outcome = build(kernels(2), StandIn(), timeout=5)
    assert len(outcome.compiled) == 2
    assert list((cache / "jit" / "private").iterdir()) == []


def _interrupted() -> None:
    # A shell ignores SIGINT in what it starts in the background, such as a run of these tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        build(kernels(4), StandIn(sleep=30), workers=3)
    except KeyboardInterrupt:
        os._exit(7)


def test_ctrl_c_ends_the_compilers_and_keeps_what_is_done(children, cache: Path) -> None:
    build(kernels(1), StandIn())
    start = time.monotonic()
    (process,) = children(_interrupted)
    until(lambda: StandIn().count() == 4)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode == 7
    assert time.monotonic() - start < 20  # and not the 30 s that its compilers sleep
    assert store.is_compiled(StandIn(), kernels(1)[0], CPU)
    assert list((cache / "jit" / "private").iterdir()) == []
    assert len(build(kernels(4), StandIn()).compiled) == 3


def test_waiting_too_long_names_who_holds_the_lock(children, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    (process,) = children(build, kernels(1), StandIn(sleep=20))
    until(lambda: StandIn().count() == 1)
    with pytest.raises(WaitedTooLong, match="waited 0 s for process") as caught:
        build(kernels(1), StandIn(), timeout=0.3)
    for part in (str(process.pid), os.uname().nodename, "local rank 0", "since 20", "1 kernels"):
        assert part in str(caught.value)


def test_the_other_ranks_leave_the_lock_to_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "HEAD_START", 0.3)
    monkeypatch.setenv("LOCAL_RANK", "3")
    start = time.monotonic()
    assert len(build(kernels(1), StandIn()).compiled) == 1  # rank 0 never came
    assert time.monotonic() - start >= 0.3


def test_a_marker_names_the_environment_that_it_is_for() -> None:
    compiler, (kernel,) = StandIn(toolchain="9"), kernels(1)
    build([kernel], compiler)
    assert '"toolchain": "9"' in store.marker(compiler, kernel, CPU).read_text()


def test_what_another_way_compiled_whole_is_adopted(cache: Path) -> None:
    class Adopting(StandIn):
        def existing(self, kernel: Kernel, target: Target) -> list[Path]:
            return [cache / "theirs"]

    (cache / "theirs").write_text("a library")
    outcome = build(kernels(1), Adopting())
    assert outcome.compiled == []
    assert StandIn().count() == 0
