"""Reads one HTTP/1.1 response from a file.

Strict where http.client is kind: a head or a body that ends early is an error here, never a response that
only looks complete. It hands out what has come without waiting for more.
"""

from __future__ import annotations

import io
import re

from ...errors import FastDeployError

PIECE = 64 << 10
_MAX_LINE = 64 << 10
_MAX_HEADERS = 200
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*))?\r?\n")
_HEADER_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([\t\x20-\x7e\x80-\xff]*?)[ \t]*\r?\n")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r?\n")

Headers = list[tuple[str, str]]


class ResponseError(FastDeployError):
    """What came is not a whole HTTP response."""


class Unanswered(ResponseError):
    """The connection ended before a whole head had come."""


class Garbled(ResponseError):
    """The head is not HTTP."""


class Cut(ResponseError):
    """The body ended before its end."""


class Response:
    """A response whose head has been read. `read` gives the body.

    Attributes:
        ended: the body was read to its end, and the end was where it should be.
        reusable: then another response can come on the same connection.
    """

    def __init__(self, file: io.BufferedReader, method: str) -> None:
        """Reads the head.

        Raises:
            Unanswered, Garbled: see there.
            OSError: from `file`.
        """
        self._file = file
        self.ended = False
        self._read_status()
        self._chunked = False
        #: A chunk has begun whose closing line has not been read.
        self._in_chunk = False
        #: Bytes still to come: of the chunk, of the body, or None for "until the connection closes".
        self._left: int | None = None
        self._decide_framing(method)

    def header(self, name: str) -> str:
        """The first header of that name, which is written in lower case; "" if there is none."""
        return next((value for key, value in self.headers if key.lower() == name), "")

    def read(self) -> bytes:
        """The next piece of the body as soon as any of it is there, without chunk framing; b"" at the end.

        Raises:
            Cut: the connection ended too early, or the framing is broken.
            OSError: from the file.
        """
        if self.ended:
            return b""
        if self._chunked and self._left == 0 and not self._next_chunk():
            self.ended = True
            return b""
        piece = self._file.read1(PIECE if self._left is None else min(self._left, PIECE))
        if self._left is not None:
            if not piece:
                raise Cut("the connection closed in the middle of the answer")
            self._left -= len(piece)
        self.ended = not piece or (self._left == 0 and not self._chunked)
        return piece

    def _read_status(self) -> None:
        while True:
            line = self._line()
            match = _STATUS_LINE.fullmatch(line)
            if match is None:
                raise Garbled(f"{line[:40]!r} came instead of a status line")
            self.headers = self._read_headers()
            self._version = match[1]
            self.status = int(match[2])
            self.reason = (match[3] or b"").decode("latin-1").strip()
            # 100 to 199 announce the real answer, but for 101, which nobody asked for.
            if self.status >= 200:
                return
            if self.status == 101:
                raise Garbled("it switched protocols unasked")

    def _decide_framing(self, method: str) -> None:
        connection = self.header("connection").lower()
        self.reusable = self._version == b"1" and "close" not in [
            word.strip() for word in connection.split(",")
        ]
        coding = self.header("transfer-encoding").lower()
        if coding not in ("", "chunked"):
            raise Garbled(f"it uses the transfer coding {coding[:40]!r}")
        lengths = {value for name, value in self.headers if name.lower() == "content-length"}
        if method == "HEAD" or self.status in (204, 304):
            self._left = 0
        elif coding:
            self._chunked, self._left = True, 0
            # Chunking overrides a length; passed on, the two would contradict each other.
            self.headers = [(name, value) for name, value in self.headers if name.lower() != "content-length"]
        elif lengths:
            length = lengths.pop()
            if lengths or not (length.isascii() and length.isdecimal() and len(length) <= 15):
                raise Garbled("its Content-Length is not one number")
            self._left = int(length)
        else:
            self.reusable = False
        self.ended = self._left == 0 and not self._chunked

    def _next_chunk(self) -> bool:
        """False after the last one. The line that closes a chunk is read this late not to hold it up."""
        try:
            if self._in_chunk and self._line() not in (b"\r\n", b"\n"):
                raise Cut("a chunk is longer than it said")
            match = _CHUNK_LINE.fullmatch(line := self._line())
            if match is None:
                raise Cut(f"{line[:40]!r} came instead of a chunk")
            self._left = int(match[1], 16)
            self._in_chunk = True
            if self._left == 0:
                self._read_headers()  # trailers: not passed on, the client did not ask for any
            return self._left > 0
        except (Unanswered, Garbled) as error:
            raise Cut(f"the answer broke off between two chunks: {error}") from None

    def _read_headers(self) -> Headers:
        headers: Headers = []
        while (line := self._line()) not in (b"\r\n", b"\n"):
            match = _HEADER_LINE.fullmatch(line)
            if match is None or len(headers) == _MAX_HEADERS:
                raise Garbled(f"{line[:40]!r} came instead of a header")
            headers.append((match[1].decode("latin-1"), match[2].decode("latin-1")))
        return headers

    def _line(self) -> bytes:
        line = self._file.readline(_MAX_LINE)
        if not line.endswith(b"\n"):
            if len(line) == _MAX_LINE:
                raise Garbled("a line has no end")
            raise Unanswered("the connection was closed")
        return line
