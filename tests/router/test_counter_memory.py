"""Counts of ended workers are neither lost nor counted twice, and nothing is stored on disk."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastdeploy.daemon.router.board.board import BoardError
from fastdeploy.daemon.router.metrics import counter_memory
from fastdeploy.daemon.router.metrics.counter_memory import CounterMemory
from fastdeploy.daemon.router.metrics.metrics import _CounterCollector

from .conftest import RouterProcess
from .fake_engine import FakeEngine, wait_until
from .forked import Forked
from .steady_load import Load, requests_counted, streams_or_answers


@pytest.fixture
def memory() -> Iterator[CounterMemory]:
    memory = CounterMemory(counter_memory.create())
    yield memory
    memory.close()


def counting(memory: CounterMemory, **counts: float) -> Forked:
    """Start a worker that has counted and waits to be ended."""

    def work(parent: Forked) -> None:
        section = memory.own_section()
        for key, value in counts.items():
            section.cell(key.encode())[0] += value
        parent.send("counted")
        parent.receive()

    worker = Forked(work)
    assert worker.receive() == "counted"
    return worker


def test_counts_of_living_and_dead_workers_are_added_up(memory: CounterMemory) -> None:
    workers = [
        counting(memory, a=1.0, b=2.0),
        counting(memory, b=30.0),
        counting(memory, b=400.0, c=5000.0),
    ]
    total = {b"a": 1.0, b"b": 432.0, b"c": 5000.0}
    assert memory.read() == total
    for worker in workers:
        worker.kill(signal.SIGKILL)
        assert memory.read() == total
        memory.collect_from_dead()
        assert memory.read() == total


def test_a_section_is_free_for_another_worker_after_a_kill(memory: CounterMemory) -> None:
    for _ in range(40):
        counting(memory, a=1.0).kill(signal.SIGKILL)
    assert memory.read() == {b"a": 40.0}


def test_a_worker_without_a_free_section_gets_an_error(memory: CounterMemory) -> None:
    workers = [counting(memory) for _ in range(32)]
    with pytest.raises(BoardError, match="counters for 32 workers"):
        memory.own_section()
    for worker in workers:
        worker.kill()


def test_readers_see_each_count_once_while_counts_are_moved(memory: CounterMemory) -> None:
    workers = [counting(memory, **{f"n{number}": 1.0 for number in range(500)}, a=1.0) for _ in range(20)]

    def bury() -> None:
        for worker in workers:
            worker.kill(signal.SIGKILL)
            memory.collect_from_dead()

    moving = threading.Thread(target=bury)
    moving.start()
    seen = [memory.read()]
    while moving.is_alive():
        seen.append(memory.read())
    assert {value for each in [*seen, memory.read()] for value in each.values()} == {20.0}


def test_counters_without_room_are_left_out(memory: CounterMemory, caplog: pytest.LogCaptureFixture) -> None:
    section = memory.own_section()
    long = b"x" * (1 << 20)
    for number in range(6):
        section.cell(b"%d" % number + long)[0] += 1.0
    section.cell(b"small")[0] += 1.0
    assert len(memory.read()) == 4
    assert [record.message.partition(":")[0] for record in caplog.records] == ["no room for more counters"]


def test_memory_of_another_kind_is_refused() -> None:
    with pytest.raises(BoardError, match="has no counters"):
        CounterMemory(-1)
    descriptor = os.memfd_create("other")
    os.ftruncate(descriptor, 1 << 30)
    with pytest.raises(BoardError, match="of this version"):
        CounterMemory(descriptor)
    os.close(descriptor)


def test_counts_only_grow_while_workers_are_replaced(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    router = start_router("--workers", "2", env={"TMPDIR": str(tmp_path / "none")})
    router.add(*(new_engine(replica=number, behaviour=streams_or_answers) for number in range(2)))
    seen = [0]
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            seen.append(requests_counted(router))

    looking = threading.Thread(target=look)
    with Load(router) as load:
        looking.start()
        for _ in range(4):
            old = {worker.pid for worker in router.workers()}
            router.process.send_signal(signal.SIGHUP)
            wait_until(
                lambda old=old: not old & {worker.pid for worker in router.workers()},
                "the old workers have ended",
            )
            load.wait(20)
        load.end()
    over.set()
    looking.join(30)
    assert load.problems == []
    assert seen == sorted(seen)
    wait_until(lambda: requests_counted(router) == load.answered, "everything has been counted, once")


def test_the_environment_of_prometheus_client_has_no_effect(
    start_router: Callable[..., RouterProcess], new_engine: Callable[..., FakeEngine], tmp_path: Path
) -> None:
    router = start_router(env={"PROMETHEUS_MULTIPROC_DIR": "/nonexistent"})
    router.add(new_engine())
    assert router.complete().status_code == 200
    wait_until(lambda: requests_counted(router) == 1, "the request is counted")


def test_counts_add_up_over_versions_with_different_help_texts(memory: CounterMemory) -> None:
    for text in ("Text of the old version.", "Text of the new version."):
        key = json.dumps(["counter", "fd_x", text, "fd_x_total", {"replica": "0"}])
        worker = counting(memory, **{key: 2.0})
        worker.send("end")
        worker.wait()
    [metric] = _CounterCollector(memory).collect()
    assert [(sample.labels, sample.value) for sample in metric.samples] == [({"replica": "0"}, 4.0)]
