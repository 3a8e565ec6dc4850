"""A fault with one replica, client or process neither ends the loop nor affects the others."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastdeploy.daemon.control import protocol
from fastdeploy.daemon.control.server import ControlServer, Conversation
from fastdeploy.daemon.supervision.health import Health
from fastdeploy.daemon.supervision.probes import Probes
from fastdeploy.daemon.supervision.program_state import ProgramState, SupervisedProgram
from fastdeploy.daemon.wakeups import Wakeups

from .conftest import wait_until
from .world import World


@pytest.mark.parametrize("part", ["_observe", "_check_retry", "_start"])
def test_a_fault_about_one_replica_leaves_the_others_supervised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    world = World(tmp_path, 2, backoff_first=1)
    world.become_ready("router", "replica0", "replica1")
    method = getattr(world.fleet, part)

    def faulty(replica: SupervisedProgram, now: float) -> None:
        if replica.name == "replica0":
            raise RuntimeError("injected")
        method(replica, now)

    monkeypatch.setattr(world.fleet, part, faulty)
    for name in ("replica0", "replica1"):
        world.supervisor.end(name)
    world.pass_time(10.0)
    assert world.fleet.replicas["replica1"].state is ProgramState.READY
    assert world.fleet.replicas["replica1"].restarts == 1
    # The error is logged once, not at every step.
    assert caplog.text.count("RuntimeError: injected") == 1


def test_a_reading_that_cannot_be_used_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, 2)
    read = Health._apply

    def faulty(health: Health, replica: SupervisedProgram, reading: object, now: float) -> None:
        if replica.name == "replica0":
            raise RuntimeError("injected")
        read(health, replica, reading, now)  # type: ignore[arg-type]

    monkeypatch.setattr(Health, "_apply", faulty)
    world.become_ready("router", "replica0", "replica1")
    assert world.names(ProgramState.READY) == {"router", "replica1"}


def test_a_probe_that_raises_gives_a_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, 1)
    monkeypatch.setattr("fastdeploy.daemon.supervision.probes.health_probe", lambda program, pid: 1 / 0)
    probes = Probes(lambda: None)
    for _ in range(2):
        # The first error does not prevent a second probe.
        probes.ask(world.fleet.replicas["replica0"].spec, 7, token=False)
        [reading] = wait_until(probes.take, "a reading")
        assert not reading.ok
        assert "ZeroDivisionError" in reading.problem


def test_a_probe_whose_thread_cannot_start_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = World(tmp_path, 1).fleet.replicas["replica0"].spec
    probes = Probes(lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _no_thread)
        with pytest.raises(RuntimeError):
            probes.ask(program, 7, token=False)
    probes.ask(program, 7, token=False)
    assert wait_until(probes.take, "a reading")


def _no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.fixture
def wakeups() -> Iterator[Wakeups]:
    handler = signal.getsignal(signal.SIGUSR1)
    yield (made := Wakeups((signal.SIGUSR1,)))
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGUSR1, handler)
    made.selector.close()


def test_wake_up_that_raises_delays_no_other(wakeups: Wakeups) -> None:
    ended: list[int] = []

    def broken(pid: int) -> None:
        raise RuntimeError("injected")

    pids = [os.spawnlp(os.P_NOWAIT, "true", "true") for _ in range(3)]
    for pid, callback in zip(pids, (broken, ended.append, broken), strict=True):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        wakeups.watch(pid, callback)
    wakeups.wait(1.0)
    assert ended == [pids[1]]
    for pid in pids:
        os.waitpid(pid, 0)


def test_a_command_that_raises_is_answered(tmp_path: Path, wakeups: Wakeups) -> None:
    def broken(command: dict[str, object], conversation: Conversation) -> None:
        raise RuntimeError("injected")

    path = tmp_path / "fd-dp.sock"
    server = ControlServer(path, wakeups.selector, broken)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b'{"do": "status"}\n')
        for _ in range(3):
            wakeups.wait(0.2)
        assert b'"code": %d' % protocol.FAILED in client.recv(4096)
    server.close()
