"""Directories and files that the daemon may not write end nothing, are reported, and heal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..small_disk import unprivileged
from .conftest import LAUNCHER, Running, wait_until
from .small_disks import heals


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A daemon to which permission bits apply, also as root."""
    system = Running(tmp_path_factory.mktemp("forbidden"), unprivileged())
    system.write(router_args=())
    system.start_and_wait()
    yield system
    system.stop()


@contextlib.contextmanager
def forbidden(*directories: Path) -> Iterator[None]:
    """Let nothing be made or removed in these directories."""
    for directory in directories:
        directory.chmod(0o500)
    yield
    for directory in directories:
        directory.chmod(0o700)


def reported(system: Running, words: str) -> None:
    wait_until(lambda: words in str(system.status()["daemon"]["problems"]), f"{words!r} is reported")


def supervisord(system: Running) -> int:
    found: int = system.status()["daemon"]["supervisord"]
    return found


def open_files(pid: int) -> list[str]:
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(link))
    return found


def test_wishes_hold_and_are_written_later(system: Running) -> None:
    file = system.prefix / "state" / "intents.json"
    with forbidden(file.parent):
        reported(system, f"cannot write {file.parent}: Permission denied; since ")
        done = system.fdctl("drain", "1")
        assert (done.returncode, done.stderr) == (0, "")
        assert "Permission denied; its content is kept in memory" in done.stdout
        assert system.drained() == {1}
        assert not file.exists()
    wait_until(file.exists, "it is written")
    assert set(json.loads(file.read_text())) == {"replica1"}
    system.do("undrain", "1")
    heals(system)


def test_a_replica_waits_for_files_that_cannot_be_written(system: Running) -> None:
    before, run = system.programs()["replica0"], system.prefix / "run"
    with forbidden(run, run / "launch"):
        reported(system, f"cannot write {run}: Permission denied; since ")
        os.kill(before["pid"], signal.SIGKILL)
        entry = system.wait_ready_again("replica0", before["pid"])
        # Not what is needed at once: a file that is missing is noticed before the next start.
        for file in [*run.glob("launch/replica0-*.json"), run / "supervisord.conf"]:
            file.unlink()
        reported(system, "cannot write the files that programs start from: [Errno 13] Permission denied")
        os.kill(entry["pid"], signal.SIGKILL)
        wait_until(
            lambda: system.programs()["replica0"]["note"].startswith("waits for its files: "), "it waits"
        )
        assert system.programs()["replica0"]["restarts"] == entry["restarts"] + 1
    system.wait_ready_again("replica0", entry["pid"])
    heals(system)


def test_files_that_cannot_be_read_are_written_again(system: Running) -> None:
    run = system.prefix / "run"
    files = [run / "supervisord.conf", *run.glob("launch/replica0-*.json"), *run.glob("router-flags*")]
    assert len(files) == 3
    for file in files:
        file.chmod(0)
    wait_until(lambda: all(file.stat().st_mode & 0o400 for file in files), "they are written again")
    system.do("restart", "0")
    system.do("restart", "router")
    heals(system)


def test_sockets_are_bound_when_their_directory_allows_it(system: Running) -> None:
    assert system.daemon is not None
    before, manager, run = system.pids(), supervisord(system), system.prefix / "run"
    with forbidden(run):
        for name in ("fd-dp.sock", "supervisor.sock"):
            (run / name).unlink()
        for words in (
            f"cannot listen on {run}/fd-dp.sock: Permission denied",
            f"pid {manager} is alive and its programs keep running",
        ):
            wait_until(lambda words=words: words in system.log(), "it is said")
        told = system.fdctl("status").stderr
        assert f"run/fd-dp.sock, but fd-dp, pid {system.daemon.pid}, is alive; " in told
        assert told.count("\n") == 1
    heals(system)
    assert (system.pids(), supervisord(system)) == (before, manager)
    system.do("restart", "0")


def test_a_log_directory_without_permission_costs_lines_alone(system: Running) -> None:
    before, logs = system.pids(), system.prefix / "logs"
    output = logs / "replica0" / "output.log"
    with forbidden(logs, output.parent):
        for file in (logs / "fd-dp.log", logs / "supervisord.log", output):
            file.unlink()
        reported(system, f"cannot write {logs}: Permission denied; since ")
        os.kill(before["replica0"], signal.SIGKILL)
        system.wait_ready_again("replica0", before["replica0"])
        assert list(logs.glob("*.log")) == []
    wait_until(
        lambda: (logs / "fd-dp.log").exists() and "lines lost since " in system.log(),
        "the daemon's log is made again",
    )
    system.do("restart", "0")
    assert "bytes of output were lost since" in output.read_text()
    assert open_files(supervisord(system)).count(str(output)) == 1, "one for each restart would be too many"
    heals(system)
    assert {**system.pids(), "replica0": 0} == {**before, "replica0": 0}


def test_a_log_that_may_not_be_written_ends_a_start_in_one_line(system: Running) -> None:
    log = system.prefix / "logs" / "fd-dp.log"
    log.chmod(0)
    command = [*unprivileged(), sys.executable, str(LAUNCHER), str(system.config), str(system.prefix)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    log.chmod(0o600)
    assert done.stderr == f"fd-dp: ERROR (log file {log}: cannot be written (Permission denied))\n"
