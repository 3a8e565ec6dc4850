"""Recovery times and the cost of supervision: `make bench-recovery`.

Runs fd-dp with a copy of etc/dp.toml on free ports: the demo model on eight replicas that share the experts,
otherwise idle. In this order:

* Memory of the daemon, and its CPU time over 20 s without requests, compared with supervisord.
* `kill_to_serving`: from kill -9 of a replica (the process that supervisord started; its children die with
  it) to the next token from its port, a different replica each time. The peer runs the same commands,
  including the router, under supervisord alone with autorestart=true, in the same run. `kill_to_ready` is the
  time until the daemon reports READY.
* `rolling_reload`: `fdctl reload --wait` after a change of max_num_seqs, and the lowest number of READY
  replicas meanwhile, sampled twenty times per second.
* `chosen_after_kill_of`: one process of a replica is killed under RATE requests per second that replicas
  answer without their model. The time until the router chooses that replica for the last time, even if it
  fails (X-FD-Retries). At this rate a replica is chosen every 40 ms, so a target of 50 ms means that one
  request is affected. The limit is the time until the kernel reports the end of the answering process or the
  worker, which is after it has freed its memory. `failed` counts the requests that failed for a client.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import requests

from fastdeploy.daemon.config import loader as dp_toml
from fastdeploy.daemon.config.programs import programs_of
from fastdeploy.daemon.control import protocol
from fastdeploy.daemon.process.supervisor_client import Supervisor
from fastdeploy.daemon.process.supervisord_config import Layout, write_files

from .rows import Row, report
from .serve import BIN, start_daemon, stop_daemon, wait_ready, write_config
from .steady_rate import Steady

REPLICAS = 8
#: Repetitions of each kind.
KILLS = 5
#: Requests per second.
RATE = 200
PARTS = ("arbiter", "http_process", "worker")
_IDLE_SECONDS = 20.0
#: Seconds after a kill during which the replica cannot be back yet.
_SOON = 1.5
_PEER = "supervisor autorestart"
#: Changes to etc/dp.toml: no backoff after repeated deaths.
_KILLED_ON_PURPOSE = {
    "backoff_max = 60": "backoff_max = 1",
    "budget = 10": "budget = 999\nbox_budget = 999",
}


def main() -> None:
    print(f"load average: {os.getloadavg()[0]:.2f}", flush=True)
    with tempfile.TemporaryDirectory(prefix="fd-bench-") as directory:
        rows = [*_rows_of_ours(Path(directory))]
    with tempfile.TemporaryDirectory(prefix="fd-bench-") as directory:
        peer = _recoveries_under_supervisor(Path(directory))
    print(f"load average: {os.getloadavg()[0]:.2f}")
    report([_beside(row, peer) for row in rows], "recovery")


def _rows_of_ours(prefix: Path) -> Iterator[Row]:
    config, port = write_config(prefix, replicas=REPLICAS, threads=0)
    text = config.read_text(encoding="utf-8")
    for old, new in _KILLED_ON_PURPOSE.items():
        assert text.count(f"\n{old}\n") == 1, old
        text = text.replace(old, new)
    config.write_text(text, encoding="utf-8")
    daemon = start_daemon(config, prefix)
    try:
        wait_ready(prefix, REPLICAS)
        print("measuring: idle", flush=True)
        yield from _costs(daemon.pid)
        print("measuring: recovery", flush=True)
        serving, ready = [], []
        for replica in range(KILLS):
            began = _kill(prefix, replica)
            serving.append(_until_serving(prefix, replica) - began)
            ready.append(_until_ready(prefix) - began)
        yield from _middle_and_worst("kill_to_serving", serving, "s")
        yield from _middle_and_worst("kill_to_ready", ready, "s")
        print("measuring: rolling reload", flush=True)
        yield from _rolling_reload(prefix, config)
        print("measuring: what the router chooses", flush=True)
        yield from _choices(prefix, port)
    finally:
        stop_daemon(daemon)


def _beside(row: Row, peer: dict[str, float]) -> Row:
    if row.case not in peer:
        return row
    return replace(row, peer=peer[row.case], peer_name=_PEER)


def _costs(daemon: int) -> Iterator[Row]:
    supervisord = next(
        child for child in psutil.Process(daemon).children() if "supervisord" in " ".join(child.cmdline())
    )
    both = psutil.Process(daemon), supervisord
    before = [_cpu_seconds(process) for process in both]
    time.sleep(_IDLE_SECONDS)
    ours, peer = (
        100 * (_cpu_seconds(process) - seconds) / _IDLE_SECONDS
        for process, seconds in zip(both, before, strict=True)
    )
    yield Row("daemon_idle_cpu", "% of core", ours, peer, "supervisord beside it")
    ours, peer = (process.memory_info().rss / 1e6 for process in both)
    yield Row("daemon_rss", "MB", ours, peer, "supervisord beside it")


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _rolling_reload(prefix: Path, config: Path) -> Iterator[Row]:
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("max_num_seqs = 64", "max_num_seqs = 32"), encoding="utf-8")
    over = threading.Event()
    seen: list[int] = []

    def look() -> None:
        while not over.wait(0.05):
            seen.append(_status(prefix)["daemon"]["ready"])

    thread = threading.Thread(target=look)
    thread.start()
    began = time.monotonic()
    try:
        subprocess.run([BIN / "fdctl", "--prefix", prefix, "reload", "--wait"], check=True)
        seconds = time.monotonic() - began
    finally:
        over.set()
        thread.join()
    yield Row(f"rolling_reload_of_{REPLICAS}", "s", seconds)
    yield Row("rolling_reload_lowest_ready", "replicas", min(seen))


def _choices(prefix: Path, port: int) -> Iterator[Row]:
    steady = Steady(port, RATE)
    victims = itertools.cycle(range(REPLICAS))
    failed = 0
    for depth, part in enumerate(PARTS):
        last, counts, ends = [], [], []
        for _ in range(KILLS):
            victim = next(victims)
            family = _processes(prefix, victim)
            # The HTTP process, which answers, dies with the arbiter.
            death = _Death(family[depth], family[max(1, depth)])
            killed, asked = steady.run(1.0, death.come, _SOON)
            chosen = [
                each.sent - killed
                for each in asked
                if each.sent > killed and (each.in_vain or each.replica == str(victim))
            ]
            last.append(1000 * max(chosen, default=0.0))
            counts.append(len(chosen))
            ends.append(1000 * death.seconds)
            failed += sum(each.status != 200 for each in asked)
            _until_ready(prefix)
        limits = statistics.median(ends), max(ends)
        for row, limit in zip(
            _middle_and_worst(f"chosen_after_kill_of_{part}", last, "ms"), limits, strict=True
        ):
            yield replace(row, limit=limit)
        yield Row(f"chosen_after_kill_of_{part}_times", "requests", statistics.median(counts))
    yield Row("chosen_after_kill_failed", "requests", failed)


class _Death:
    """The kill of a process, and the seconds until the kernel reports the end of another."""

    def __init__(self, victim: psutil.Process, noticed: psutil.Process) -> None:
        self.seconds = 0.0
        self._victim = victim
        self._descriptor = os.pidfd_open(noticed.pid)
        self._began = 0.0

    def come(self) -> None:
        asyncio.get_running_loop().add_reader(self._descriptor, self._has_come)
        self._began = time.monotonic()
        self._victim.kill()

    def _has_come(self) -> None:
        self.seconds = time.monotonic() - self._began
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)


def _recoveries_under_supervisor(prefix: Path) -> dict[str, float]:
    """Measure the same programs under supervisord; one result per case."""
    print("measuring: recovery under supervisor alone", flush=True)
    file, _ = write_config(prefix, replicas=REPLICAS, threads=0)
    config = dp_toml.load(file, prefix)
    layout = Layout(config.paths.run, config.paths.logs)
    for directory in (config.paths.state, layout.run):
        directory.mkdir(parents=True, exist_ok=True)
    write_files(layout, programs_of(config))
    ini = layout.ini.read_text(encoding="utf-8")
    # A typical hand-written configuration.
    for ours in ("startsecs=0\n", "startretries=0\n", "autostart=false\n"):
        ini = ini.replace(ours, "")
    layout.ini.write_text(ini.replace("autorestart=false", "autorestart=true"), encoding="utf-8")
    with (prefix / "supervisord.out").open("wb") as out:
        daemon = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", layout.ini], stdout=out, stderr=out
        )
    try:
        for replica in range(REPLICAS):
            _until_serving(prefix, replica)
        times = []
        for replica in range(KILLS):
            began = _kill(prefix, replica)
            times.append(_until_serving(prefix, replica) - began)
    finally:
        daemon.terminate()
        daemon.wait(60)
    return {row.case: row.ours for row in _middle_and_worst("kill_to_serving", times, "s")}


def _middle_and_worst(case: str, values: list[float], unit: str) -> list[Row]:
    return [Row(f"{case}_median", unit, statistics.median(values)), Row(f"{case}_worst", unit, max(values))]


def _kill(prefix: Path, replica: int) -> float:
    """Kill the child of supervisord and its children; return the monotonic time."""
    family = _processes(prefix, replica)
    began = time.monotonic()
    family[0].kill()
    # From now on its successor answers.
    psutil.wait_procs(family, timeout=30)
    return began


def _processes(prefix: Path, replica: int) -> list[psutil.Process]:
    """Return the processes in the order of PARTS."""
    found = Supervisor(Layout(prefix / "run", prefix / "logs")).processes()[f"replica{replica}"]
    arbiter = psutil.Process(found.pid)
    return [arbiter, *arbiter.children(recursive=True)]


def _until_serving(prefix: Path, replica: int) -> float:
    """Return the time at which its port returned a token."""
    port = dp_toml.load(prefix / "dp.toml", prefix).engine.ports[replica]
    body = {"prompt": "Hello", "max_tokens": 1}
    while True:
        with contextlib.suppress(requests.RequestException):
            answer = requests.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
            if answer.status_code == 200:
                return time.monotonic()
        time.sleep(0.02)


def _until_ready(prefix: Path) -> float:
    """Return the time at which all replicas were READY and known to the router."""
    while True:
        replicas: list[dict[str, Any]] = _status(prefix)["replicas"]
        if all(each["state"] == "READY" and each["in_flight"] is not None for each in replicas):
            return time.monotonic()
        time.sleep(0.02)


def _status(prefix: Path) -> dict[str, Any]:
    *_, last = protocol.request(protocol.socket_path(prefix / "run"), {"do": "status"}, timeout=60)
    status: dict[str, Any] = last["status"]
    return status


if __name__ == "__main__":
    main()
