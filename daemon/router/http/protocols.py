"""Interfaces between the HTTP connections and the parts that answer requests."""

from __future__ import annotations

import asyncio
from typing import Protocol


class Client(Protocol):
    """The client's connection, as long as this request has it."""

    def respond(self, status: bytes, lines: bytes, body: bytes, length: int | None = None) -> None:
        """A whole answer; `length` if it is not that of the body (HEAD)."""

    def begin(self, status: bytes, lines: bytes, length: int | None) -> None:
        """The head of an answer that comes piece by piece; it goes out with the first."""

    def send(self, piece: bytes) -> None: ...

    @property
    def fast_transport(self) -> asyncio.Transport | None:
        """Where chunks can be sent past `send`; None if that is impossible, or something is still unsent."""

    def send_chunks(self, chunks: bytes) -> None:
        """What is left of such chunks."""

    def end(self, trailer: bytes = b"") -> None:
        """The answer is whole. `trailer`: header lines behind it, where HTTP has a place for them."""

    def abort(self) -> None:
        """Nobody may take what the client got for a whole answer."""
