"""A client of the router that rejects incomplete answers and checks the text of complete ones."""

from __future__ import annotations

import asyncio
import json
import uuid
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .generation import COMPLETIONS, DONE, Generation


class Broken(Exception):
    """The answer was cut off."""


class Head(NamedTuple):
    status: int
    #: Keys are lower case.
    headers: dict[str, str]


@dataclass(frozen=True)
class Answered:
    generation: Generation
    status: int
    #: Keys are lower case.
    headers: dict[str, str]
    body: bytes
    trailers: dict[str, str] = field(default_factory=dict)

    @property
    def resumed_by(self) -> list[str]:
        found = self.trailers.get("x-fd-resumed") or self.headers.get("x-fd-resumed")
        return found.split(", ") if found else []

    @property
    def error(self) -> dict[str, Any]:
        """Return the error of an error answer, or the one that ends a stream."""
        if self.body.endswith(DONE):
            last = self.body.removesuffix(DONE).strip().rpartition(b"\n")[2].removeprefix(b"data: ")
        else:
            last = self.body
        error: dict[str, Any] = json.loads(last)["error"]
        return error

    def check(self) -> None:
        """Assert that the answer is, byte for byte, that of a replica without faults."""
        assert self.status == 200, self.body
        generation = self.generation
        if not generation.request.get("stream"):
            head = json.loads(self.body)
            assert self.body == generation.whole(head["id"], head["created"])
            assert head["id"].startswith(f"cmpl-{self.headers['x-request-id']}-")
            return
        assert self.body.startswith(b"data: "), self.body[:200]
        head = json.loads(self.body[6:].partition(b"\n")[0])
        assert self.body == generation.stream(head["id"], head["created"])
        assert head["id"].startswith(f"cmpl-{self.headers['x-request-id']}-")


def generation(path: str = COMPLETIONS, seed: int = 1, **request: Any) -> Generation:
    return Generation(path, json.dumps({"stream": True, **request}).encode(), seed)


def ask(port: int, request: Generation, identity: str = "", pause: float = 0.0) -> Answered:
    return asyncio.run(asking(port, request, identity, pause))


async def asking(port: int, request: Generation, identity: str = "", pause: float = 0.0) -> Answered:
    """Send the request on a new connection, and return the answer.

    Args:
        pause: seconds between reading the head of the answer and its body.

    Raises:
        Broken: the answer is incomplete.
    """
    return await converse(*await connect(port), request, identity, pause)


async def connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", port)


async def converse(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    request: Generation,
    identity: str = "",
    pause: float = 0.0,
) -> Answered:
    """Do what `asking` does, on an existing connection."""
    try:
        writer.write(request_bytes(request, identity))
        head = await read_head(reader)
        await asyncio.sleep(pause)
        body, trailers = await read_body(reader, head)
    except (OSError, asyncio.IncompleteReadError) as error:
        raise Broken(f"{type(error).__name__}: {error}") from error
    finally:
        writer.close()
    return Answered(request, *head, body, trailers)


def request_bytes(request: Generation, identity: str = "") -> bytes:
    lines = f"Host: x\r\nX-FD-Seed: {request.seed}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    # Replicas identify by it the faults that they have already injected.
    lines += f"X-Request-Id: {identity or uuid.uuid4().hex}\r\n"
    head = f"POST {request.path} HTTP/1.1\r\n{lines}Content-Length: {len(request.body)}\r\n\r\n"
    return head.encode() + request.body


async def read_head(reader: asyncio.StreamReader) -> Head:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    return Head(int(first.split()[1]), _fields(lines))


def _fields(lines: list[str]) -> dict[str, str]:
    pairs = (line.partition(":") for line in lines)
    return {name.lower(): value.strip() for name, _, value in pairs}


async def read_body(reader: asyncio.StreamReader, head: Head) -> tuple[bytes, dict[str, str]]:
    """Return the body and the trailers."""
    headers = head.headers
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"])), {}
    assert headers["transfer-encoding"] == "chunked", headers
    pieces = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        pieces.append(await reader.readexactly(size))
        assert await reader.readexactly(2) == b"\r\n"
    trailers = []
    while line := (await reader.readuntil(b"\r\n")).decode("latin-1").strip():
        trailers.append(line)
    return b"".join(pieces), _fields(trailers)
