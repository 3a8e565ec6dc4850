"""supervisord: its configuration is written here, and it is talked to here.

It starts, stops and reaps processes and rotates their output; it decides nothing. Each program is a group of
its own, because groups are what can be replaced while the others run, and `autorestart=false`: the daemon
alone decides restarts. `startsecs=0` makes every end of a process EXITED with its exit code; with a start
phase, an early end would be BACKOFF or FATAL with the code lost.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shlex
import socket
import sys
import time
import xml.parsers.expat
import xmlrpc.client
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ...common.errors import ConfigError, FastDeployError
from ...common.foreign_text import printable
from ..config.loader import UNFIT_IN_INI
from ..config.programs import Program

#: supervisord answers in milliseconds; a stopped one must not stop the daemon as well.
_TIMEOUT = 3.0
_TAIL = 1 << 16
T = TypeVar("T")

#: How our log lines begin.
_TIME = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:,\d{3})?")

#: ExpatError: an answer that was cut off when supervisord was killed.
_NO_ANSWER = (OSError, http.client.HTTPException, xmlrpc.client.ProtocolError, xml.parsers.expat.ExpatError)
#: A malformed answer: raised by xmlrpc.client, and by the functions that read it.
_NOT_UNDERSTOOD = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, xmlrpc.client.Error)

_STATES = frozenset({"STOPPING", "UNKNOWN", "STARTING", "RUNNING", "STOPPED", "EXITED", "FATAL", "BACKOFF"})
#: Reasons of supervisord with a short detail.
_TELLING = frozenset({"NO_FILE", "NOT_EXECUTABLE"})

UP = frozenset({"STARTING", "RUNNING"})
DOWN = frozenset({"STOPPED", "EXITED", "FATAL", "BACKOFF"})


class SupervisorError(FastDeployError):
    """supervisord refused. `fault` is the name of its reason, e.g. "STILL_RUNNING"."""

    def __init__(self, message: str, fault: str = "") -> None:
        super().__init__(message)
        self.fault = fault


class SupervisorLost(SupervisorError):
    """supervisord does no work for us. `hangs`: something accepts connections there, so it is not dead."""

    def __init__(self, message: str, hangs: bool, fault: str = "") -> None:
        super().__init__(message, fault)
        self.hangs = hangs


@dataclass(frozen=True, slots=True)
class Process:
    """What supervisord says about one program."""

    name: str
    #: STARTING, RUNNING, STOPPING, or one of DOWN.
    state: str
    pid: int
    #: Unix time of its last start, 0 if it never ran.
    started: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the files of one supervisord lie."""

    run: Path
    logs: Path

    @property
    def socket(self) -> Path:
        return self.run / "supervisor.sock"

    @property
    def ini(self) -> Path:
        return self.run / "supervisord.conf"

    @property
    def launch(self) -> Path:
        return self.run / "launch"

    @property
    def log(self) -> Path:
        return self.logs / "supervisord.log"

    def output(self, name: str) -> Path:
        """stdout and stderr of a program."""
        return self.logs / name / "output.log"


def render(layout: Layout, programs: Iterable[Program]) -> str:
    """supervisord.conf. Only our own words enter it, and paths; config.py refuses those it cannot carry."""
    lines = [
        "; Written by fd-dp. Edit dp.toml instead, then: fdctl reload",
        "[supervisord]",
        "nodaemon=true",
        "silent=true",
        f"logfile={layout.log}",
        "logfile_maxbytes=10MB",
        "logfile_backups=3",
        f"pidfile={layout.run / 'supervisord.pid'}",
        f"childlogdir={layout.run}",
        "nocleanup=true",
        "[unix_http_server]",
        f"file={layout.socket}",
        "chmod=0600",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface",
        "[rpcinterface:fd]",
        "supervisor.rpcinterface_factory=fastdeploy.daemon.process.exit_interface:make_ends_interface",
    ]
    fd_run = str(Path(sys.executable).with_name("fd-run"))
    if found := UNFIT_IN_INI.search(fd_run):
        raise ConfigError(
            f"{fd_run}: supervisord cannot run it from a path with {found[0]!r}; install elsewhere"
        )
    for program in programs:
        lines += [
            f"[program:{program.name}]",
            f"command={shlex.join([fd_run, program.name, program.hash, str(layout.launch)])}",
            "autostart=false",
            "autorestart=false",
            "startsecs=0",
            "startretries=0",
            "stopasgroup=true",
            "killasgroup=true",
            f"stopwaitsecs={max(1, round(program.stop_timeout))}",
            "redirect_stderr=true",
            f"stdout_logfile={layout.output(program.name)}",
            "stdout_logfile_maxbytes=20MB",
            "stdout_logfile_backups=3",
        ]
    return "\n".join(lines) + "\n"


