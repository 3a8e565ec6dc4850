"""With and without the fast path the client receives the same bytes, for any data and any split."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import httptools
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastdeploy.common.resumption import Resumption
from fastdeploy.daemon.router.http.fast_path import FastPath, FastStream
from fastdeploy.daemon.router.http.request import RawHeaders
from fastdeploy.daemon.router.http.upstream import ConnectionPool, Fault, ReplicaConnection
from fastdeploy.daemon.router.http.write_batcher import WriteBatcher
from fastdeploy.daemon.router.instance import ReplicaHandle
from fastdeploy.daemon.router.relay.transcript import Transcript

from .boards import instance
from .fake_engine import EVENT_HEAD
from .fast_stage import Link, Stage, chunk, until
from .test_transcript import DONE, SIGN, Said, events

PATH, BODY = "/v1/completions", b"{}"


class Outcome(NamedTuple):
    """The result of a stream."""

    #: As received by the client.
    body: bytes
    resumption: Resumption | None
    is_whole: bool
    problem: str


class Parsed:
    """The stream as parsed by the event loop alone: the HTTP parser, and a transcript."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transcript = Transcript()
        self._pieces: list[bytes] = []
        self._body = b""
        self._is_whole = self._is_over = False

    def feed(self, data: bytes) -> None:
        if self._is_over:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._is_over = True
        if not self._transcript.problem and self._pieces:
            self._body += self._transcript.feed(b"".join(self._pieces))
        self._is_over |= self._is_whole or self._transcript.problem != ""
        self._pieces = []

    def on_body(self, body: bytes) -> None:
        if not self._is_whole:
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        self._is_whole = True

    @property
    def outcome(self) -> Outcome:
        transcript = self._transcript
        is_whole = self._is_whole and not transcript.problem
        return Outcome(self._body, transcript.resumption(PATH, BODY), is_whole, transcript.problem)


class Relayed:
    """The part of an exchange that relays a stream, on the fast path whenever possible."""

    def __init__(self, fast_path: FastPath, client: Link) -> None:
        self.is_over = False
        #: Number of times that the stream was on the fast path.
        self.rides = 0
        self.connection: ReplicaConnection
        self.transcript = Transcript()
        self._is_whole = False
        self._fast_path = fast_path
        self._fast: FastStream | None = None
        self._client = client
        self._size = 0

    def come_back(self) -> bytes:
        """Take the stream back; return its unread bytes."""
        fast, self._fast = self._fast, None
        if fast is None:
            return b""
        passed = fast.take_back()
        assert passed.new_events == len(passed.marks)
        self.transcript.add_marks(passed.marks)
        self._size += passed.size
        self._client.transport.write(passed.unsent)
        return passed.unread

    def outcome(self, body: bytes) -> Outcome:
        assert self._size == len(body)
        resumption = self.transcript.resumption(PATH, BODY)
        return Outcome(body, resumption, self._is_whole, self.transcript.problem)

    # ---- callbacks of the fast path

    def given_back(self) -> None:
        if unread := self.come_back():
            self.connection.data_received(unread)

    # ---- callbacks of the replica connection

    def informed(self, headers: RawHeaders) -> None:
        raise AssertionError("no replica sends an interim response here")

    def began(self, connection: ReplicaConnection) -> None:
        assert connection.status == 200

    def received(self, body: bytes) -> None:
        if piece := self.transcript.feed(body):
            self._size += len(piece)
            self._client.transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            asyncio.get_running_loop().call_soon(self._ride)
        if self.transcript.problem:
            self.connection.cancel()
            self.is_over = True

    def ended(self) -> None:
        self.is_over = self._is_whole = True

    def failed(self, fault: Fault, why: str) -> None:
        self.is_over = True

    def _ride(self) -> None:
        replica, client = self.connection.fast_transport, self._client.transport
        is_steady = self.transcript.is_steady and client.get_write_buffer_size() == 0
        if replica is not None and is_steady and self._fast is None:
            self._fast = self._fast_path.take(self, replica, client)
            self.rides += self._fast is not None


async def relayed(
    stage: Stage, pieces: list[bytes], comes_back: set[int], receive_buffer: int | None
) -> tuple[Outcome, int]:
    """Relay the pieces from a replica to a client.

    Args:
        comes_back: indexes of pieces after which the stream is taken back from the fast path.

    Returns:
        The outcome, and the number of times that the stream was on the fast path.
    """
    client = await Link().open(receive_buffer=receive_buffer)
    relay = Relayed(stage.fast_path, client)
    pool = ConnectionPool(WriteBatcher())
    relay.connection = ReplicaConnection(pool, ReplicaHandle(0, 1, instance(0)))
    replica = await Link().open(relay.connection)
    relay.connection.send(b"GET / HTTP/1.1\r\n\r\n", relay)
    for number, piece in enumerate(pieces):
        try:
            await asyncio.get_running_loop().sock_sendall(replica.other, piece)
        except OSError:
            break
        # The loop reads each piece by itself, as far as possible.
        while not relay.is_over and not replica.transport.is_closing() and replica.unread:
            await asyncio.sleep(0)
        if number in comes_back and (unread := relay.come_back()):
            relay.connection.data_received(unread)
        # Two turns: one to move to the fast path, one to send what stays with the loop.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if relay.is_over:
            break
    if not relay.is_over:
        replica.leave("half")
        await until(lambda: relay.is_over)
    client.transport.write_eof()
    got = await client.receive(1 << 30)
    for link in (replica, client):
        link.close()
    return relay.outcome(decoded(got)), relay.rides


