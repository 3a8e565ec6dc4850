"""The fast path by itself: streams between real sockets, on their own event loop."""

from __future__ import annotations

import array
import asyncio
import fcntl
import socket
import struct
import termios
import time
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

import uvloop

from fastdeploy.daemon.router.http.fast_path import FastPath, FastStream, Passed

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Stage:
    """The event loop, shared by many scenes because a fast path's thread lives as long as the process."""

    def __init__(self, capacity: int) -> None:
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        #: Contexts of exceptions in the loop's callbacks.
        self._faults: list[dict[str, Any]] = []
        self.fast_path: FastPath
        self.run(self._set_up(capacity))

    def run(self, scene: Coroutine[Any, Any, None]) -> None:
        self._runner.run(scene)
        assert not self._faults

    def close(self) -> None:
        self._runner.close()

    async def _set_up(self, capacity: int) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, fault: self._faults.append(fault))
        self.fast_path = FastPath(capacity)


class Link(asyncio.Protocol):
    """A TCP connection: a transport of the loop, and the socket of its other end."""

    def __init__(self) -> None:
        #: Bytes that the loop has read.
        self.read = b""
        self.is_lost = False
        self.transport: asyncio.Transport
        self.other: socket.socket

    async def open(self, protocol: asyncio.Protocol | None = None, receive_buffer: int | None = None) -> Self:
        """Connect both ends.

        Args:
            protocol: the transport's protocol, in place of this object.
            receive_buffer: receive buffer of the other end; None for the system's default.
        """
        self.other = socket.socket()
        with socket.create_server(("127.0.0.1", 0)) as server:
            if receive_buffer is not None:
                self.other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self.other.connect(server.getsockname())
            ours, _ = server.accept()
        self.other.setblocking(False)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: protocol or self, sock=ours)
        self.transport = transport
        return self

    @property
    def number(self) -> int:
        return int(self.transport.get_extra_info("socket").fileno())

    @property
    def unread(self) -> int:
        """Return the number of received bytes that have not been read."""
        found = array.array("i", [0])
        fcntl.ioctl(self.number, termios.FIONREAD, found)
        return found[0]

    def leave(self, how: str) -> None:
        """Close the other end, in the given way."""
        if how == "half":
            self.other.shutdown(socket.SHUT_WR)
            return
        if how == "reset":
            self.other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.other.close()

    async def receive(self, size: int) -> bytes:
        """Read from the other end; fewer than `size` bytes mean the end of the connection."""
        got = b""
        async with asyncio.timeout(20):
            while len(got) < size:
                piece = await asyncio.get_running_loop().sock_recv(self.other, min(size - len(got), 1 << 16))
                if not piece:
                    break
                got += piece
        return got

    def close(self) -> None:
        self.transport.abort()
        self.other.close()

    # ---- callbacks of the loop

    def data_received(self, data: bytes) -> None:
        self.read += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True


class Passage:
    """A stream on the fast path between a replica and a client. Use it in ``async with``."""

    def __init__(self, stage: Stage) -> None:
        self.replica, self.client = Link(), Link()
        #: Set once the stream is back from the fast path.
        self.passed: Passed | None = None
        self.fast: FastStream
        self._path = stage.fast_path

    async def __aenter__(self) -> Self:
        await self.replica.open()
        await self.client.open(receive_buffer=1 << 16)
        self.fast = self.take()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.passed is None:
            self.take_back()
        self.replica.close()
        self.client.close()

    def take(self) -> FastStream:
        fast = self._path.take(self, self.replica.transport, self.client.transport)
        assert fast is not None
        return fast

    def take_back(self) -> Passed:
        self.passed = self.fast.take_back()
        return self.passed

    def given_back(self) -> None:
        self.take_back()

    def say(self, *pieces: bytes) -> None:
        """Send the pieces from the replica in one write."""
        assert self.replica.other.send(b"".join(pieces)) == sum(map(len, pieces))

    async def comes_back(self) -> Passed:
        await until(lambda: self.passed is not None)
        assert self.passed is not None
        return self.passed


def chunk(body: bytes, size: bytes = b"%x") -> bytes:
    return size % len(body) + b"\r\n" + body + b"\r\n"


async def until(condition: Callable[..., Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def await_without_the_loop(condition: Callable[..., Any]) -> None:
    """Wait for the condition while the event loop is blocked."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)