def write(layout: Layout, programs: Iterable[Program]) -> None:
    """Write launch files and ini, and make the log directories. Raises OSError.

    A file that has not changed is not written again: programs can start on a full disk.
    """
    programs = list(programs)
    # Each by itself: `mode` does not apply to `parents`.
    layout.run.mkdir(mode=0o700, parents=True, exist_ok=True)
    layout.launch.mkdir(mode=0o700, exist_ok=True)
    make_log_directories(layout, programs)
    for file, text in _texts(layout, programs):
        if not _holds(file, text):
            _write(file, text)


def make_log_directories(layout: Layout, programs: Iterable[Program]) -> None:
    """Make those that can be made. Programs run without them, and upkeep.py reports what is wrong."""
    for program in programs:
        with contextlib.suppress(OSError):
            layout.output(program.name).parent.mkdir(parents=True, exist_ok=True)


def are_in_place(layout: Layout, programs: Iterable[Program]) -> bool:
    """Return whether every file of `write` exists and can be read, whatever it holds."""
    return all(os.access(file, os.R_OK) for file, _ in _texts(layout, list(programs)))


def _texts(layout: Layout, programs: list[Program]) -> Iterator[tuple[Path, str]]:
    for program in programs:
        yield layout.launch / program.launch_name, program.launch_text(layout.run)
        if program.flags_file:
            yield Path(program.flags_file), program.flags_text
    yield layout.ini, render(layout, programs)


def remove_stale_launch_files(layout: Layout, programs: Iterable[Program]) -> None:
    keep = {program.launch_name for program in programs}
    for file in layout.launch.glob("*.json"):
        if file.name not in keep:
            file.unlink(missing_ok=True)


def _write(file: Path, text: str) -> None:
    """Aside, 0600 (an environment may hold keys), then renamed: nobody reads half a file."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as stream:
            stream.write(text)
        aside.rename(file)
    except OSError:
        # On a full disk the next try needs the space.
        with contextlib.suppress(OSError):
            aside.unlink()
        raise


def _holds(file: Path, text: str) -> bool:
    try:
        return file.read_bytes() == text.encode("utf-8", "surrogateescape")
    except OSError:
        return False


def last_error(file: Path, since: float) -> str:
    """The last error that a program has told after `since` (Unix time), cut to fit into a log line; or ""."""
    began = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))},{int(since % 1 * 1000):03d}"
    errors = [
        line.strip()
        for line in _tail(file).splitlines()
        if re.search(r"\bERROR\b", line)
        # A line without a time is the last word of a start.
        and not ((told := _TIME.match(line)) and told[0] < began[: len(told[0])])
    ]
    # gunicorn's own words say that it ends; its reason is only of interest where nobody else tells one.
    own = [line for line in errors if "gunicorn.error" not in line]
    own = own or [line for line in errors if "Reason: " in line]
    return printable(own[-1], 300) if own else ""


def tells(file: Path, pattern: str) -> bool:
    """Whether one of the last lines of a program's output has this in it."""
    return re.search(pattern, _tail(file), re.MULTILINE) is not None


