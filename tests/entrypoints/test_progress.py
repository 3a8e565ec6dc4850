"""Signs of progress: sent while the worker makes steps, and no longer."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fastdeploy.entrypoints.openai import chat
from fastdeploy.entrypoints.openai.keep_alive import KeepAlive

from .conftest import ApiServer, wait_until
from .scripted_replica import served_by

INTERIM = b"HTTP/1.1 102 Processing\r\n\r\n"
SIGN = b":\n\n"


class Reader:
    """Reads a connection to its end, in a thread of its own."""

    def __init__(self, connection: socket.socket) -> None:
        self.data = b""
        self._connection = connection
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        # The test may end before the answer does.
        with contextlib.suppress(OSError):
            while piece := self._connection.recv(65536):
                self.data += piece

    def count(self, what: bytes) -> int:
        return self.data.count(what)

    def wait_for(self, what: bytes, count: int = 1) -> None:
        wait_until(lambda: self.count(what) >= count, f"{count} times {what!r}")

    def whole(self) -> bytes:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.data


@contextlib.contextmanager
def asking(
    port: int,
    body: dict[str, Any],
    progress: str | None = "0.02",
    version: str = "1.1",
    path: str = "/v1/completions",
) -> Iterator[Reader]:
    data = json.dumps(body).encode()
    wish = "" if progress is None else f"X-FD-Progress: {progress}\r\n"
    head = (
        f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\n{wish}Content-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head.encode() + data)
        reader = Reader(connection)
        yield reader
        connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def busy(server: ApiServer) -> Iterator[ApiServer]:
    """A replica with a queue, all of whose seats are taken."""
    with asking(server.port, {"prompt": "a", "n": 24, "max_tokens": 500, "ignore_eos": True}, progress=None):
        wait_until(lambda: server.metric("num_requests_running") == 8, "all seats are taken")
        yield server
    wait_until(lambda: server.metric("num_requests_running") == 0, "all seats are free")


@pytest.mark.parametrize("stream", [False, True])
def test_queued_request_gets_keep_alives_before_its_answer(busy: ApiServer, stream: bool) -> None:
    with asking(busy.port, {"prompt": "a", "max_tokens": 2, "stream": stream}) as reader:
        reader.wait_for(INTERIM, 2)
        answer = reader.whole()
    interim, _, rest = answer.rpartition(INTERIM)
    assert rest.startswith(b"HTTP/1.1 200 ")
    assert interim == INTERIM * interim.count(INTERIM)


def test_unstreamed_answer_sends_keep_alives_while_it_grows(server: ApiServer) -> None:
    with asking(server.port, {"prompt": "a", "max_tokens": 400, "ignore_eos": True}) as reader:
        assert reader.whole().count(INTERIM) >= 3


@pytest.mark.parametrize(("progress", "version"), [(None, "1.1"), ("0.02", "1.0")])
def test_keep_alives_are_sent_only_on_request_and_over_http_1_1(
    busy: ApiServer, progress: str | None, version: str
) -> None:
    with asking(busy.port, {"prompt": "a", "max_tokens": 2}, progress, version) as reader:
        assert reader.whole().startswith(f"HTTP/{version} 200 ".encode())


def test_stopped_worker_ends_the_keep_alives(busy: ApiServer) -> None:
    """The HTTP process, which would send the signs, is not stopped."""
    _, worker = busy.children()
    with asking(busy.port, {"prompt": "a", "max_tokens": 2}) as reader:
        reader.wait_for(INTERIM)
        worker.suspend()
        try:
            with asking(busy.port, {"prompt": "a", "max_tokens": 2}) as late:
                told = settled(reader)
                assert told < 100
                # A request that arrives now may still get a sign for a last step.
                assert settled(late) <= 1
                assert busy.health()[0] == 200
                worker.resume()
                reader.wait_for(INTERIM, told + 1)
        finally:
            worker.resume()


def settled(reader: Reader) -> int:
    """Return the number of signs, once it has not changed for many intervals."""
    told = -1
    for _ in range(20):
        if told == (told := reader.count(INTERIM) + reader.count(SIGN)):
            return told
        threading.Event().wait(0.5)
    pytest.fail(f"it goes on: {told} signs")


def test_keep_alive_within_a_stream_is_a_comment() -> None:
    with (
        served_by("works for others until told") as (served, port),
        asking(port, {"prompt": "a", "max_tokens": 400, "stream": True}) as reader,
    ):
        reader.wait_for(SIGN, 3)
        head, _, body = reader.data.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        pieces = body.split(b"\r\n")[1::2]
        assert pieces[0].startswith(b"data: {")
        assert set(pieces[1:]) == {SIGN}
        os.kill(served.engine.worker_pid, signal.SIGSTOP)
        try:
            assert settled(reader) < 100
        finally:
            os.kill(served.engine.worker_pid, signal.SIGCONT)


def test_requests_waiting_for_rendering_get_keep_alives() -> None:
    with contextlib.ExitStack() as others, served_by("behaves") as (_, port):
        for _ in range(2):
            others.enter_context(chat._template_slots)
        body = {"messages": [{"role": "user", "content": "a"}], "chat_template": "a"}
        with asking(port, body, path="/v1/chat/completions") as reader:
            reader.wait_for(INTERIM, 2)
            others.close()
            assert reader.whole().rpartition(INTERIM)[2].startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("value", ["", "0", "-1", "nan", "1e3", "five", "99999"])
def test_invalid_number_of_seconds_is_400(server: ApiServer, value: str) -> None:
    status, body = server.post("/v1/completions", {"prompt": "a"}, {"X-FD-Progress": value})
    assert status == 400
    assert body["error"]["param"] == "X-FD-Progress"


def test_keep_alive_is_due_after_silence_and_a_step() -> None:
    steps = itertools.count()
    busy_worker = KeepAlive(0.0, lambda: next(steps), None)  # type: ignore[arg-type,return-value]
    assert busy_worker.is_due()
    hanging = KeepAlive(0.0, lambda: None, None)
    assert not hanging.is_due()
    patient = KeepAlive(3600.0, lambda: next(steps), None)  # type: ignore[arg-type,return-value]
    assert not patient.is_due()
    assert 0 < patient.wait_seconds() <= 3600
