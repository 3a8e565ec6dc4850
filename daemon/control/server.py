"""The daemon's end of its control socket (protocol.py has the protocol).

No client can make the daemon wait: what one does not read is kept for it, up to a limit, and one that says
nothing gives way when there are too many.
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

#: Commands that change nothing; who gives another is told to the log.
_LOOKS = frozenset({"status", "why"})
_LONGEST_LINE = 1 << 16
_MOST_UNREAD = 1 << 20
_MOST_CLIENTS = 64
_TOLD = 200


class Conversation:
    """One client, from its command to the result.

    Args:
        heard: is given the command when all of it is there.
    """

    def __init__(
        self,
        connection: socket.socket,
        peer: Peer,
        selector: selectors.BaseSelector,
        heard: Callable[[dict[str, Any], Conversation], None],
    ) -> None:
        connection.setblocking(False)
        self.peer = peer
        self._connection = connection
        self._selector = selector
        self._heard = heard
        self._received = b""
        self._unsent = bytearray()
        self._asked = self._ended = False
        self._reads = True
        self._watched = 0

    @property
    def is_over(self) -> bool:
        """It has its result, or has gone."""
        return self._connection.fileno() < 0

    @property
    def is_waited_for(self) -> bool:
        """It has yet to say what it wants, or to read what it was told."""
        return not self._asked or bool(self._unsent)

    def listen(self) -> None:
        self._watch()

    def line(self, text: str) -> None:
        self._send({"line": text})

    def event(self, event: dict[str, Any]) -> None:
        self._send({"event": event})

    def end(self, code: int, **result: Any) -> None:
        self._asked = self._ended = True
        self._send({"code": code, **result})

    def close(self) -> None:
        """At once; what is unsent is lost."""
        if not self.is_over:
            self._reads = False
            self._unsent.clear()
            self._watch()
            self._connection.close()

    def _send(self, message: dict[str, Any]) -> None:
        # A client that has gone or does not read is no reason to stop what it has asked for.
        if self.is_over:
            return
        self._unsent += json.dumps(message).encode() + b"\n"
        if len(self._unsent) > _MOST_UNREAD:
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
            data = self._connection.recv(_LONGEST_LINE)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if self._asked:
            self._has_said_more(data)
            return
        self._received += data
        try:
            command = _command_in(self._received, complete=not data)
        except ValueError as error:
            self.end(USAGE, error=f"not a command: {error}")
            return
        if command is not None:
            self._asked = True
            try:
                self._heard(command, self)
            except Exception as fault:
                log.exception("the command %s failed", json.dumps(command)[:_TOLD])
                self.end(FAILED, error=f"internal error in fd-dp ({fault!r}); its log has the stack trace")

    def _has_said_more(self, data: bytes) -> None:
        """It has closed its end, mostly. Whether it still reads, sending nothing tells."""
        if data:
            return
        self._reads = False
        try:
            self._connection.send(b"")
        except OSError:
            self.close()
        else:
            self._watch()

    def _watch(self) -> None:
        """Is woken for what it waits for, and for nothing else."""
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
        #: In the order in which they came.
        self._conversations: list[Conversation] = []
        self._is_watched = False
        # A directory with the setgid bit would give the socket another group.
        socket_path = SocketPath(path, 0o660, group=os.getegid(), backlog=_MOST_CLIENTS)
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
            # After a failure, too: the path can come back, for example when a mount over it goes.
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
            # It has gone already, or we are out of descriptors.
            log.warning("fdctl cannot be answered: %s", error)
            return
        conversation = Conversation(connection, peer, self._selector, self._heard)
        if not peer_credentials.may_command(peer, os.geteuid(), os.getegid()):
            log.warning("refused to talk to %s: only %s may", peer, peer_credentials.own_rights())
            conversation.end(DENIED, error=f"only {peer_credentials.own_rights()} may talk to fd-dp")
            conversation.close()
        elif not self._make_room():
            log.warning("refused to talk to %s: %d clients are connected", peer, _MOST_CLIENTS)
            conversation.end(BUSY, error=f"{_MOST_CLIENTS} clients are connected; try again later")
            conversation.close()
        else:
            self._conversations.append(conversation)
            conversation.listen()

    def _make_room(self) -> bool:
        """Whoever keeps us waiting longest gives way; False if nobody does."""
        self._conversations = [each for each in self._conversations if not each.is_over]
        if len(self._conversations) < _MOST_CLIENTS:
            return True
        slow = next((each for each in self._conversations if each.is_waited_for), None)
        if slow is not None:
            slow.close()
        return slow is not None

    def _heard(self, command: dict[str, Any], conversation: Conversation) -> None:
        if command.get("do") not in _LOOKS:
            log.info("%s asks for %s", conversation.peer, json.dumps(command)[:_TOLD])
        self._handle(command, conversation)


def _command_in(received: bytes, complete: bool) -> dict[str, Any] | None:
    """The command, None while it is incomplete. Raises ValueError for anything else."""
    line, newline, _ = received.partition(b"\n")
    if not newline:
        if complete or len(received) > _LONGEST_LINE:
            raise ValueError("a command is one line of JSON")
        return None
    command = parse_json(line)
    if not isinstance(command, dict) or not all(isinstance(v, str | bool) for v in command.values()):
        raise ValueError("a command is a JSON object of texts and booleans")
    return command
