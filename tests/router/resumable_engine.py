"""A replica process without a model, with the whole protocol between a router and its replicas.

    python -m tests.router.resumable_engine --port 1234 --router http://127.0.0.1:30000 --once DIRECTORY

It ends when its standard input does. generation.py defines its answers, engine_exchange.py its faults.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import struct
import sys
from collections import deque
from typing import Any, cast

import httptools
import uvloop

from .engine_exchange import Exchange, Over

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Engine:
    """State of the replica process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.connections: set[Connection] = set()
        #: Requests in progress, and the number that the router has cancelled.
        self.busy = self.cancelled = 0
        #: The latest requests: path, headers with lower-case names, and, for resumptions, the number of
        #: delivered tokens of each choice.
        self.received: deque[dict[str, Any]] = deque(maxlen=200)
        self._is_leaving = asyncio.Event()
        self.be_born()

    def be_born(self) -> None:
        self.instance = secrets.token_hex(16)
        self.token = secrets.token_hex(16)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(sys.stdin.fileno(), os._exit, 0)
        loop.add_signal_handler(signal.SIGTERM, self._is_leaving.set)
        await loop.create_server(lambda: Connection(self), "127.0.0.1", self.options.port, backlog=2048)
        beating = asyncio.create_task(self._beat())
        await self._is_leaving.wait()
        beating.cancel()
        await self.tell("deregister", {"host_ip": "127.0.0.1", "port": self.options.port})
        while self.busy:
            await asyncio.sleep(0.01)

    async def tell(self, what: str, fields: dict[str, Any]) -> bool:
        """Post `fields` to the router. Returns True on success."""
        host, _, port = self.options.router.removeprefix("http://").rpartition(":")
        body = json.dumps({**fields, "instance": self.instance}).encode()
        head = f"POST /{what} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(head.encode() + b"Connection: close\r\n\r\n" + body)
                answer = await reader.read()
                writer.close()
                return answer.startswith(b"HTTP/1.1 200")
        return False

    async def reborn(self, but: Connection | None = None) -> None:
        """Appear restarted to the router, without the time that a restart takes."""
        self.be_born()
        for connection in self.connections - {but}:
            connection.close()
        while not await self._register():
            await asyncio.sleep(0.02)

    async def _beat(self) -> None:
        while True:
            known = await self._register()
            await asyncio.sleep(self.options.beat if known else 0.05)

    async def _register(self) -> bool:
        options = self.options
        fields = {"role": "mixed", "host_ip": "127.0.0.1", "port": options.port, "replica": options.replica}
        if options.features:
            fields |= {"features": options.features.split(","), "token": self.token}
        if options.max_concurrency:
            fields["max_concurrency"] = options.max_concurrency
        if options.numeric_version:
            fields["numeric_version"] = options.numeric_version
        return await self.tell("register", fields)

    def state(self) -> bytes:
        state = {
            "busy": self.busy,
            "cancelled": self.cancelled,
            "received": list(self.received),
            "is_held_up": any(not connection.may_write.is_set() for connection in self.connections),
        }
        return json.dumps(state).encode()


class Connection(asyncio.Protocol):
    """A connection that serves one request at a time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._task: asyncio.Task[None] | None = None
        self.may_write = asyncio.Event()
        self.may_write.set()
        self._begin()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.engine.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.engine.connections.discard(self)
        self.may_write.set()
        if self._task is not None and not self._task.done():
            self._task.cancel()
            self._count_cancelled()

    def pause_writing(self) -> None:
        self.may_write.clear()

    def resume_writing(self) -> None:
        self.may_write.set()

    def on_message_begin(self) -> None:
        self._begin()

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower().decode()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        path = self._path.decode()
        if path == "/health":
            self.answer(200, b'{"status":"ready"}')
        elif path == "/renew":
            self._task = asyncio.create_task(self._renew())
        elif path == "/state":
            self.answer(200, self.engine.state())
        elif path == "/v1/models":
            self.answer(200, b'{"object":"list","data":[]}')
        elif path == "/metrics":
            self.answer(404, b"{}")
        else:
            record: dict[str, Any] = {"path": path, "headers": self._headers, "delivered": {}}
            self.engine.received.append(record)
            exchange = Exchange(self, path, self._headers, bytes(self._body), record["delivered"])
            self._task = asyncio.create_task(self._run(exchange))

    async def _renew(self) -> None:
        await self.engine.reborn(self)
        self.answer(200, b"{}")

    async def _run(self, exchange: Exchange) -> None:
        self.engine.busy += 1
        try:
            await exchange.run()
        except Over:
            pass
        finally:
            self.engine.busy -= 1

    async def write(self, data: bytes) -> None:
        if self.transport.is_closing():
            # After a failed write the transport is closing before the loop calls `connection_lost`.
            self._count_cancelled()
            raise Over
        self.transport.write(data)
        await self.may_write.wait()

    def _count_cancelled(self) -> None:
        """Count the cancelled request once, unless the engine itself closed the connection."""
        if self._task is not None:
            self._task = None
            self.engine.cancelled += 1

    def answer(self, status: int, body: bytes, extra: str = "") -> None:
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(f"{head}{extra}\r\n".encode() + body)

    def close(self) -> None:
        self._task = None
        self.transport.close()

    def reset(self) -> None:
        self._task = None
        sock = self.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.transport.abort()

    def _begin(self) -> None:
        self._path, self._body = b"", bytearray()
        self._headers: dict[str, str] = {}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--router", required=True)
    parser.add_argument("--replica", type=int, default=0)
    parser.add_argument("--features", default="resume,progress")
    parser.add_argument("--max-concurrency", type=int, default=0)
    parser.add_argument("--numeric-version", default="")
    parser.add_argument("--once", default="/nonexistent")
    parser.add_argument("--sign-every", type=float, default=0.0)
    parser.add_argument("--beat", type=float, default=5.0)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Engine(options).run())


if __name__ == "__main__":
    main()
