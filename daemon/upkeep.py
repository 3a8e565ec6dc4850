"""Upkeep of the daemon's directories, lock, socket and launch files.

Users and cleanup jobs remove files in /run and /tmp, and disks fill up. Once a second each file is checked
and, if it is gone, made again. Failures are reported.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import time
from pathlib import Path
from typing import IO

from ..common.errors import FastDeployError
from .control.server import ControlServer
from .process import supervisord_config
from .supervision.fleet import Fleet
from .supervision.router_sync import RouterSnapshot
from .troubles import Troubles

_INTERVAL = 1.0
#: One block of a file system. If it can be written, a few log lines can be, too.
_PROBE = bytes(4096)
#: Seconds for which a router must be READY before its failure to answer is reported. A request takes up to
#: 2 s, and one may fail during a restart.
_ROUTER_GRACE = 4.0


class Lock:
    """Lock of a run directory. The kernel releases it when the process ends.

    Raises FastDeployError if another daemon holds it, or the file cannot be created.
    """

    def __init__(self, run_directory: Path) -> None:
        self._file = run_directory / "fd-dp.lock"
        try:
            self._held = self._take()
        except OSError as error:
            raise FastDeployError(f"cannot write {self._file}: {error.strerror or error}") from None

    def keep(self) -> str:
        """Create the file again if it is gone. Return why that failed, or ""."""
        try:
            if os.path.samestat(self._file.stat(), os.fstat(self._held.fileno())):
                return ""
        except FileNotFoundError:
            pass
        except OSError:
            return ""
        try:
            taken = self._take()
        except OSError as error:
            return f"cannot write {self._file}: {error.strerror or error}; a second fd-dp could start here"
        except FastDeployError as error:
            return str(error)
        self._held.close()
        self._held = taken
        return ""

    def release(self) -> None:
        self._held.close()

    def _take(self) -> IO[str]:
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        stream = self._file.open("a+", encoding="ascii")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip() or "?"
            stream.close()
            raise FastDeployError(
                f"another fd-dp, pid {holder}, uses {self._file.parent}; stop it or use another --prefix"
            ) from None
        try:
            stream.truncate(0)
            os.write(stream.fileno(), str(os.getpid()).encode())
        except OSError:
            # The pid is only for people. The lock also works on a full disk.
            pass
        return stream


class Upkeep:
    """Checks and repairs. The loop calls `step` in each turn."""

    def __init__(self, fleet: Fleet, server: ControlServer, lock: Lock, troubles: Troubles) -> None:
        self._fleet = fleet
        self._server = server
        self._lock = lock
        self._troubles = troubles
        self._next = 0.0

    def step(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _INTERVAL
        fleet, report = self._fleet, self._troubles.report
        paths = fleet.config.paths
        for directory, mode in ((paths.state, 0o777), (paths.run, 0o700)):
            report(str(directory), write_problem(directory, mode))
        logs_problem = write_problem(paths.logs)
        report(str(paths.logs), logs_problem)
        # One line is enough for a full disk.
        report("log files", "" if logs_problem else self._log_file_problem())
        report("lock", self._lock.keep())
        report("socket", self._server.listen())
        report("files", self._files_problem())
        report("intents", fleet.intents.save())
        report("router", _router_problem(fleet.router.snapshot, fleet.router_has_been_up(_ROUTER_GRACE)))

    def _log_file_problem(self) -> str:
        """Return why a log file cannot be opened for its next lines, or ""."""
        layout = self._fleet.layout
        for file in (layout.logs / "fd-dp.log", layout.log, *map(layout.output, self._fleet.programs)):
            try:
                os.close(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC))
            except FileNotFoundError:
                # The next line creates it.
                if problem := write_problem(file.parent):
                    return problem
            except OSError as error:
                return f"cannot write {file}: {error.strerror or error}"
        return ""

    def _files_problem(self) -> str:
        programs = [program.spec for program in self._fleet.programs.values()]
        supervisord_config.make_log_directories(self._fleet.layout, programs)
        if not self._fleet.adopted or supervisord_config.files_exist(self._fleet.layout, programs):
            return ""
        try:
            self._fleet.write_files()
        except OSError as error:
            return f"cannot write the launch files of programs: {error}"
        return ""


def write_problem(directory: Path, mode: int = 0o777) -> str:
    """Return why a directory is not writable, or "". Create it if it is missing."""
    try:
        directory.mkdir(mode=mode, parents=True, exist_ok=True)
        with _unnamed_file(directory) as descriptor:
            os.write(descriptor.fileno(), _PROBE)
    except OSError as error:
        return f"cannot write {directory}: {error.strerror or error}"
    return ""


def _unnamed_file(directory: Path) -> IO[bytes]:
    """Open a file without a name, if the file system supports that."""
    try:
        descriptor = os.open(directory, os.O_TMPFILE | os.O_WRONLY, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
        return tempfile.TemporaryFile(dir=directory, buffering=0)
    return open(descriptor, "wb", buffering=0)


def _router_problem(snapshot: RouterSnapshot, has_been_up: bool) -> str:
    if not snapshot.problem or not has_been_up:
        return ""
    return f"{snapshot.problem}; drain and undrain have no effect"
