"""Data written in one turn of the loop is sent at the end of the turn."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine

import pytest
import uvloop

from fastdeploy.daemon.router.http.write_batcher import WriteBatcher


class Pair:
    """A transport of the loop, and the other end of its socket."""

    def __init__(self) -> None:
        self._ours, self.other = socket.socketpair()
        self.other.setblocking(False)
        self.transport: asyncio.WriteTransport

    async def open(self) -> Pair:
        loop = asyncio.get_running_loop()
        self.transport, _ = await loop.create_connection(asyncio.Protocol, sock=self._ours)
        return self

    def received(self) -> bytes:
        try:
            return self.other.recv(1 << 20)
        except BlockingIOError:
            return b""


def run(coroutine: Coroutine[object, object, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(coroutine)


def test_writes_wait_for_the_end_of_the_turn_and_keep_their_order() -> None:
    async def scene() -> None:
        outbox, pair = WriteBatcher(), await Pair().open()
        outbox.write(pair.transport, b"one ")
        outbox.write(pair.transport, b"two")
        assert pair.received() == b""
        await asyncio.sleep(0)
        assert pair.received() == b"one two"
        outbox.write(pair.transport, b"three")
        await asyncio.sleep(0)
        assert pair.received() == b"three"

    run(scene())


def test_immediate_write_follows_waiting_writes() -> None:
    async def scene() -> None:
        outbox, pair = WriteBatcher(), await Pair().open()
        outbox.write(pair.transport, b"one ")
        outbox.write_now(pair.transport, b"two")
        assert pair.received() == b"one two"

    run(scene())


def test_data_can_be_sent_before_a_transport_is_closed() -> None:
    async def scene() -> None:
        outbox, pair = WriteBatcher(), await Pair().open()
        outbox.write(pair.transport, b"last words")
        outbox.flush()
        pair.transport.close()
        await asyncio.sleep(0)
        assert pair.received() == b"last words"

    run(scene())


@pytest.mark.parametrize("how", ["close", "abort"])
def test_closed_transport_does_not_affect_others(how: str) -> None:
    async def scene() -> None:
        outbox = WriteBatcher()
        gone, here = await Pair().open(), await Pair().open()
        outbox.write(gone.transport, b"nobody reads this")
        outbox.write(here.transport, b"but this")
        getattr(gone.transport, how)()
        await asyncio.sleep(0)
        assert here.received() == b"but this"

    run(scene())


@pytest.mark.parametrize(("count", "size"), [(32, 10), (1, 20_000)], ids=["many", "large"])
def test_many_writes_and_large_ones_do_not_wait(count: int, size: int) -> None:
    async def scene() -> None:
        outbox, pair = WriteBatcher(), await Pair().open()
        for _ in range(count):
            outbox.write(pair.transport, bytes(size))
        assert len(pair.received()) == count * size

    run(scene())
