"""The daemon's end of the control socket; protocol.py describes the protocol.

Clients cannot block the daemon: unread messages are buffered up to a limit, and when there are too many
clients, an idle one is disconnected.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...common.foreign_text import parse_json
from ...common.unix_listener import SocketPath, UnixListener
from . import peer_credentials
from .peer_credentials import Peer
from .protocol import BUSY, DENIED, FAILED, USAGE

log = logging.getLogger("fd-dp")

#: Read-only commands. All others are logged with their sender.
_READ_ONLY = frozenset({"status", "why"})
_MAX_LINE = 1 << 16
_MAX_UNREAD = 1 << 20
_MAX_CLIENTS = 64
_MAX_LOGGED = 200


class Conversation:
    """Connection of one client, from its command to the result.

    Args:
        on_command: called with the complete command.
    """

    def __init__(
        self,
        connection: socket.socket,
        peer: Peer,
        selector: selectors.BaseSelector,
        on_command: Callable[[dict[str, Any], Conversation], None],
    ) -> None:
        connection.setblocking(False)
        self.peer = peer
        self._connection = connection
        self._selector = selector
        self._on_command = on_command
        self._received = b""
        self._unsent = bytearray()
        self._has_command = self._ended = False
        self._reads = True
        self._watched = 0

    @property
    def is_over(self) -> bool:
        """True once the client has its result or has disconnected."""
        return self._connection.fileno() < 0

    @property
    def is_idle(self) -> bool:
        """True while the client has not sent its command, or has not read its messages."""
        return not self._has_command or bool(self._unsent)

    def listen(self) -> None:
        self._watch()

    def line(self, text: str) -> None:
        self._send({"line": text})

    def event(self, event: dict[str, Any]) -> None:
        self._send({"event": event})

    def end(self, code: int, **result: Any) -> None:
        self._has_command = self._ended = True
        self._send({"code": code, **result})

    def close(self) -> None:
        """Disconnect at once. Unsent messages are lost."""
        if not self.is_over:
            self._reads = False
            self._unsent.clear()
            self._watch()
            self._connection.close()

    def _send(self, message: dict[str, Any]) -> None:
        # A client that disconnects or does not read must not stop its command.
        if self.is_over:
            return
        self._unsent += json.dumps(message).encode() + b"\n"
        if len(self._unsent) > _MAX_UNREAD:
            self.close()
        else:
            self._flush()

    def _wake(self) -> None:
        if self._unsent and not self.is_over:
            self._flush()
        if self._reads and not self.is_over:
            self._receive()

    def _flush(self) -> None:
        try:
            del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        if self._ended and not self._unsent:
            self.close()
        else:
            self._watch()

    def _receive(self) -> None:
        try:
            data = self._connection.recv(_MAX_LINE)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if self._has_command:
            self._after_command(data)
            return
        self._received += data
        try:
            command = _command_in(self._received, complete=not data)
        except ValueError as error:
            self.end(USAGE, error=f"not a command: {error}")
            return
        if command is not None:
            self._has_command = True
            try:
                self._on_command(command, self)
            except Exception as fault:
                log.exception("the command %s failed", json.dumps(command)[:_MAX_LOGGED])
                self.end(FAILED, error=f"internal error in fd-dp ({fault!r}); its log has the stack trace")

    def _after_command(self, data: bytes) -> None:
        """Ignore further data. At end of file, disconnect unless the client still reads."""
        if data:
            return
        self._reads = False
        # Sending nothing fails if the client has closed both directions.
        try:
            self._connection.send(b"")
        except OSError:
            self.close()
        else:
            self._watch()

    def _watch(self) -> None:
        """Register for exactly the events that this connection waits for."""
        wanted = (selectors.EVENT_READ if self._reads else 0) | (selectors.EVENT_WRITE if self._unsent else 0)
        if wanted == self._watched:
            return
        if not self._watched:
            self._selector.register(self._connection, wanted, self._wake)
        elif not wanted:
            self._selector.unregister(self._connection)
        else:
            self._selector.modify(self._connection, wanted, self._wake)
        self._watched = wanted


class ControlServer:
    """Listening socket and its clients.

    The caller holds the lock of the run directory, so an existing socket is stale.
    """

    def __init__(
        self,
        path: Path,
        selector: selectors.BaseSelector,
        handle: Callable[[dict[str, Any], Conversation], None],
    ) -> None:
        self._path = path
        self._selector = selector
        self._handle = handle
        #: Oldest first.
        self._conversations: list[Conversation] = []
        self._is_watched = False
        # A directory with the setgid bit would give the socket another group.
        socket_path = SocketPath(path, 0o660, group=os.getegid(), backlog=_MAX_CLIENTS)
        self._listener = UnixListener(socket_path)
        self.listen()

    def listen(self) -> str:
        """Bind the path unless it is bound and still there. Return why that failed, or ""."""
        if self._listener.is_bound():
            return ""
        if self._is_watched:
            self._selector.unregister(self._listener.socket)
        try:
            self._listener.bind()
            self._is_watched = True
        except OSError as error:
            return f"cannot listen on {self._path}: {error.strerror or error}"
        finally:
            # Also after a failure: the path may come back, for example when a mount over it is removed.
            if self._is_watched:
                self._selector.register(self._listener.socket, selectors.EVENT_READ, self._accept)
        return ""

    def close(self) -> None:
        if self._is_watched:
            self._selector.unregister(self._listener.socket)
        self._listener.close()
        for conversation in self._conversations:
            conversation.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.socket.accept()
            peer = peer_credentials.peer_of(connection)
        except OSError as error:
            # The client has disconnected, or no file descriptor is left.
            log.warning("cannot accept a connection of fdctl: %s", error)
            return
        conversation = Conversation(connection, peer, self._selector, self._on_command)
        if not peer_credentials.may_command(peer, os.geteuid(), os.getegid()):
            permitted = peer_credentials.permitted_here()
            log.warning("rejected a connection of %s: only %s may talk to fd-dp", peer, permitted)
            conversation.end(DENIED, error=f"only {permitted} may talk to fd-dp")
            conversation.close()
        elif not self._make_room():
            log.warning("rejected a connection of %s: %d clients are connected", peer, _MAX_CLIENTS)
            conversation.end(BUSY, error=f"{_MAX_CLIENTS} clients are connected; try again later")
            conversation.close()
        else:
            self._conversations.append(conversation)
            conversation.listen()

    def _make_room(self) -> bool:
        """Return whether there is room for one more client. If not, disconnect the oldest idle one first."""
        self._conversations = [each for each in self._conversations if not each.is_over]
        if len(self._conversations) < _MAX_CLIENTS:
            return True
        idle = next((each for each in self._conversations if each.is_idle), None)
        if idle is not None:
            idle.close()
        return idle is not None

    def _on_command(self, command: dict[str, Any], conversation: Conversation) -> None:
        if command.get("do") not in _READ_ONLY:
            log.info("%s asks for %s", conversation.peer, json.dumps(command)[:_MAX_LOGGED])
        self._handle(command, conversation)


def _command_in(received: bytes, complete: bool) -> dict[str, Any] | None:
    """Return the command, or None while it is incomplete. Raises ValueError if it is invalid."""
    line, newline, _ = received.partition(b"\n")
    if not newline:
        if complete or len(received) > _MAX_LINE:
            raise ValueError("a command is one line of JSON")
        return None
    command = parse_json(line)
    if not isinstance(command, dict) or not all(isinstance(v, str | bool) for v in command.values()):
        raise ValueError("a command is a JSON object of strings and booleans")
    return command
