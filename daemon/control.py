"""fdctl's protocol: JSON, one object a line, over a unix socket that only the daemon's user can open.

A client sends one command and reads lines until the daemon closes: any number of ``{"line": "..."}`` for
people, then one ``{"code": 0, ...}`` with the result. It may leave before that; the command goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import FastDeployError

#: Exit codes of fdctl, and the `code` of every answer.
OK, FAILED, USAGE, NO_DAEMON, BAD_CONFIG, BUSY, NO_GROUP = range(7)

_LONGEST_LINE = 1 << 16
_TIMEOUT = 1.0


def socket_path(run: Path) -> Path:
    return run / "fd-dp.sock"


class DaemonUnreachable(FastDeployError):
    """Nobody listens on the socket, or whoever does has gone in the middle of an answer."""


class Conversation:
    """One client, from its command to the result."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""

    def line(self, text: str) -> None:
        self._send({"line": text})

    def end(self, code: int, **result: Any) -> None:
        self._send({"code": code, **result})
        self._connection.close()

    def receive(self) -> dict[str, Any] | None:
        """The command, None while it is incomplete. Raises ValueError for anything else."""
        data = self._connection.recv(_LONGEST_LINE)
        self._received += data
        line, newline, _ = self._received.partition(b"\n")
        if not newline:
            if not data or len(self._received) > _LONGEST_LINE:
                raise ValueError("a command is one line of JSON")
            return None
        try:
            command = json.loads(line)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        if not isinstance(command, dict) or not all(isinstance(v, str | bool) for v in command.values()):
            raise ValueError("a command is a JSON object of texts and booleans")
        return command

    def _send(self, message: dict[str, Any]) -> None:
        # A client that has gone or does not read is no reason to stop what it has asked for.
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")


class Server:
    """The daemon's end. The caller holds the lock of the run directory: a socket found there is stale."""

    def __init__(
        self,
        path: Path,
        selector: selectors.BaseSelector,
        handle: Callable[[dict[str, Any], Conversation], None],
    ) -> None:
        self._path = path
        self._selector = selector
        self._handle = handle
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        old = os.umask(0o177)
        try:
            self._listener.bind(str(path))
        finally:
            os.umask(old)
        self._listener.listen(16)
        self._listener.setblocking(False)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        self._selector.unregister(self._listener)
        self._listener.close()
        self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(_TIMEOUT)
        conversation = Conversation(connection)
        self._selector.register(
            connection, selectors.EVENT_READ, lambda: self._read(connection, conversation)
        )

    def _read(self, connection: socket.socket, conversation: Conversation) -> None:
        try:
            command = conversation.receive()
        except (OSError, ValueError) as error:
            self._selector.unregister(connection)
            conversation.end(USAGE, error=f"not a command: {error}")
            return
        if command is not None:
            self._selector.unregister(connection)
            self._handle(command, conversation)


def request(path: Path, command: dict[str, Any], timeout: float | None) -> Iterator[dict[str, Any]]:
    """The client's end: sends one command and yields what comes back, the result last.

    Raises:
        DaemonUnreachable: with what to do about it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(str(path))
            connection.sendall(json.dumps(command).encode() + b"\n")
            with connection.makefile("rb") as stream:
                for line in stream:
                    message = json.loads(line)
                    yield message
                    if "code" in message:
                        return
        except (FileNotFoundError, ConnectionRefusedError):
            raise DaemonUnreachable(f"no fd-dp listens on {path}; start it, or give its --prefix") from None
        except OSError as error:
            raise DaemonUnreachable(f"fd-dp on {path} cannot be asked ({error})") from None
        raise DaemonUnreachable(f"fd-dp on {path} ended before it answered")
