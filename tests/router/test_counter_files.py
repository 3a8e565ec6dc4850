"""Figures of workers that have ended are neither lost nor counted twice, nor do their files pile up."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.mmap_dict import MmapedDict, mmap_key

from fastdeploy.daemon.router.counter_files import CounterFiles, bury

from .fake_engine import wait_until
from .steady_load import Load, requests_counted, streams_or_answers


def count(directory: Path, pid: int, **counts: float) -> None:
    """As that worker would have."""
    file = MmapedDict(str(directory / f"counter_{pid}.db"))
    for label, value in counts.items():
        file.write_value(mmap_key("x", "x_total", ["label"], [label], "x"), value, 0.0)
    file.close()


def shown(directory: Path) -> dict[str, float]:
    registry = CollectorRegistry()
    CounterFiles(registry, str(directory))
    return {
        sample.labels["label"]: sample.value for metric in registry.collect() for sample in metric.samples
    }


def test_counts_of_the_dead_are_added_up(tmp_path):
    count(tmp_path, 11, a=1.0, b=2.0)
    count(tmp_path, 1, b=30.0)
    count(tmp_path, 12, b=400.0, c=5000.0)
    total = {"a": 1.0, "b": 432.0, "c": 5000.0}
    assert shown(tmp_path) == total
    for dead, files in ((1, {"counter_0.db", "counter_11.db", "counter_12.db"}), (12, None), (12, None)):
        bury(tmp_path, dead)
        assert shown(tmp_path) == total
        assert files in (None, {file.name for file in tmp_path.iterdir()})
    assert {file.name for file in tmp_path.iterdir()} == {"counter_0.db", "counter_11.db"}


def test_one_that_was_killed_before_it_could_count_leaves_nothing(tmp_path):
    (tmp_path / "histogram_7.db").touch()
    bury(tmp_path, 7)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_a_worker_is_just_making_is_no_trouble_for_others(tmp_path):
    count(tmp_path, 1, a=1.0)
    (tmp_path / "counter_2.db").touch()
    assert shown(tmp_path) == {"a": 1.0}


def test_whoever_looks_while_files_are_moved_sees_each_count_once(tmp_path):
    count(tmp_path, 1000, a=1.0)
    for pid in range(1, 40):
        count(tmp_path, pid, a=1.0)
    burying = threading.Thread(target=lambda: [bury(tmp_path, pid) for pid in range(1, 40)])
    burying.start()
    seen = [shown(tmp_path)["a"]]
    while burying.is_alive():
        seen.append(shown(tmp_path)["a"])
    assert set(seen) == {40.0}
    assert {file.name for file in tmp_path.iterdir()} == {"counter_0.db", "counter_1000.db"}


def test_without_their_directory_that_is_said(tmp_path):
    with pytest.raises(FileNotFoundError):
        bury(tmp_path / "none", 1)


def test_whoever_looks_while_workers_are_replaced_sees_figures_that_only_grow(
    start_router, new_engine, tmp_path
):
    router = start_router("--workers", "2", env={"TMPDIR": str(tmp_path)})
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
    [directory] = tmp_path.glob("fd-router-metrics-*")
    living = {str(worker.pid) for worker in router.workers()}
    wait_until(
        lambda: {file.stem.rpartition("_")[2] for file in directory.iterdir()} == {*living, "0"},
        "the dead share their files",
    )
