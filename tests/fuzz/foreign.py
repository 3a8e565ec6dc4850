"""Strategies for untrusted input: values of any type, damaged valid values, and bytes."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

#: Edge cases of comparisons, conversions and arithmetic.
_NUMBERS = st.integers(-(2**70), 2**70) | st.sampled_from(
    [
        *(0, -1, 1, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**300),
        *(-0.0, 1e308, 0.5, float("nan"), float("inf"), float("-inf")),
    ]
)
_TEXTS = st.text(max_size=9) | st.sampled_from(
    ["", "\n", "\x1b[2J", "\ud800", "x" * 5000, "1", "-1", "1e999", "é", "127.0.0.1", "mixed", "ready", "\0"]
)
any_json = st.recursive(
    st.none() | st.booleans() | _NUMBERS | _TEXTS,
    lambda values: st.lists(values, max_size=4) | st.dictionaries(_TEXTS, values, max_size=4),
    max_leaves=8,
)
#: JSON that `json.dumps` never writes.
_TEXTS_OF_JSON = st.sampled_from(
    [
        b"",
        b"[" * 5000,
        b"[" * 200_000,
        b'{"a":' * 3000,
        b"1e400",
        b"-",
        b"\xff",
        b'"\\ud800"',
        b"9" * 5000,
        b"{",
    ]
)


@st.composite
def damaged(draw: st.DrawFn, valid: Any) -> Any:
    """Draw `valid` with some of its values replaced, removed or added."""
    value = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(0, 3))):
        holders = list(_holders(value))
        holder = draw(st.sampled_from(holders))
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            continue
        key = draw(st.sampled_from(keys))
        match draw(st.integers(0, 4)):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[draw(_TEXTS)] = holder.pop(key)
            case _:
                holder[key] = draw(any_json)
    return value


def _holders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from _holders(part)


def json_of(valid: Any) -> st.SearchStrategy[bytes]:
    """Return a strategy of bytes that are JSON like `valid`, or nearly."""
    told = (damaged(valid) | any_json).map(lambda value: json.dumps(value).encode())
    return told | _TEXTS_OF_JSON | told.flatmap(mutated)


@st.composite
def mutated(draw: st.DrawFn, valid: bytes) -> bytes:
    """Draw `valid` with some bytes changed, removed, doubled or added."""
    data = valid
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 12)))
        middle = draw(
            st.binary(max_size=6) | st.sampled_from([b"", data[at:end] * 2, b"\r\n", b"\0", b"\r", b" "])
        )
        data = data[:at] + middle + data[end:]
    return data


cuts = st.lists(st.integers(0, 4000), max_size=12)


def http_answer(body: bytes, status: str = "200 OK", content_type: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def one_line(message: str) -> None:
    assert "\n" not in message, message
    assert len(message) < 2000, message[:200]


class Answering:
    """A server that reads up to an empty line or a whole line of JSON, sends `answer`, and closes."""

    def __init__(self, listener: socket.socket) -> None:
        self.answer = b""
        self._listener = listener
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def port(self) -> int:
        return self._listener.getsockname()[1]

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                received = b""
                while b"\r\n\r\n" not in received and not received.endswith(b"}\n"):
                    if not (piece := connection.recv(65536)):
                        break
                    received += piece
                connection.sendall(self.answer)
                connection.shutdown(socket.SHUT_WR)
                # Closing with unread bytes would reset the connection, and lose the answer.
                while connection.recv(65536):
                    pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextlib.contextmanager
def answering(path: Path | None = None) -> Iterator[Answering]:
    """Start the server on a unix socket, or on a free port."""
    listener = socket.socket(socket.AF_UNIX if path else socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(str(path) if path else ("127.0.0.1", 0))
    listener.listen()
    server = Answering(listener)
    try:
        yield server
    finally:
        server.close()
