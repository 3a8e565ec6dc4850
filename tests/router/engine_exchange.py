"""One request to a replica without a model, with the faults that its body asks for.

`faults` in the body is a list of objects:

    at     the place, in order: "head", before everything else, or "resume" if the request resumes an answer;
           "begun", after the head, or "resumed"; "body", in the middle of an answer that is not streamed;
           for each event "half", in its middle, "mark", before its mark, "line", before its empty line,
           "frame", in the middle of its chunk, and "event", after it; "done", after the last event; "end",
           after the answer; "draft", after the interim head that carries a draft
    event  for a place at an event or draft: its index in the whole stream, from 0, or "any"; for "resume":
           the number of tokens of the first choice that were already delivered (if absent, each resumption)
    how    "kill", "stop", "close", "reset", "ends", "silence", "garbage", "reborn", "failed", "lost" (a 503
           that reports a dead worker), or the status of a refusal
    times  how often the fault occurs, counted over all replicas (1)

`interval` is the number of seconds between events, `delay` the seconds before the head, `signs` the number of
signs of life before each event, `frame` the chunk size (by default each event is a chunk), and `pad` the
number of extra bytes per event. `drafts` is the number of drafts of an answer that is not streamed, sent
`interval` seconds apart, and `interim` replaces the headers of their heads.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdeploy.common.errors import RequestError
from fastdeploy.common.resumption import LOST_HEADER, RESUME_PATH, Delivered, decode_resumption, draft_lines

from .generation import DONE, Event, Generation

if TYPE_CHECKING:
    from .resumable_engine import Connection

_EVENT_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"X-Request-Id: %b\r\n\r\n"
)


class Over(Exception):
    """The connection was ended on purpose."""


class Exchange:
    def __init__(
        self,
        connection: Connection,
        path: str,
        headers: dict[str, str],
        body: bytes,
        num_delivered: dict[int, int],
    ) -> None:
        """`num_delivered` is filled with the number of tokens already delivered of each choice."""
        self._num_delivered = num_delivered
        self._connection = connection
        self._options = connection.engine.options
        self._engine = connection.engine
        self._headers = headers
        self._path = path
        self._body = body
        self._id = headers.get("x-request-id", "")
        self._is_marked = "resume" in self._options.features and headers.get("x-fd-marks") == "1"
        says_so = "progress" in self._options.features and "x-fd-progress" in headers
        self._sign_every = (self._options.sign_every or float(headers["x-fd-progress"])) if says_so else 1e9
        self._spoke_at = time.monotonic()
        self._pending = b""
        self._frame = 0

    async def run(self) -> None:
        identity = f"cmpl-{self._id}-{self._engine.instance[:6]}"
        created = 1_700_000_000 + int(self._engine.instance[:4], 16)
        delivered: dict[int, Delivered] = {}
        if self._path == RESUME_PATH:
            if self._headers.get("x-fd-token") != self._engine.token:
                return self._connection.answer(401, b'{"error":{"message":"wrong token"}}')
            try:
                resumption = decode_resumption(self._body)
            except RequestError as error:
                return self._connection.answer(400, json.dumps({"error": {"message": str(error)}}).encode())
            self._body, path = resumption.body, resumption.path
            identity, created, delivered = resumption.id, resumption.created, resumption.choices
            self._num_delivered |= {choice: len(part.tokens) for choice, part in delivered.items()}
        else:
            path = self._path
        generation = Generation(path, self._body, int(self._headers.get("x-fd-seed", "0")))
        request = generation.request
        self._faults = request.get("faults", [])
        if self._path == RESUME_PATH:
            await self._may_fail("resume")
            await self._may_fail("resume", self._num_delivered.get(0))
        else:
            await self._may_fail("head")
        if problem := generation.contradiction(delivered):
            return self._connection.answer(409, json.dumps({"error": {"message": problem}}).encode())
        await self._pause(request.get("delay", 0.0), self._say_in_interim)
        if not request.get("stream"):
            for number, tokens in generation.drafts(request.get("drafts", 0), delivered):
                await asyncio.sleep(request.get("interval", 0.0))
                if self._is_marked:
                    lines = draft_lines(created, identity, tokens)
                    if "interim" in request:
                        lines = b"%b\r\n" % request["interim"].encode()
                    await self._connection.write(b"HTTP/1.1 102 Processing\r\n%b\r\n" % lines)
                await self._may_fail("draft", number)
            await self._answer_whole(generation.whole(identity, created))
            return None
        self._frame = request.get("frame", 0)
        await self._connection.write(_EVENT_HEAD % self._id.encode())
        await self._may_fail("resumed" if self._path == RESUME_PATH else "begun")
        events = list(generation.events(identity, created, delivered))
        number = len(list(generation.events("", 0))) - len(events)
        for event in events:
            await self._pause(request.get("interval", 0.0), self._say_between_events)
            for _ in range(request.get("signs", 0)):
                await self._say_between_events()
            await self._send_event(event if self._is_marked else event._replace(mark=b""), number)
            number += 1
        await self._send(DONE, is_last=True)
        await self._may_fail("done")
        await self._connection.write(b"0\r\n\r\n")
        await self._may_fail("end")
        return None

    async def _answer_whole(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        await self._connection.write(head + body[:10])
        await self._may_fail("body")
        await self._connection.write(body[10:])

    async def _send_event(self, event: Event, number: int) -> None:
        block = event.block
        parts = {"half": len(block) // 2, "mark": len(block) - len(event.mark) - 1, "line": len(block) - 1}
        for at, size in parts.items():
            if (fault := self._fault(at, number)) is not None:
                await self._send(block[:size])
                await self._fail(fault)
        if (fault := self._fault("frame", number)) is not None:
            await self._connection.write(b"%x\r\n%b" % (len(block), block[: len(block) // 2]))
            await self._fail(fault)
        await self._send(block)
        await self._may_fail("event", number)

    async def _send(self, piece: bytes, is_last: bool = False) -> None:
        self._spoke_at = time.monotonic()
        if not self._frame:
            await self._connection.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            return
        self._pending += piece
        while len(self._pending) >= (1 if is_last else self._frame):
            part, self._pending = self._pending[: self._frame], self._pending[self._frame :]
            await self._connection.write(b"%x\r\n%b\r\n" % (len(part), part))
            # Let this write go out by itself, as far as possible.
            await asyncio.sleep(0)

    async def _pause(self, seconds: float, say_so: Callable[[], Awaitable[None]]) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            due = self._spoke_at + self._sign_every - time.monotonic()
            await asyncio.sleep(max(0.0, min(left, due)))
            if time.monotonic() >= self._spoke_at + self._sign_every:
                await say_so()

    async def _say_in_interim(self) -> None:
        self._spoke_at = time.monotonic()
        await self._connection.write(b"HTTP/1.1 102 Processing\r\n\r\n")

    async def _say_between_events(self) -> None:
        await self._send(b":\n\n", is_last=True)

    # ---- faults

    async def _may_fail(self, at: str, event: int | None = None) -> None:
        fault = self._fault(at, event)
        if fault is not None:
            await self._fail(fault)

    def _fault(self, at: str, event: int | None = None) -> dict[str, Any] | None:
        """Return the fault that is due at this place."""
        for fault in self._faults:
            if fault["at"] == at and fault.get("event") in (event, "any") and self._is_due(fault):
                return fault
        return None

    async def _fail(self, fault: dict[str, Any]) -> None:
        connection, how = self._connection, fault["how"]
        match how:
            case "kill" | "stop":
                # Data already written is on its way: the router reads it, and then the end of the connection.
                os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
                return
            case "close":
                connection.close()
            case "reset":
                connection.reset()
            case "ends":
                connection.transport.write(b"0\r\n\r\n")
            case "silence":
                await asyncio.sleep(3600)
            case "garbage":
                connection.transport.write(b"\x00\x01 no HTTP\r\n\r\n")
                connection.close()
            case "reborn":
                await self._engine.reborn()
            case "failed":
                # The error of a replica whose model has crashed.
                error = b'data: {"error":{"message":"the engine has failed","type":"server_error"}}\n\n'
                await self._send(error)
                await self._send(DONE, is_last=True)
                connection.transport.write(b"0\r\n\r\n")
            case "lost":
                extra = f"Retry-After: 1\r\n{LOST_HEADER}: 1\r\n"
                connection.answer(503, b'{"error":{"message":"the engine was lost"}}', extra)
            case int():
                extra = "Retry-After: 1\r\n" if how in (429, 503) else ""
                connection.answer(how, b'{"error":{"message":"no"}}', extra)
        raise Over

    def _is_due(self, fault: dict[str, Any]) -> bool:
        """Claim one occurrence of the fault; replicas coordinate through files."""
        name = f"{self._id}-{self._faults.index(fault)}"
        for number in range(fault.get("times", 1)):
            with contextlib.suppress(FileExistsError):
                Path(self._options.once, f"{name}-{number}").touch(exist_ok=False)
                return True
        return False
