"""The daemon's metrics, and a daemon that no client of their port can disturb."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fastdeploy.daemon.config.programs import Program
from fastdeploy.daemon.diagnosis.exit_cause import Cause
from fastdeploy.daemon.process.usage import Usage, of_family
from fastdeploy.daemon.supervision.intents import Intent
from fastdeploy.daemon.supervision.metrics import Metrics
from fastdeploy.daemon.supervision.program_state import ProgramState, SupervisedProgram

from ..ports import free_ports
from .conftest import Running, wait_until


class Samples:
    """The samples of one scrape: `samples("fd_dp_state", program="router", state="READY")`."""

    def __init__(self, text: bytes) -> None:
        self.values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.values[name, frozenset(labels.items())]


def scrape(port: int) -> Samples | None:
    """Return the samples; None if the port refuses connections."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
            return Samples(answer.read())
    except urllib.error.URLError:
        return None


def scraped(port: int) -> Samples:
    samples = scrape(port)
    assert samples is not None
    return samples


def replica(number: int, state: ProgramState, **what: object) -> SupervisedProgram:
    one = SupervisedProgram(Program(f"replica{number}", ("x",), {}, (1,)), state)
    for name, value in what.items():
        setattr(one, name, value)
    return one


def test_metrics_show_the_fleet_after_its_last_turn() -> None:
    metrics = Metrics()
    assert not [name for name, _ in Samples(metrics.exposition()).values if name == "fd_dp_state"]
    fleet = [
        replica(0, ProgramState.READY, pid=os.getpid(), draining=True),
        replica(1, ProgramState.QUARANTINED, next_try=time.monotonic() + 500),
        replica(2, ProgramState.STOPPED, intent=Intent.STOPPED, next_try=time.monotonic() + 500),
        replica(3, ProgramState.BACKOFF, next_try=float("inf")),
    ]
    metrics.publish(fleet)
    fleet[0].state = ProgramState.STOPPING

    samples = Samples(metrics.exposition())

    for one, state in zip(fleet, ("READY", "QUARANTINED", "STOPPED", "BACKOFF"), strict=True):
        told = {other: samples("fd_dp_state", program=one.name, state=other) for other in ProgramState}
        assert {other for other, value in told.items() if value} == {state}
    assert samples("fd_dp_quarantined") == 1
    assert 490 < samples("fd_dp_next_try_seconds", program="replica1") <= 500
    assert [samples("fd_dp_next_try_seconds", program=f"replica{number}") for number in (0, 2, 3)] == [
        0,
        0,
        0,
    ]
    assert [samples("fd_dp_draining", program=f"replica{number}") for number in (0, 1)] == [1, 0]
    assert [samples("fd_dp_intent", program="replica1", intent=intent) for intent in Intent] == [1, 0, 0]
    assert [samples("fd_dp_intent", program="replica2", intent=intent) for intent in Intent] == [0, 1, 0]
    assert samples("fd_dp_memory_bytes", program="replica0", kind="private") > 1 << 20
    assert samples("fd_dp_memory_bytes", program="replica1", kind="private") == 0
    assert abs(samples("fd_dp_last_turn_timestamp_seconds") - time.time()) < 60


def test_events_are_counted() -> None:
    metrics = Metrics()
    metrics.publish([replica(3, ProgramState.READY)])
    before = Samples(metrics.exposition())
    assert before("fd_dp_reloads_total", result="rolled_back") == 0
    assert before("fd_dp_restarts_total", program="replica3", cause="killed") == 0
    assert before("fd_dp_drain_seconds_count", program="replica3") == 0
    metrics.ended("replica3", Cause.KILLED)
    metrics.ended("replica3", Cause.KILLED)
    metrics.ready("replica3", 7.0)
    metrics.reloaded("rolled_back", 12.0)
    metrics.drained("replica3", 3.0)
    samples = Samples(metrics.exposition())
    assert samples("fd_dp_restarts_total", program="replica3", cause="killed") == 2
    assert samples("fd_dp_ready_seconds_bucket", program="replica3", le="10.0") == 1
    assert samples("fd_dp_reloads_total", result="rolled_back") == 1
    assert samples("fd_dp_reload_seconds_sum") == 12
    assert samples("fd_dp_drain_seconds_sum", program="replica3") == 3


