"""XML-RPC client of supervisord.

supervisord starts, stops and reaps processes and rotates their output. All decisions are the daemon's.
"""

from __future__ import annotations

import contextlib
import re
import xml.parsers.expat
import xmlrpc.client
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from ...common.errors import FastDeployError
from ...common.foreign_text import printable
from ...common.http_client import HttpError, TimedOut, request
from . import output_tail
from .supervisord_config import Layout

T = TypeVar("T")

#: Seconds. supervisord answers in milliseconds; a suspended one must not block the daemon for long.
_TIMEOUT = 3.0
#: Raised for a malformed response, by xmlrpc.client and by the functions that parse it.
_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, xmlrpc.client.Error)
_OK = 200

_STATES = frozenset({"STOPPING", "UNKNOWN", "STARTING", "RUNNING", "STOPPED", "EXITED", "FATAL", "BACKOFF"})
#: Faults whose detail is short and useful.
_DETAILED_FAULTS = frozenset({"NO_FILE", "NOT_EXECUTABLE"})

UP = frozenset({"STARTING", "RUNNING"})
DOWN = frozenset({"STOPPED", "EXITED", "FATAL", "BACKOFF"})


class SupervisorError(FastDeployError):
    """supervisord rejected a call. `fault` is the name of the XML-RPC fault, for example "STILL_RUNNING"."""

    def __init__(self, message: str, fault: str = "") -> None:
        super().__init__(message)
        self.fault = fault


class SupervisorLost(SupervisorError):
    """supervisord did not answer a call. `hangs`: its socket accepts connections, so the process is alive."""

    def __init__(self, message: str, hangs: bool, fault: str = "") -> None:
        super().__init__(message, fault)
        self.hangs = hangs


@dataclass(frozen=True, slots=True)
class Process:
    """State of one program as reported by supervisord."""

    name: str
    #: STARTING, RUNNING, STOPPING, or one of DOWN.
    state: str
    pid: int
    #: Unix time of the last start; 0 if there was none.
    started: int


class Supervisor:
    """XML-RPC client. Every method raises SupervisorLost or SupervisorError, and nothing else."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def pid(self) -> int:
        return self._call("getPID", read=_number)

    def processes(self) -> dict[str, Process]:
        return self._call("getAllProcessInfo", read=_processes)

    def start(self, name: str) -> None:
        """Start a program without waiting for it: supervisord would serve no other call meanwhile."""
        try:
            with _ignoring("ALREADY_STARTED"):
                self._call("startProcess", name, False)
        except SupervisorError as error:
            if error.fault != "SPAWN_ERROR":
                raise
            reason = printable(self._call("getProcessInfo", name, read=_spawn_error))
            raise SupervisorError(f"supervisord cannot start {name}: {reason}", error.fault) from None

    def stop(self, name: str) -> None:
        """Send SIGTERM to the process group; SIGKILL follows after the stop timeout. Do not wait."""
        with _ignoring("NOT_RUNNING"):
            self._call("stopProcess", name, False)

    def send_signal(self, name: str, signal: str) -> None:
        """Send a signal, such as "HUP", to the main process of a program. No error if it does not run."""
        with _ignoring("NOT_RUNNING"):
            self._call("signalProcess", name, signal)

    def replace(self, name: str, *, add: bool) -> None:
        """Remove a program that does not run and, with `add`, add it again from supervisord.conf.

        supervisord uses a changed configuration only after this; a restart keeps the old one.
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
        """Return how the last process of a program ended: "exit status 3", "terminated by SIGKILL"."""
        try:
            return self._call("howItEnded", name, namespace="fd") or "ended"
        except SupervisorLost:
            raise
        except SupervisorError:
            # An older supervisord, adopted after an upgrade, writes the signal only to its log.
            pattern = rf"(?:exited|stopped): {re.escape(name)} \((.*?)(?:; (?:not )?expected)?\)$"
            found = re.findall(pattern, output_tail.tail(self.layout.log), re.MULTILINE)
            return found[-1] if found else "ended"

    def _call(
        self,
        method: str,
        *arguments: Any,
        namespace: str = "supervisor",
        read: Callable[[Any], T] = lambda response: response,
    ) -> T:
        try:
            response = request(
                self.layout.socket,
                "POST",
                "/RPC2",
                timeout=_TIMEOUT,
                body=xmlrpc.client.dumps(arguments, f"{namespace}.{method}").encode(),
                headers={"Content-Type": "text/xml"},
            )
            if response.status != _OK:
                raise HttpError(f"status {response.status}")
            (result,), _ = xmlrpc.client.loads(response.body)
            return read(result)
        except xmlrpc.client.Fault as fault:
            # "NAME" or "NAME: detail". The detail of CANT_REREAD lists the whole environment.
            name, _, detail = printable(str(fault.faultString)).partition(": ")
            if name == "SHUTDOWN_STATE":
                # It rejects every call until it has ended.
                raise SupervisorLost("supervisord is shutting down", hangs=True, fault=name) from None
            what = " ".join((method, *map(str, arguments[:1])))
            why = f"{name}: {detail}" if name in _DETAILED_FAULTS else name
            raise SupervisorError(f"supervisord rejected {what}: {why}", name) from None
        # ExpatError: supervisord was killed while it sent its response.
        except (HttpError, xml.parsers.expat.ExpatError) as error:
            hangs = isinstance(error, TimedOut)
            raise SupervisorLost(
                f"supervisord does not answer on {self.layout.socket} ({printable(error)})", hangs
            ) from None
        except _MALFORMED as error:
            # The socket accepted the connection, so the process is alive.
            raise SupervisorLost(
                f"malformed response of supervisord to {method} on {self.layout.socket} "
                f"({printable(repr(error))})",
                hangs=True,
            ) from None


def _spawn_error(response: Any) -> str:
    return str(response["spawnerr"])


def _number(value: Any) -> int:
    """Parse a pid or a time."""
    if type(value) is not int or value < 0:
        raise ValueError(f"expected a number, not {value!r}")
    return value


def _processes(response: Any) -> dict[str, Process]:
    return {process.name: process for process in map(_process, response)}


def _process(info: Any) -> Process:
    name, state = info["name"], info["statename"]
    if not isinstance(name, str) or state not in _STATES:
        raise ValueError(f"expected a process, not {name!r} in state {state!r}")
    return Process(name, state, _number(info["pid"]), _number(info["start"]))


@contextlib.contextmanager
def _ignoring(fault: str) -> Iterator[None]:
    """Suppress a fault which says that the requested state is reached already."""
    try:
        yield
    except SupervisorError as error:
        if error.fault != fault:
            raise
