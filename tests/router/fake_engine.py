"""A replica without a model: real sockets, deterministic answers, and any misbehaviour a test asks for."""

from __future__ import annotations

import hashlib
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import requests

from ..waiting import wait_until as _wait_until


@dataclass
class Received:
    """One request with its raw bytes, and methods to answer it correctly or not."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    connection: socket.socket
    engine: FakeEngine
    #: Head and body as received.
    raw: bytes
    done: threading.Event = field(default_factory=threading.Event)

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def send_chunk(self, data: bytes) -> None:
        self.send(b"%X\r\n%s\r\n" % (len(data), data))

    def wait_until_cancelled(self, deadline: float = 20.0) -> bool:
        """Poll for a closed connection, as a replica does while it works."""
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP)
        return bool(poll.poll(deadline * 1000))

    def reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


#: Answers one request and returns whether to keep the connection.
Behaviour = Callable[[Received], bool]


def tokens(body: bytes, count: int = 8) -> list[str]:
    """Return the "generated" words: a function of the request, equal on every engine."""
    return [hashlib.sha256(body + bytes([i])).hexdigest()[:6] for i in range(count)]


def events(body: bytes, count: int = 8) -> list[bytes]:
    words = [json.dumps({"choices": [{"index": 0, "text": word}]}) for word in tokens(body, count)]
    return [f"data: {word}\n\n".encode() for word in [*words, "[DONE]"]]


def json_head(length: int, status: str = "200 OK", extra: bytes = b"") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n"
    return head.encode() + extra + b"\r\n"


EVENT_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def answers(received: Received) -> bool:
    """Answer like a healthy engine: a list of models, a completion, or a stream of one."""
    if received.target == "/health":
        body = b'{"status":"ready"}'
    elif received.target == "/v1/models":
        body = json.dumps({"object": "list", "data": [{"id": received.engine.name}]}).encode()
    elif b'"stream": true' in received.body:
        received.send(EVENT_HEAD)
        for event in events(received.body):
            received.send_chunk(event)
        received.send(b"0\r\n\r\n")
        return True
    else:
        body = json.dumps({"engine": received.engine.name, "text": tokens(received.body)}).encode()
    received.send(json_head(len(body)) + body)
    return True


def answers_status(status: str, body: bytes = b'{"error":{"message":"no"}}', extra: bytes = b"") -> Behaviour:
    def behave(received: Received) -> bool:
        received.send(json_head(len(body), status, extra) + body)
        return True

    return behave


def sends(data: bytes) -> Behaviour:
    """Send only these bytes, then close the connection."""

    def behave(received: Received) -> bool:
        received.send(data)
        return False

    return behave


def keeps(*pieces: bytes) -> Behaviour:
    """Send the pieces with short pauses between them, and leave the connection open."""

    def behave(received: Received) -> bool:
        for piece in pieces:
            received.send(piece)
            time.sleep(0.05)
        return True

    return behave


def closes(received: Received) -> bool:
    """Read the request, then close the connection as a dying process does."""
    return False


def never_answers(received: Received) -> bool:
    received.engine.cancelled.append(received.wait_until_cancelled())
    return False


def sends_the_head_of_a_stream(received: Received) -> bool:
    """Send the head of a stream, but never an event."""
    received.send(EVENT_HEAD)
    return never_answers(received)


def streams_for_ever(received: Received) -> bool:
    received.send(EVENT_HEAD)
    received.send_chunk(b"data: first\n\n")
    received.engine.cancelled.append(received.wait_until_cancelled())
    return False


def waits_for(gate: threading.Event) -> Behaviour:
    def behave(received: Received) -> bool:
        assert gate.wait(30)
        return answers(received)

    return behave


def waits_after_the_first_event(gate: threading.Event) -> Behaviour:
    """Stream one event at once, and the others when the gate is open."""

    def behave(received: Received) -> bool:
        received.send(EVENT_HEAD)
        first, *rest = events(received.body)
        received.send_chunk(first)
        assert gate.wait(60)
        for event in rest:
            received.send_chunk(event)
        received.send(b"0\r\n\r\n")
        return True

    return behave


def waits_after_each_event(seen: threading.Semaphore) -> Behaviour:
    """Stream events, each after the test has seen the previous one."""

    def behave(received: Received) -> bool:
        received.send(EVENT_HEAD)
        for event in events(received.body):
            received.send_chunk(event)
            assert seen.acquire(timeout=20)
        received.send(b"0\r\n\r\n")
        return True

    return behave


class FakeEngine:
    """Listens on a free port. `behaviour` answers /v1/..., `health` answers /health; both may be replaced."""

    def __init__(
        self, name: str = "engine", replica: int | None = None, behaviour: Behaviour = answers
    ) -> None:
        self.name = name
        self.replica = replica
        self.behaviour = behaviour
        self.health: Behaviour = answers
        #: Takes over a connection from its first byte, for misbehaviour below HTTP.
        self.takes_connection: Callable[[socket.socket], None] | None = None
        self.received: list[Received] = []
        self.health_checks = 0
        self.connections = 0
        #: For each request that waited for its cancellation, whether the cancellation arrived.
        self.cancelled: list[bool] = []
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """Stop like a killed process: close the listener and cut every open connection."""
        # Closing a listener does not wake the thread in accept(); shutting it down does.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def restart(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=512)
        self.start()

    def instance_info(self, **changes: Any) -> dict[str, Any]:
        info = {
            "role": "mixed",
            "host_ip": "127.0.0.1",
            "port": self.port,
            "version": "3.0",
            "is_paused": False,
        }
        if self.replica is not None:
            info["replica"] = self.replica
        return {**info, **changes}

    def register_with(self, router_url: str, **changes: Any) -> requests.Response:
        return requests.post(f"{router_url}/register", json=self.instance_info(**changes), timeout=10)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            if self.takes_connection is not None:
                return self.takes_connection(connection)
            with connection, connection.makefile("rb") as file:
                while (received := self._receive(connection, file)) is not None:
                    if received.target == "/health":
                        self.health_checks += 1
                        behaviour = self.health
                    else:
                        self.received.append(received)
                        behaviour = self.behaviour
                    keep = behaviour(received)
                    received.done.set()
                    if not keep:
                        return None
        except OSError:
            return None
        finally:
            self._open.discard(connection)

    def _receive(self, connection: socket.socket, file: Any) -> Received | None:
        head: list[bytes] = []
        while not head or head[-1].strip():
            head.append(file.readline())
            if not head[-1]:
                return None
        method, target, _ = head[0].decode().split()
        headers = []
        for line in head[1:-1]:
            name, _, value = line.decode("latin-1").partition(":")
            headers.append((name, value.strip()))
        length = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)
        body = file.read(length)
        return Received(method, target, headers, body, connection, self, b"".join(head) + body)


wait_until = partial(_wait_until, deadline=20.0)


def lines_of(response: requests.Response) -> Iterator[str]:
    return (line for line in response.iter_lines(decode_unicode=True) if line)
