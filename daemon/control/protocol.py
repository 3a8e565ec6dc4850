"""fdctl's protocol: one JSON object per line over a unix socket of the daemon's user and group.

A client sends one command and reads until the daemon closes the connection: any number of ``{"line": "..."}``
for people and ``{"event": {...}}`` for programs, then ``{"code": 0, ...}`` with the result. If it disconnects
earlier, the command continues. server.py is the daemon's end.
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
from ..config.loader import MAX_SOCKET_PATH
from . import peer_credentials

#: Exit codes of fdctl, and the `code` of every result.
OK, FAILED, USAGE, NO_DAEMON, BAD_CONFIG, BUSY, NO_GROUP, DENIED = range(8)
#: Exit code of fdctl after Ctrl-C. The command continues.
DETACHED = 130

#: Seconds between two attempts to connect.
_RETRY_INTERVAL = 0.05


def socket_path(run: Path) -> Path:
    return run / "fd-dp.sock"


class DaemonUnreachable(FastDeployError):
    """No daemon listens on the socket, or it closed the connection before the result."""


class NotAllowed(FastDeployError):
    """This user has no access to the socket or its directory."""


def request(path: Path, command: dict[str, Any], timeout: float | None) -> Iterator[dict[str, Any]]:
    """Send a command and yield the daemon's messages. The last one is the result.

    Raises:
        DaemonUnreachable, NotAllowed: the text names a remedy.
    """
    if (length := len(os.fsencode(path))) > MAX_SOCKET_PATH:
        raise DaemonUnreachable(
            f"{path} has {length} bytes, but the path of a socket may have at most {MAX_SOCKET_PATH}; "
            "use a shorter --prefix or --socket"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            _connect(connection, path, timeout)
            # A daemon that rejects the client answers without reading.
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
            raise DaemonUnreachable(_why_unreachable(path)) from None
        except PermissionError:
            raise NotAllowed(_why_not_allowed(path)) from None
        except OSError as error:
            raise DaemonUnreachable(f"cannot talk to fd-dp on {path} ({error})") from None
        except ValueError as error:
            raise DaemonUnreachable(
                f"the process that listens on {path} does not answer like fd-dp ({printable(error)})"
            ) from None
        raise DaemonUnreachable(f"fd-dp on {path} closed the connection without an answer")


def _connect(connection: socket.socket, path: Path, timeout: float | None) -> None:
    """Connect. A socket with a timeout gets EAGAIN while the daemon's backlog is full."""
    deadline = time.monotonic() + (timeout or 0.0)
    while True:
        try:
            connection.connect(str(path))
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_INTERVAL)


def _why_unreachable(path: Path) -> str:
    missing, remedy = f"no fd-dp listens on {path}", "start it, or pass its --prefix"
    if not path.parent.is_dir():
        return f"{missing}: there is no directory {path.parent}; {remedy}"
    if pid := _holder(path.parent / "fd-dp.lock"):
        return f"{missing}, but fd-dp runs with pid {pid}; it tries again every second, and its log says why"
    return f"{missing}; {remedy}"


def _holder(lock: Path) -> int | None:
    """Return the pid of the process that holds a lock. Locking the file could disturb a new daemon."""
    try:
        inode = lock.stat().st_ino
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    # "1: FLOCK  ADVISORY  WRITE 1234 00:2d:567 0 EOF"
    fields = (line.split() for line in lines)
    holders = (int(f[4]) for f in fields if f[1] == "FLOCK" and f[5].rpartition(":")[2] == str(inode))
    return next((pid for pid in holders if pid > 0), None)


def _why_not_allowed(path: Path) -> str:
    try:
        directory = path.parent.stat()
    except OSError:
        return f"no access to {path.parent}; try again as root or as the user of fd-dp"
    permitted = peer_credentials.permitted(directory.st_uid, directory.st_gid)
    user = peer_credentials.user_name(os.geteuid())
    return f"{user} has no access to fd-dp on {path}: only {permitted} may talk to it"
