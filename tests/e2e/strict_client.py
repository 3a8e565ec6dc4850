"""A client that checks every byte of an answer and accepts only complete ones."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from dataclasses import dataclass
from typing import Any

from ..router.asking import Head, connect, read_body, read_head
from ..router.generation import CHAT, DONE
from .asks import Ask, Said

#: Deadline in seconds for one answer.
_PATIENCE = 180.0


class Failed(Exception):
    """An answer is missing, incomplete or malformed."""


@dataclass(frozen=True)
class Heard:
    said: Said
    #: True if another replica resumed the stream, and if the request was retried at another one.
    resumed: bool
    restarted: bool


class StrictClient:
    """Sends one request after the other.

    Args:
        keeps_connection: reuse the connection while the router keeps it open.
    """

    def __init__(self, port: int, *, keeps_connection: bool) -> None:
        #: The request has been sent and its answer has not begun.
        self.is_waiting = False
        self._port = port
        self._keeps_connection = keeps_connection
        self._connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: Ask) -> Heard:
        """Return the checked answer. Raises Failed."""
        identity = uuid.uuid4().hex
        try:
            async with asyncio.timeout(_PATIENCE):
                return await self._ask(request, identity)
        except TimeoutError:
            raise Failed(f"request={identity}: no whole answer within {_PATIENCE:g} s") from None
        except (OSError, EOFError, ValueError, AssertionError, Failed) as error:
            raise Failed(f"request={identity}: {type(error).__name__}: {error}") from error
        finally:
            self.is_waiting = False

    def close(self) -> None:
        if self._connection is not None:
            self._connection[1].close()
            self._connection = None

    async def _ask(self, request: Ask, identity: str) -> Heard:
        if self._connection is None:
            self._connection = await connect(self._port)
        reader, writer = self._connection
        # The connection is reused only after a complete answer.
        self._connection = None
        try:
            writer.write(self._bytes_of(request, identity))
            self.is_waiting = True
            head = await read_head(reader)
            self.is_waiting = False
            body, trailers = await read_body(reader, head)
            said = _said(request, identity, head, body)
            if head.headers.get("connection", "").lower() != "close":
                _require(self._keeps_connection, "the connection is kept against the client's wish")
                self._connection = reader, writer
            else:
                _require(await reader.read() == b"", "there is something behind the answer")
        finally:
            if self._connection is None:
                writer.close()
        _require(trailers.keys() <= {"x-fd-resumed"}, f"trailers {trailers}")
        return Heard(said, bool(trailers), "x-fd-retries" in head.headers)

    def _bytes_of(self, request: Ask, identity: str) -> bytes:
        body = json.dumps(request.fields).encode()
        lines = f"Host: x\r\nContent-Type: application/json\r\nX-Request-Id: {identity}\r\n"
        if not self._keeps_connection:
            lines += "Connection: close\r\n"
        return f"POST {request.path} HTTP/1.1\r\n{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _said(request: Ask, identity: str, head: Head, body: bytes) -> Said:
    _require(head.status == 200, f"status {head.status}: {body[:500]!r}")
    _require(head.headers.get("x-request-id") == identity, f"headers {head.headers}")
    kind = head.headers.get("content-type", "").partition(";")[0]
    if not request.is_stream:
        _require(kind == "application/json", f"content type {kind}")
        answer = json.loads(body)
        _require(len(answer["choices"]) == request.fields["n"], "not all choices are there")
        for choice in answer["choices"]:
            _require(choice["finish_reason"] in ("stop", "length"), f"choice {choice}")
        return (_without_names(request, identity, body, answer),)
    _require(kind == "text/event-stream", f"content type {kind}")
    _require(body.endswith(b"\n\n" + DONE), f"the stream ends with {body[-300:]!r}")
    return _said_by_events(request, identity, body.removesuffix(b"\n\n" + DONE).split(b"\n\n"))


def _said_by_events(request: Ask, identity: str, blocks: list[bytes]) -> Said:
    """Return the events by choice, as the interleaving of choices may vary; usage last."""
    said: dict[int, list[bytes]] = {n: [] for n in range(request.fields["n"])}
    ended: set[int] = set()
    usage: list[bytes] = []
    created: set[int] = set()
    for block in blocks:
        data = block.removeprefix(b"data: ")
        _require(data != block and b"\n" not in data, f"not an event: {block[:300]!r}")
        event = json.loads(data)
        _require(
            "error" not in event and not usage, f"an error, or an event behind the usage: {data[:500]!r}"
        )
        created.add(event["created"])
        part = _without_names(request, identity, data, event)
        if not event["choices"]:
            usage.append(part)
            continue
        (choice,) = event["choices"]
        _require(choice["index"] not in ended, f"behind its choice's end: {data[:300]!r}")
        if choice["finish_reason"] is not None:
            ended.add(choice["index"])
        said[choice["index"]].append(part)
    _require(ended == said.keys(), f"only choices {ended} have come to their end")
    _require(len(created) == 1, f"created at {created}")
    _require(len(usage) == ("stream_options" in request.fields), f"usage {usage}")
    return (*(part for parts in said.values() for part in parts), *usage)


def _without_names(request: Ask, identity: str, data: bytes, event: dict[str, Any]) -> bytes:
    """Return the JSON with fixed values for the parts that may differ: id, time, and cached tokens."""
    expected = f"{'chatcmpl' if request.path == CHAT else 'cmpl'}-{identity}"
    _require(event["id"] == expected, f"id {event['id']}, not {expected}")
    _require(event["model"] == request.fields["model"], f"model {event['model']}")
    data = data.replace(expected.encode(), b"ID", 1)
    # Within a text, such a match is impossible: its quotation marks are escaped.
    return re.sub(rb'"(created|cached_tokens)":\d+', rb'"\1":0', data)


def _require(condition: bool, complaint: str) -> None:
    if not condition:
        raise Failed(complaint)
