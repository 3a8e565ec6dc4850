"""A client that sends bytes unchanged and reads one answer at a time."""

from __future__ import annotations

import socket
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

#: The head of a request, without the line that says how its body ends.
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
POST = HEAD + b"Content-Length: 2\r\n\r\n{}"
GET = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
STREAM = HEAD + b'Content-Length: 16\r\n\r\n{"stream": true}'


class RawAnswer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class RawClient:
    def __init__(self, where: int | Path, *, receive_buffer: int | None = None) -> None:
        """`where` is a port on loopback, or the path of a unix socket."""
        self.sock = socket.socket(socket.AF_INET if isinstance(where, int) else socket.AF_UNIX)
        if receive_buffer is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(20)
        self.sock.connect(("127.0.0.1", where) if isinstance(where, int) else str(where))
        self._file = self.sock.makefile("rb")

    @property
    def own_port(self) -> int:
        return int(self.sock.getsockname()[1])

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def send_what_is_taken(self, data: bytes) -> None:
        """Send the data; the router may close the connection before the end."""
        try:
            self.sock.sendall(data)
        except (ConnectionResetError, BrokenPipeError):
            return

    def head(self) -> tuple[int, dict[str, str]]:
        line = self._file.readline()
        assert line, "the connection was closed without an answer"
        status = int(line.split()[1])
        lines = iter(lambda: self._file.readline().decode("latin-1").strip(), "")
        return status, {
            name.lower(): value.strip() for name, _, value in (each.partition(":") for each in lines)
        }

    def answer(self, *, to_head: bool = False) -> RawAnswer:
        """Return the next answer, which may be an interim one."""
        status, headers = self.head()
        body = b""
        if status < 200 or status in (204, 304) or to_head:
            pass
        elif "content-length" in headers:
            body = self._file.read(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            while piece := self.chunk():
                body += piece
        else:
            body = self._file.read()
        return RawAnswer(status, headers, body)

    def chunk(self) -> bytes:
        """Return the next chunk of a chunked body; empty at its end."""
        piece = self._file.read(int(self._file.readline(), 16))
        assert self._file.readline() == b"\r\n"
        return piece

    def read(self, size: int) -> bytes:
        return self._file.read(size)

    def rest(self) -> bytes:
        """Return everything until the router closes the connection."""
        return self._file.read()

    def is_at_its_end(self) -> bool:
        """Wait for a byte or the end of the connection; return True if the router has closed or reset it."""
        try:
            return self._file.read(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self._file.close()
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
