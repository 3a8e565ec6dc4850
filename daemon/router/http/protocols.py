"""Interfaces between the HTTP connections and the parts that answer requests."""

from __future__ import annotations

import asyncio
from typing import Protocol


class Client(Protocol):
    """The client's connection while it serves one request."""

    def respond(self, status: bytes, lines: bytes, body: bytes, length: int | None = None) -> None:
        """Send a complete response.

        Args:
            status: code and reason phrase.
            lines: header lines, each with its line end, without Content-Length.
            length: Content-Length if it is not that of `body` (HEAD).
        """

    def begin(self, status: bytes, lines: bytes, length: int | None) -> None:
        """Begin a response that is sent in pieces; its head is sent with the first."""

    def send(self, piece: bytes) -> None: ...

    @property
    def fast_transport(self) -> asyncio.Transport | None:
        """Transport for writing chunks directly; None if unsupported now, or if data is still unsent."""

    def send_chunks(self, chunks: bytes) -> None:
        """Send chunks, already framed, that the fast path could not send."""

    def end(self, trailer: bytes = b"") -> None:
        """End a complete response. `trailer`: header lines, dropped if the response is not chunked."""

    def abort(self) -> None:
        """Reset the connection, so that the client cannot take the response for complete."""