class Supervisor:
    """The XML-RPC client. Every method raises SupervisorLost or SupervisorError, never anything else."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def pid(self) -> int:
        return self._call("getPID", read=_number)

    def processes(self) -> dict[str, Process]:
        return self._call("getAllProcessInfo", read=_processes)

    def start(self, name: str) -> None:
        """Returns at once: waiting would block for every other program as well."""
        try:
            with _ignoring("ALREADY_STARTED"):
                self._call("startProcess", name, False)
        except SupervisorError as error:
            if error.fault != "SPAWN_ERROR":
                raise
            reason = printable(self._call("getProcessInfo", name, read=_spawn_error))
            raise SupervisorError(f"supervisord cannot start {name}: {reason}", error.fault) from None

    def stop(self, name: str) -> None:
        """SIGTERM to its process group now, SIGKILL after the stop timeout. Returns at once."""
        with _ignoring("NOT_RUNNING"):
            self._call("stopProcess", name, False)

    def send_signal(self, name: str, signal: str) -> None:
        """Sends a signal ("HUP") to its process alone; whether it runs is seen by what follows."""
        with _ignoring("NOT_RUNNING"):
            self._call("signalProcess", name, signal)

    def replace(self, name: str, *, add: bool) -> None:
        """Takes a program that does not run out of supervisord and, with `add`, in again as the ini says.

        Only this makes supervisord use a changed configuration; starting again keeps the old one.
        """
        self._call("reloadConfig")
        with _ignoring("BAD_NAME"):
            self._call("removeProcessGroup", name)
        if add:
            with _ignoring("ALREADY_ADDED"):
                self._call("addProcessGroup", name)

    def shutdown(self) -> None:
        with _ignoring("SHUTDOWN_STATE"):
            self._call("shutdown")

    def how_it_ended(self, name: str) -> str:
        """Return "exit status 3", "terminated by SIGKILL"."""
        try:
            return self._call("howItEnded", name, namespace="fd") or "ended"
        except SupervisorLost:
            raise
        except SupervisorError:
            # An older supervisord, adopted after an upgrade: it writes the signal to its log alone.
            pattern = rf"(?:exited|stopped): {re.escape(name)} \((.*?)(?:; (?:not )?expected)?\)$"
            found = re.findall(pattern, _tail(self.layout.log), re.MULTILINE)
            return found[-1] if found else "ended"

    def _call(
        self,
        method: str,
        *arguments: Any,
        namespace: str = "supervisor",
        read: Callable[[Any], T] = lambda answer: answer,
    ) -> T:
        # A new connection for each call: one whose connect failed once would fail for ever.
        proxy = xmlrpc.client.ServerProxy("http://localhost", transport=_Transport(self.layout.socket))
        with proxy:
            try:
                return read(getattr(getattr(proxy, namespace), method)(*arguments))
            except xmlrpc.client.Fault as fault:
                # "NAME" or "NAME: detail"; the detail of CANT_REREAD is long and lists our whole environment.
                name, _, detail = printable(str(fault.faultString)).partition(": ")
                if name == "SHUTDOWN_STATE":
                    # Somebody has told it to end. Until it is gone it refuses everything.
                    raise SupervisorLost("supervisord is shutting down", hangs=True, fault=name) from None
                what = " ".join((method, *map(str, arguments[:1])))
                why = f"{name}: {detail}" if name in _TELLING else name
                raise SupervisorError(f"supervisord refused {what}: {why}", name) from None
            except _NO_ANSWER as error:
                hangs = isinstance(error, TimeoutError)
                raise SupervisorLost(
                    f"supervisord does not answer on {self.layout.socket} ({printable(error)})", hangs
                ) from None
            except _NOT_UNDERSTOOD as error:
                # A process accepts connections there, so supervisord is not dead.
                raise SupervisorLost(
                    f"supervisord's answer to {method} on {self.layout.socket} is not understood "
                    f"({printable(repr(error))})",
                    hangs=True,
                ) from None


def _spawn_error(answer: Any) -> str:
    return str(answer["spawnerr"])


def _number(value: Any) -> int:
    """A pid, or a time."""
    if type(value) is not int or value < 0:
        raise ValueError(f"a number is expected, not {value!r}")
    return value


def _processes(answer: Any) -> dict[str, Process]:
    return {process.name: process for process in map(_process, answer)}


def _process(info: Any) -> Process:
    name, state = info["name"], info["statename"]
    if not isinstance(name, str) or state not in _STATES:
        raise ValueError(f"a process is expected, not {name!r} in state {state!r}")
    return Process(name, state, _number(info["pid"]), _number(info["start"]))


class _Transport(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        return _UnixConnection(self._path)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT)
        try:
            self.sock.connect(str(self._path))
        except OSError:
            self.sock.close()
            raise


@contextlib.contextmanager
def _ignoring(fault: str) -> Any:
    """For a wish that is already true."""
    try:
        yield
    except SupervisorError as error:
        if error.fault != fault:
            raise


def _tail(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""
