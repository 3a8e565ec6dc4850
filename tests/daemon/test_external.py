"""fd-dp with a supervisord that systemd would run: two units, either of which may die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fastdeploy.daemon.control import protocol

from .conftest import Running, alive, wait_until


class Engines:
    """The engines unit: the commands of its ExecStartPre and ExecStart."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self.start()

    def start(self) -> None:
        rendered = self._running.fdctl("render", "--write", str(self._running.config))
        assert (rendered.returncode, rendered.stderr) == (0, "")
        ini = self._running.prefix / "run" / "supervisord.conf"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastdeploy.daemon.fd_supervisord", "-n", "-c", str(ini)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )

    def kill_all(self) -> None:
        """Kill what systemd would kill: every process left in the unit's cgroup."""
        self.process.kill()
        self.process.wait()
        for process in self._running.left_over():
            os.kill(process.pid, signal.SIGKILL)


@pytest.fixture
def engines(running: Running) -> Iterator[Engines]:
    unit = Engines(running)
    yield unit
    if running.daemon is not None and running.daemon.poll() is None:
        running.stop()
    unit.process.terminate()
    unit.process.wait(timeout=30)


def test_daemon_uses_external_supervisord_and_leaves_it_running(running: Running, engines: Engines) -> None:
    running.start_and_wait("external")
    assert running.status()["daemon"]["supervisord"] == engines.process.pid
    before = running.pids()
    running.stop()
    assert all(alive(pid) for pid in before.values())
    running.start_and_wait("external")
    assert running.pids() == before


def test_daemon_starts_every_program_again_after_engines_unit_restart(
    running: Running, engines: Engines
) -> None:
    running.start_and_wait("external")
    before = running.pids()
    engines.kill_all()
    engines.start()
    for name, pid in before.items():
        running.wait_ready_again(name, pid)
    assert running.status()["daemon"]["supervisord"] == engines.process.pid


def test_the_daemon_waits_for_a_supervisord_that_starts_after_it(running: Running) -> None:
    running.start("external")
    wait_until(lambda: (running.prefix / "run" / "fd-dp.lock").exists(), "the daemon runs")
    unit = Engines(running)
    try:
        wait_until(running.ready, "everything READY")
        running.stop()
    finally:
        unit.process.terminate()
        unit.process.wait(timeout=30)


def test_sighup_reloads(running: Running, engines: Engines) -> None:
    running.start_and_wait("external")
    before = running.pids()
    running.write(extra_args=("--load-seconds", "0.1"))
    assert running.daemon is not None
    running.daemon.send_signal(signal.SIGHUP)
    running.wait_ready_again("replica1", before["replica1"])


def test_a_supervisord_that_is_stopped_for_a_moment_is_not_replaced(
    running: Running, engines: Engines
) -> None:
    running.start_and_wait("external")
    before = running.pids()
    engines.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: "supervisord does not answer" in running.log(), "silence noticed")
    engines.process.send_signal(signal.SIGCONT)
    os.kill(before["replica0"], signal.SIGKILL)
    running.wait_ready_again("replica0", before["replica0"])
    assert running.pids()["replica1"] == before["replica1"]
    assert running.fdctl("restart", "1").returncode == protocol.OK