def test_usage_includes_children_started_by_any_thread() -> None:
    child = "import time; a = bytearray(b'x') * (64 << 20); print(flush=True); time.sleep(600)"
    parent = (
        "import subprocess, sys, threading\n"
        f"run = lambda: subprocess.run([sys.executable, '-c', {child!r}])\n"
        "thread = threading.Thread(target=run)\nthread.start()\nthread.join()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            usage = of_family(process.pid)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert usage.processes == 2
    assert usage.private > 64 << 20
    assert usage.shared > 0
    assert usage.cpu > 0
    assert of_family(process.pid) == Usage(), "it has ended"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    system = Running(tmp_path_factory.mktemp("fd"))
    system.write()
    system.start_and_wait()
    yield system
    system.stop()


def test_the_daemon_shows_each_program_and_itself(shared: Running) -> None:
    samples = scraped(shared.metrics_port)
    for name in ("router", "replica0", "replica1"):
        assert samples("fd_dp_state", program=name, state="READY") == 1
        assert samples("fd_dp_processes", program=name) == 1
        assert samples("fd_dp_memory_bytes", program=name, kind="private") > 1 << 20
    assert samples("process_resident_memory_bytes") > 1 << 20


def test_a_scrape_does_not_wait_for_a_loop_that_waits(shared: Running) -> None:
    def age() -> float:
        return time.time() - scraped(shared.metrics_port)("fd_dp_last_turn_timestamp_seconds")

    supervisord = shared.status()["daemon"]["supervisord"]
    os.kill(supervisord, signal.SIGSTOP)
    try:
        wait_until(lambda: age() > 1.5, "the loop waits for supervisord, and scrapes are answered")
    finally:
        os.kill(supervisord, signal.SIGCONT)
    wait_until(lambda: age() < 1.5 and shared.ready(), "the daemon works again")


def test_a_crowd_at_the_port_does_not_keep_the_daemon_from_its_work(shared: Running) -> None:
    crowd = [socket.create_connection(("127.0.0.1", shared.metrics_port)) for _ in range(100)]
    old = shared.pids()["replica1"]
    os.kill(old, signal.SIGKILL)
    shared.wait_ready_again("replica1", old)
    assert scraped(shared.metrics_port)("fd_dp_state", program="replica1", state="READY") == 1
    for client in crowd:
        client.close()


def test_metrics_are_of_this_machine_only_unless_asked_otherwise(shared: Running) -> None:
    listeners = Path("/proc/net/tcp").read_text()
    assert f"0100007F:{shared.metrics_port:04X} 00000000:0000 0A" in listeners


def test_port_in_use_is_logged_once_and_bound_once_it_is_free(running: Running) -> None:
    with socket.create_server(("127.0.0.1", running.metrics_port)):
        running.start_and_wait()
        (line,) = [line for line in running.log().splitlines() if "metrics: ERROR" in line]
        assert f"cannot listen on 127.0.0.1:{running.metrics_port}: Address already in use" in line
    wait_until(lambda: scrape(running.metrics_port), "the port is had")
    assert running.log().count("metrics: ERROR") == 1


def test_reload_moves_and_closes_the_port(running: Running) -> None:
    running.start_and_wait()
    pids = running.pids()
    old, running.metrics_port = running.metrics_port, free_ports(1)[0]
    running.write()
    assert running.fdctl("reload", "--wait").returncode == 0
    wait_until(lambda: scrape(running.metrics_port), "metrics at the new port")
    assert scrape(old) is None

    new, running.metrics_port = running.metrics_port, 0
    running.write()
    assert running.fdctl("reload", "--wait").returncode == 0
    wait_until(lambda: scrape(new) is None, "no metrics at the old port")
    assert running.pids() == pids
