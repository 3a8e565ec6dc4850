"""fdctl's protocol: JSON, one object a line, over a unix socket of the daemon's user and group.

A client sends one command and reads lines until the daemon closes: any number of ``{"line": "..."}`` for
people and ``{"event": {...}}`` for programs, then one ``{"code": 0, ...}`` with the result. It may leave
before that; the command goes on. The daemon's end is in server.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...common.errors import FastDeployError
from ...common.foreign_text import parse_json, printable
from . import peer_credentials

#: Exit codes of fdctl, and the `code` of every answer.
OK, FAILED, USAGE, NO_DAEMON, BAD_CONFIG, BUSY, NO_GROUP, DENIED = range(8)
#: Of fdctl only: Ctrl-C. What it has asked for goes on.
DETACHED = 130

#: Between two tries to connect, in seconds.
_AGAIN = 0.05


def socket_path(run: Path) -> Path:
    return run / "fd-dp.sock"


class DaemonUnreachable(FastDeployError):
    """Nobody listens on the socket, or whoever does has gone in the middle of an answer."""


class NotAllowed(FastDeployError):
    """The socket, or the directory in which it lies, is not open to this user."""


def request(path: Path, command: dict[str, Any], timeout: float | None) -> Iterator[dict[str, Any]]:
    """The client's end: sends one command and yields what comes back, the result last.

    Raises:
        DaemonUnreachable: with what to do about it.
        NotAllowed: the same.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            _connect(connection, path, timeout)
            # Whoever is refused is told so, and not listened to.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(json.dumps(command).encode() + b"\n")
            with connection.makefile("rb") as stream:
                for line in stream:
                    message = parse_json(line)
                    if not isinstance(message, dict):
                        raise ValueError("a JSON object is expected")
                    yield message
                    if "code" in message:
                        return
        except (FileNotFoundError, ConnectionRefusedError):
            raise DaemonUnreachable(_what_is_missing(path)) from None
        except PermissionError:
            raise NotAllowed(_not_allowed(path)) from None
        except OSError as error:
            raise DaemonUnreachable(f"fd-dp on {path} cannot be asked ({error})") from None
        except ValueError as error:
            raise DaemonUnreachable(
                f"the process that listens on {path} does not answer as fd-dp does ({printable(error)})"
            ) from None
        raise DaemonUnreachable(f"fd-dp on {path} ended before it answered")


def _connect(connection: socket.socket, path: Path, timeout: float | None) -> None:
    """Where many connect at the same time the kernel tells those with a timeout to come back."""
    deadline = time.monotonic() + (timeout or 0.0)
    while True:
        try:
            connection.connect(str(path))
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_AGAIN)


def _what_is_missing(path: Path) -> str:
    missing, remedy = f"no fd-dp listens on {path}", "start it, or give its --prefix"
    if not path.parent.is_dir():
        return f"{missing}: there is no directory {path.parent}; {remedy}"
    if pid := _holder(path.parent / "fd-dp.lock"):
        return f"{missing}, but fd-dp, pid {pid}, is alive; it tries again every second, and its log says why"
    return f"{missing}; {remedy}"


def _holder(lock: Path) -> int | None:
    """Return the pid of the process that holds a lock. To try the lock could refuse it to a new fd-dp."""
    try:
        inode = lock.stat().st_ino
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    # "1: FLOCK  ADVISORY  WRITE 1234 00:2d:567 0 EOF"
    fields = (line.split() for line in lines)
    holders = (int(f[4]) for f in fields if f[1] == "FLOCK" and f[5].rpartition(":")[2] == str(inode))
    return next((pid for pid in holders if pid > 0), None)


def _not_allowed(path: Path) -> str:
    try:
        directory = path.parent.stat()
    except OSError:
        return f"{path.parent} is not open to you; be root, or the user of fd-dp"
    may = peer_credentials.who_may(directory.st_uid, directory.st_gid)
    user = peer_credentials.user_name(os.geteuid())
    return f"fd-dp on {path} is not open to {user}: only {may} may talk to it"
