"""Directories and files that the daemon may not write: no program ends; the problem is reported and heals."""

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
    """A daemon that is subject to permission bits even under root."""
    system = Running(tmp_path_factory.mktemp("forbidden"), unprivileged())
    system.write(router_args=())
    system.start_and_wait()
    yield system
    system.stop()


@contextlib.contextmanager
def forbidden(*directories: Path) -> Iterator[None]:
    """Forbid creating and removing files in these directories."""
    for directory in directories:
        directory.chmod(0o500)
    yield
    for directory in directories:
        directory.chmod(0o700)


def reported(system: Running, *words: str) -> None:
    def found() -> bool:
        problems = str(system.status()["daemon"]["problems"])
        return all(line in problems for line in words)

    wait_until(found, f"{words} are reported")


def open_files(pid: int) -> list[str]:
    found = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(link))
    return found


def test_what_cannot_be_written_is_reported_and_written_later(system: Running) -> None:
    before, manager = system.programs(), system.supervisord()
    state, run, logs = (system.prefix / name for name in ("state", "run", "logs"))
    output = logs / "replica0" / "output.log"
    with forbidden(state, run, run / "launch", logs, output.parent):
        for file in (logs / "fd-dp.log", logs / "supervisord.log", output):
            file.unlink()
        words = [f"cannot write {directory}: Permission denied; since " for directory in (state, run, logs)]
        reported(system, *words)
        done = system.fdctl("drain", "1", "--no-wait")
        assert (done.returncode, done.stderr) == (0, "")
        assert "Permission denied; its content is kept in memory" in done.stdout
        wait_until(lambda: system.drained() == {1}, "the router knows")
        # The files for a restart already exist.
        os.kill(before["replica0"]["pid"], signal.SIGKILL)
        entry = system.wait_ready_again("replica0", before["replica0"]["pid"])
        for file in [*run.glob("launch/replica0-*.json"), run / "supervisord.conf"]:
            file.unlink()
        reported(system, "cannot write the launch files of programs: [Errno 13] Permission denied")
        os.kill(entry["pid"], signal.SIGKILL)
        note = "waits for its files: [Errno 13] Permission denied"
        wait_until(lambda: system.programs()["replica0"]["note"].startswith(note), "the replica waits")
        shown = system.fdctl("why").stdout
        assert all(line in shown for line in words)
        assert [*logs.glob("*.log"), *state.glob("intents.*")] == []
    assert system.wait_ready_again("replica0", entry["pid"])["restarts"] == entry["restarts"] + 1
    heals(system)
    others = {name: pid for name, pid in system.pids().items() if name != "replica0"}
    assert others == {name: before[name]["pid"] for name in others}
    assert system.supervisord() == manager
    assert "replica1" in json.loads((state / "intents.json").read_text())
    assert "lines lost since " in system.log()
    assert "bytes of output were lost since " in output.read_text()
    assert open_files(manager).count(str(output)) == 1, "one for each restart would be too many"
    system.do("undrain", "1")


def test_files_without_permission_are_written_again_or_reported(system: Running) -> None:
    run, intents = system.prefix / "run", system.prefix / "state" / "intents.json"
    output = system.prefix / "logs" / "replica0" / "output.log"
    system.do("hold", "1")
    files = [intents, run / "supervisord.conf", *run.glob("launch/replica0-*"), *run.glob("router-flags*")]
    assert len(files) == 4
    for file in (*files, output):
        file.chmod(0)
    wait_until(lambda: all(file.stat().st_mode & 0o400 for file in files), "the files are written again")
    # A log is never replaced, as another process may have it open.
    reported(system, f"cannot write {output}: Permission denied; since ")
    output.chmod(0o600)
    of_router = system.prefix / "logs" / "router" / "output.log"
    of_router.chmod(0)
    reported(system, f"cannot write {of_router}: Permission denied; since ")
    of_router.chmod(0o600)
    with forbidden(output.parent):
        output.unlink()
        reported(system, f"cannot write {output.parent}: Permission denied; since ")
        system.do("restart", "0")
    system.do("restart", "router")
    system.do("release", "1")
    heals(system)


def test_sockets_are_bound_when_their_directory_allows_it(system: Running) -> None:
    assert system.daemon is not None
    before, manager, run = system.pids(), system.supervisord(), system.prefix / "run"
    with forbidden(run):
        for name in ("fd-dp.sock", "supervisor.sock"):
            (run / name).unlink()
        for words in (
            f"cannot listen on {run}/fd-dp.sock: Permission denied",
            f"pid {manager} is alive and its programs keep running",
        ):
            wait_until(lambda words=words: words in system.log(), "the message is logged")
        told = system.fdctl("status").stderr
        assert f"run/fd-dp.sock, but fd-dp runs with pid {system.daemon.pid}; " in told
        assert told.count("\n") == 1
    heals(system)
    assert (system.pids(), system.supervisord()) == (before, manager)
    system.do("restart", "0")


def test_unwritable_log_fails_a_start_in_one_line(system: Running) -> None:
    log = system.prefix / "logs" / "fd-dp.log"
    log.chmod(0)
    command = [*unprivileged(), sys.executable, str(LAUNCHER), str(system.config), str(system.prefix)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    log.chmod(0o600)
    assert done.stderr == f"fd-dp: ERROR (log file {log}: cannot be written (Permission denied))\n"