def decoded(chunks: bytes) -> bytes:
    """Decode the chunks like a client."""

    class Response:
        body = b""
        is_whole = False

        def on_body(self, body: bytes) -> None:
            self.body += body

        def on_message_complete(self) -> None:
            self.is_whole = True

    answer = Response()
    httptools.HttpResponseParser(answer).feed_data(EVENT_HEAD + chunks + b"0\r\n\r\n")
    assert answer.is_whole
    return answer.body


def in_two(body: bytes, place: int) -> bytes:
    place %= len(body) + 1
    return b"".join(chunk(part) for part in (body[:place], body[place:]) if part)


def misframed(part: bytes, place: int, byte: int) -> bytes:
    """Replace one byte of the framing around the body."""
    places = [*range(part.index(b"\n") + 1), -2, -1]
    at = places[place % len(places)] % len(part)
    return part[:at] + bytes([byte]) + part[at + 1 :]


#: Pieces that may take an event's place in the stream.
ODD = [
    *(chunk(DONE), chunk(b'data: {"choices":[],"usage":{}}\n\n'), b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n"),
    *(chunk(b'data: {"error":{"message":"no"}}\n\n'), chunk(b'data: {"error":1}\n: fd 0 1\n\n')),
    *(chunk(b'data: {"a":1}\n: fd 0 1\r2\n\n'), chunk(b'data: {"a":1}\n: fd \n\n')),
    *(chunk(b'data: {"a":1}\n: fd x\n\n'), chunk(b'data: {"a":1}\r\n: fd 0 1\n\n')),
    *(chunk(b'data: {"a":1}\n: fd 0 1\n: fd 0 2\n\n'), chunk(b"data: [1]\n: fd 0 1\n\n")),
    *(b"\x00garbage", b"\r\n", b"5 \r\n", b"5\rx", b"-1\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"zz\r\n", b"5\n"),
    *(
        b"fffffffffffffffff\r\n",
        chunk(b"data: {}\n\n")[:-2] + b"x\n",
        chunk(b": comment\n\n"),
    ),
]
SIZES = [*(b"%x", b"%X", b"%03x", b"%06x", b"%07x", b"%020X"), *(b"%x;a=b", b'%x;a="\t"', b"%x ;a", b"%x ")]

usual = events.map(lambda event: chunk(event._replace(signs=0).raw))
several = st.lists(events, min_size=1, max_size=3).map(lambda group: b"".join(event.raw for event in group))
long = st.integers(60_000, 200_000).map(lambda size: Said("x" * size))
many_tokens = st.integers(1000, 2000).map(lambda count: Said("x", tokens=(10**9,) * count))
unusual = st.one_of(
    st.sampled_from(ODD),
    several.map(chunk),
    st.builds(chunk, several, st.sampled_from(SIZES)),
    st.builds(in_two, several, st.integers(0, 1 << 16)),
    st.builds(misframed, usual, st.integers(0, 9), st.integers(0, 255)),
    (long | many_tokens).map(lambda event: chunk(event.raw)),
)
parts = st.lists(usual | usual | usual | st.just(chunk(SIGN)) | unusual, min_size=1, max_size=16)
cuts = st.lists(st.integers(0, 1 << 20), max_size=20)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    stage = Stage(1)
    yield stage
    stage.close()


@given(
    parts=parts,
    cuts=cuts,
    comes_back=st.sets(st.integers(0, 20), max_size=4),
    receive_buffer=st.sampled_from([None, None, None, 4096]),
)
@example([chunk(b'data: {"a":1}\n: fd 0 1\r2\n\n')], [], set(), None)
@example([chunk(Said("x" * 150_000).raw)] * 3 + [chunk(DONE), b"0\r\n\r\n"], [], set(), 4096)
def test_output_and_transcript_agree_with_and_without_the_fast_path(
    stage: Stage, parts: list[bytes], cuts: list[int], comes_back: set[int], receive_buffer: int | None
) -> None:
    begin = EVENT_HEAD + chunk(b'data: {"id":"x","created":5}\n: fd 0\n\n')
    data = b"".join(parts)
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    pieces = [begin, *(data[start:end] for start, end in itertools.pairwise(places))]
    parsed = Parsed()
    for piece in pieces:
        parsed.feed(piece)

    async def scene() -> None:
        outcome, rides = await relayed(stage, pieces, comes_back, receive_buffer)
        assert outcome == parsed.outcome
        assert rides

    stage.run(scene())
