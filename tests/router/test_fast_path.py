"""Events pass by the fast path in order; anything else brings the whole stream back to the event loop."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastdeploy.daemon
from fastdeploy.daemon.router.http.fast_path import Passed

from .conftest import FD_ROUTER
from .fast_stage import Link, Passage, Stage, await_without_the_loop, chunk, until
from .test_transcript import DONE, SIGN, Said

CAPACITY = 2
LAST_CHUNK = b"0\r\n\r\n"
FIRST, SECOND, THIRD = Said("one"), Said("zwölf", choice=3, tokens=(4, 5)), Said("\n\n: fd", finished=True)


def raw(*events: Said) -> bytes:
    """Return the events as a replica sends them."""
    return b"".join(chunk(event.raw) for event in events)


def clean(*events: Said) -> bytes:
    """Return the events as the client receives them."""
    return b"".join(chunk(event.clean) for event in events)


def passed(*events: Said, new: int | None = None, unread: bytes = b"", unsent: bytes = b"") -> Passed:
    """Return the report of the fast path about these events."""
    marks = [event.raw.rpartition(b": fd ")[2].strip() for event in events]
    size = sum(len(event.clean) for event in events)
    return Passed(marks, size, len(events) if new is None else new, unread, unsent)


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    stage = Stage(CAPACITY)
    yield stage
    stage.close()


# ---- streams that pass


def test_events_arrive_without_marks_which_are_reported_at_the_end(stage: Stage) -> None:
    async def scene() -> None:
        async with Passage(stage) as stream:
            for event in (FIRST, SECOND, THIRD):
                stream.say(raw(event))
                assert await stream.client.receive(len(clean(event))) == clean(event)
            assert stream.passed is None
            assert stream.take_back() == passed(FIRST, SECOND, THIRD)

    stage.run(scene())


def test_events_may_arrive_together_or_byte_by_byte(stage: Stage) -> None:
    async def scene() -> None:
        async with Passage(stage) as stream:
            many = [Said(str(number), tokens=(number,)) for number in range(300)]
            stream.say(raw(*many))
            assert await stream.client.receive(len(clean(*many))) == clean(*many)
            for byte in raw(SECOND):
                stream.say(bytes([byte]))
                await until(lambda: not stream.replica.unread)
            assert await stream.client.receive(len(clean(SECOND))) == clean(SECOND)
            assert stream.take_back() == passed(*many, SECOND)

    stage.run(scene())


@pytest.mark.parametrize("size", [b"%x", b"%X", b"%04x", b"%06X"])
def test_every_spelling_of_a_chunk_size_is_accepted(stage: Stage, size: bytes) -> None:
    async def scene() -> None:
        async with Passage(stage) as stream:
            event = Said("x" * 0xABC)
            stream.say(chunk(event.raw, size))
            assert await stream.client.receive(len(clean(event))) == clean(event)
            assert stream.take_back() == passed(event)

    stage.run(scene())


def test_keep_alives_are_noticed_and_not_forwarded(stage: Stage) -> None:
    async def scene() -> None:
        async with Passage(stage) as stream:
            for _ in range(3):
                before = stream.fast.heard_at
                stream.say(chunk(SIGN))
                await until(lambda before=before: stream.fast.heard_at > before)
            stream.say(raw(FIRST))
            assert await stream.client.receive(len(clean(FIRST))) == clean(FIRST)
            assert stream.take_back() == passed(FIRST)

    stage.run(scene())


def test_events_are_counted_while_they_pass_and_each_once(stage: Stage) -> None:
    async def scene() -> None:
        async with Passage(stage) as stream:
            assert stream.fast.new_events() == 0
            stream.say(raw(FIRST, SECOND))
            await stream.client.receive(len(clean(FIRST, SECOND)))
            assert stream.fast.new_events() == 2
            assert stream.fast.new_events() == 0
            stream.say(raw(THIRD))
            await stream.client.receive(len(clean(THIRD)))
            assert stream.take_back() == passed(FIRST, SECOND, THIRD, new=1)

    stage.run(scene())


# ---- streams that come back

ERROR = b'data: {"error":{"message":"the engine has failed"}}\n: fd 0\n\n'
UNUSUAL = {
    "end of the stream": chunk(DONE),
    "event without a mark": chunk(FIRST.clean),
    "error": chunk(ERROR),
    "two events": chunk(FIRST.raw + SECOND.raw),
    "event after a sign of life": chunk(SIGN + FIRST.raw),
    "two signs of life": chunk(SIGN * 2),
    "comment": chunk(b": hi\n\n"),
    "event that is no object": chunk(b"data: [1]\n: fd 0\n\n"),
    "field before the data": chunk(b"id: x\n" + FIRST.raw),
    "type without data": chunk(b"event: x\n: fd 0\n\n"),
    "type that is not ended": chunk(b"event: x"),
    "two types": chunk(b"event: x\nevent: y\n" + FIRST.raw),
    "field behind the data": chunk(FIRST.clean[:-1] + b"id: 1\n: fd 0\n\n"),
    "field behind the mark": chunk(FIRST.raw[:-1] + b"id: 1\n\n"),
    "two marks": chunk(FIRST.raw[:-1] + b": fd 0\n\n"),
    "half an event": chunk(FIRST.raw[:-1]),
    "event and a half": chunk(FIRST.raw + b"data"),
    "carriage returns": chunk(FIRST.raw.replace(b"\n", b"\r\n")),
    "extension": chunk(FIRST.raw, b"%x;a=b"),
    "blank behind the size": chunk(FIRST.raw, b"%x "),
    "size of many digits": chunk(FIRST.raw, b"%07x"),
    "size that is a terabyte": b"10000000000\r\n",
    "signed size": chunk(FIRST.raw, b"+%x"),
    "size with a prefix": chunk(FIRST.raw, b"0x%x"),
    "no size": b"\r\n" + FIRST.raw + b"\r\n",
    "size with another end": chunk(FIRST.raw).replace(b"\r\n", b"\rx", 1),
    "bare line feed": chunk(FIRST.raw).replace(b"\r\n", b"\n"),
    "wrong end": chunk(FIRST.raw)[:-2] + b"x\n",
    "wrong end of the end": chunk(FIRST.raw)[:-1] + b"x",
    "last chunk": LAST_CHUNK,
    "trailer": b"0\r\nX: y\r\n\r\n",
    "garbage": b"\x00\x01 no HTTP\r\n\r\n",
    "other answer": b"HTTP/1.1 200 OK\r\n\r\n",
}


@pytest.mark.parametrize("unusual", UNUSUAL)
def test_unusual_input_returns_the_stream_with_that_input_unread(stage: Stage, unusual: str) -> None:
    async def scene() -> None:
        async with Passage(stage) as stream:
            stream.say(raw(FIRST, SECOND), UNUSUAL[unusual], raw(THIRD))
            told = await stream.comes_back()
            assert told == passed(FIRST, SECOND, unread=UNUSUAL[unusual] + raw(THIRD))
            assert await stream.client.receive(len(clean(FIRST, SECOND))) == clean(FIRST, SECOND)

    stage.run(scene())


@pytest.mark.parametrize("unusual", UNUSUAL)
def test_no_byte_is_lost_when_each_arrives_alone(stage: Stage, unusual: str) -> None:
    """The event loop reads whatever the fast path has left unread."""

    async def scene() -> None:
        async with Passage(stage) as stream:
            stream.say(raw(FIRST))
            for byte in UNUSUAL[unusual]:
                stream.say(bytes([byte]))
                await until(lambda: not stream.replica.unread)
            stream.say(raw(THIRD))
            told = await stream.comes_back()
            expected = UNUSUAL[unusual] + raw(THIRD)
            await until(lambda: len(told.unread + stream.replica.read) == len(expected))
            assert told.unread + stream.replica.read == expected
            assert told == passed(FIRST, unread=told.unread)

    stage.run(scene())


def test_oversized_chunk_is_left_to_the_parser(stage: Stage) -> None:
    async def scene() -> None:
        async with Passage(stage) as stream:
            part = raw(Said("x" * 1_000_000))[:200_000]
            await asyncio.get_running_loop().sock_sendall(stream.replica.other, raw(FIRST) + part)
            told = await stream.comes_back()
            await until(lambda: len(told.unread + stream.replica.read) == len(part))
            assert told.unread + stream.replica.read == part
            assert told == passed(FIRST, unread=told.unread)

    stage.run(scene())


def test_stream_with_many_marks_is_returned_before_they_pile_up(stage: Stage) -> None:
    async def scene() -> None:
        async with Passage(stage) as stream:
            event = Said("x", tokens=tuple(range(10**9, 10**9 + 150)))
            said = 0
            while stream.passed is None:
                stream.say(raw(event))
                said += 1
                await until(lambda: not stream.replica.unread)
            told = stream.passed
            come = [event] * len(told.marks)
            assert told == passed(*come, unread=told.unread)
            assert 16_000 < sum(map(len, told.marks)) < 20_000
            assert told.unread + stream.replica.read == raw(event) * (said - len(come))
            assert await stream.client.receive(len(clean(*come))) == clean(*come)

    stage.run(scene())


# ---- connections that end


@pytest.mark.parametrize("how", ["close", "half", "reset"])
def test_stream_is_returned_when_the_replica_disconnects(stage: Stage, how: str) -> None:
    async def scene() -> None:
        async with Passage(stage) as stream:
            stream.say(raw(FIRST), raw(SECOND)[:-3])
            assert await stream.client.receive(len(clean(FIRST))) == clean(FIRST)
            stream.replica.leave(how)
            assert await stream.comes_back() == passed(FIRST, unread=raw(SECOND)[:-3])
            await until(lambda: stream.replica.is_lost)
            assert not stream.client.is_lost

    stage.run(scene())


@pytest.mark.parametrize("how", ["close", "half", "reset"])
def test_stream_is_returned_when_the_client_disconnects(stage: Stage, how: str) -> None:
    async def scene() -> None:
        async with Passage(stage) as stream:
            stream.say(raw(FIRST))
            assert await stream.client.receive(len(clean(FIRST))) == clean(FIRST)
            stream.client.leave(how)
            assert await stream.comes_back() == passed(FIRST)
            await until(lambda: stream.client.is_lost)
            stream.say(raw(SECOND))
            await until(lambda: stream.replica.read == raw(SECOND))

    stage.run(scene())


def test_client_data_during_a_stream_waits_for_the_loop(stage: Stage) -> None:
    async def scene() -> None:
        async with Passage(stage) as stream:
            stream.client.other.send(b"GET / HTTP/1.1\r\n")
            stream.say(raw(FIRST))
            assert await stream.client.receive(len(clean(FIRST))) == clean(FIRST)
            assert stream.client.read == b""
            stream.take_back()
            await until(lambda: stream.client.read == b"GET / HTTP/1.1\r\n")

    stage.run(scene())


def test_bytes_unread_by_the_client_are_returned_exactly(stage: Stage) -> None:
    async def scene() -> None:
        async with Passage(stage) as stream:
            events = [Said(f"{number} {'x' * 5000}") for number in range(4000)]
            said = 0
            while stream.passed is None:
                some = raw(*events[said : said + 12])
                await asyncio.get_running_loop().sock_sendall(stream.replica.other, some)
                await asyncio.sleep(0)
                said += 12
            told = stream.passed
            come, rest = events[: len(told.marks)], raw(*events[len(told.marks) : said])
            assert told == passed(*come, unread=told.unread, unsent=told.unsent)
            assert told.unsent
            got = await stream.client.receive(len(clean(*come)) - len(told.unsent))
            assert got + told.unsent == clean(*come)
            await until(lambda: len(told.unread + stream.replica.read) == len(rest))
            assert told.unread + stream.replica.read == rest
            assert await is_silent(stream.client)

    async def is_silent(link: Link) -> bool:
        link.transport.write_eof()
        return await link.receive(1) == b""

    stage.run(scene())


# ---- taking back


def test_stream_taken_back_is_not_touched_again(stage: Stage) -> None:
    async def scene() -> None:
        async with Passage(stage) as stream:
            stream.say(raw(FIRST), raw(SECOND)[:9])
            await stream.client.receive(len(clean(FIRST)))
            assert stream.take_back() == passed(FIRST, unread=raw(SECOND)[:9])
            stream.say(raw(SECOND)[9:], raw(THIRD))
            await until(lambda: stream.replica.read == raw(SECOND)[9:] + raw(THIRD))
            stream.client.transport.write(b"the loop's")
            assert await stream.client.receive(10) == b"the loop's"

    stage.run(scene())


def test_return_of_a_stream_is_reported_once(stage: Stage) -> None:
    async def scene() -> None:
        async with Passage(stage) as stream, Passage(stage) as behind:
            stream.say(raw(FIRST), LAST_CHUNK)
            await_without_the_loop(lambda: not stream.replica.unread)
            told = stream.take_back()
            assert told == passed(FIRST, unread=LAST_CHUNK)
            behind.say(LAST_CHUNK)
            await behind.comes_back()
            assert stream.passed is told

    stage.run(scene())


def test_reused_slot_has_no_state_of_the_previous_stream(stage: Stage) -> None:
    async def scene() -> None:
        for _ in range(2 * CAPACITY):
            async with Passage(stage) as stream:
                before = stream.fast.heard_at
                stream.say(raw(FIRST, SECOND), raw(THIRD)[:20])
                await stream.client.receive(len(clean(FIRST, SECOND)))
                stream.client.leave("reset")
                await stream.comes_back()
            async with Passage(stage) as stream:
                assert stream.fast.heard_at >= before
                assert stream.fast.new_events() == 0
                stream.say(raw(THIRD))
                assert await stream.client.receive(len(clean(THIRD))) == clean(THIRD)
                assert stream.take_back() == passed(THIRD)

    stage.run(scene())


def test_stream_can_enter_and_leave_the_fast_path_repeatedly(stage: Stage) -> None:
    async def scene() -> None:
        async with Passage(stage) as stream:
            for _ in range(5):
                stream.say(raw(FIRST), chunk(DONE))
                assert await stream.comes_back() == passed(FIRST, unread=chunk(DONE))
                await stream.client.receive(len(clean(FIRST)))
                stream.passed = None
                stream.fast = stream.take()

    stage.run(scene())


def test_without_a_free_slot_the_loop_keeps_the_stream(stage: Stage) -> None:
    async def scene() -> None:
        async with Passage(stage), Passage(stage) as second:
            replica, client = await Link().open(), await Link().open()
            assert stage.fast_path.take(second, replica.transport, client.transport) is None
            for link in (replica, client):
                link.other.send(b"hello")
                await until(lambda link=link: link.read == b"hello")
                link.close()

    stage.run(scene())


def test_connection_closed_early_is_distinct_from_one_reusing_its_fd(stage: Stage) -> None:
    async def scene() -> None:
        async with Passage(stage) as stream:
            numbers = {stream.replica.number, stream.client.number}
            stream.replica.transport.abort()
            stream.client.transport.abort()
            await until(lambda: stream.replica.is_lost and stream.client.is_lost)
            others = [await Link().open() for _ in range(4)]
            assert numbers <= {link.number for link in others} | {link.other.fileno() for link in others}
            stream.say(raw(FIRST))
            assert await stream.client.receive(len(clean(FIRST))) == clean(FIRST)
            assert stream.take_back() == passed(FIRST)
            for link in others:
                link.other.send(raw(FIRST))
                await until(lambda link=link: link.read == raw(FIRST))
                link.transport.write(b"fine")
                assert await link.receive(4) == b"fine"
                link.close()

    stage.run(scene())


def test_failing_owner_delays_no_other_stream_and_learns_of_lost_links(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Passage):
        def given_back(self) -> None:
            raise RuntimeError("on purpose")

    async def scene() -> None:
        other, failing = Passage(stage), Failing(stage)
        for stream in (other, failing):
            await stream.__aenter__()
            stream.say(LAST_CHUNK)
            await_without_the_loop(lambda stream=stream: not stream.replica.unread)
        assert await other.comes_back() == passed(unread=LAST_CHUNK)
        await until(lambda: failing.replica.is_lost and failing.client.is_lost)
        assert failing.take_back() == passed(unread=LAST_CHUNK)
        for stream in (other, failing):
            stream.replica.close()
            stream.client.close()

    stage.run(scene())
    assert "on purpose" in caplog.text
    test_without_a_free_slot_the_loop_keeps_the_stream(stage)


# ---- platforms without it


@pytest.mark.parametrize(
    ("library", "reason"), [(None, "cannot open shared object file"), (b"for another machine", "too short")]
)
def test_router_without_the_fast_path_names_the_remedy_in_one_line(
    tmp_path: Path, library: bytes | None, reason: str
) -> None:
    package = tmp_path / "fastdeploy"
    without = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(fastdeploy.__path__[0], package, ignore=without)
    shutil.copytree(fastdeploy.daemon.__path__[0], package / "daemon", ignore=without)
    if library is not None:
        (package / "daemon" / "router" / "http" / "libfd_fast_path.so").write_bytes(library)
    ended = subprocess.run(
        [str(FD_ROUTER), "--port", "1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith(
        f"fd-router: the router's compiled library cannot be loaded ({package}/daemon/"
    )
    assert reason in ended.stderr
    assert ended.stderr.endswith("; install fd-dp with pip, which compiles it\n")
    assert ended.stderr.count("\n") == 1
