"""Ambiguous or surplus answers of replicas: no client receives a wrong answer.

After each test the fixture sends two more requests, on whatever connections to the replica exist.
"""

from __future__ import annotations

import json

import pytest

from .conftest import RouterProcess
from .fake_engine import FakeEngine, answers, keeps, wait_until
from .raw_client import POST, RawAnswer, RawClient

OK = b"HTTP/1.1 200 OK\r\n"
EVIL = b"HTTP/1.1 200 OK\r\nX-Evil: 1\r\nContent-Length: 4\r\n\r\nEVIL"
SMALL = b"Content-Length: 2\r\n\r\n{}"
ENDLESS = 4 << 20
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
EARLY = b"HTTP/1.1 103 Early Hints\r\nX-Evil: 1\r\n\r\n"

GARBLED = {
    "length and chunks": OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunks and length": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "two lengths": OK + b"Content-Length: 4\r\n" + SMALL,
    "one length twice": OK + b"Content-Length: 2\r\n" + SMALL,
    "length with sign": OK + b"Content-Length: +2\r\n\r\n{}",
    "gzip, chunked": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "identity": OK + b"Transfer-Encoding: identity\r\n\r\n{}",
    "bare line feeds": b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}",
    "folded header": OK + b"X: a\r\n b\r\n" + SMALL,
    "blank before the colon": OK + b"Content-Length : 2\r\n\r\n{}",
    "NUL in a value": OK + b"X: \0\r\n" + SMALL,
    "status below all": b"HTTP/1.1 099 No\r\n" + SMALL,
    "status above all": b"HTTP/1.1 2000 No\r\n" + SMALL,
    "switched protocols": b"HTTP/1.1 101 Yes\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n" + EVIL,
    "switched protocols without a word": b"HTTP/1.1 101 Yes\r\n\r\n" + EVIL,
    "switched protocols with a body": b"HTTP/1.1 101 Yes\r\nContent-Length: 3\r\n\r\nabc" + EVIL,
    "interim answer with a body": b"HTTP/1.1 199 x\r\nContent-Length: 3\r\n\r\nabc" + OK + SMALL,
    "interim answer with chunks": b"HTTP/1.1 104 x\r\n" + CHUNKED + OK + SMALL,
    "continue with a body": b"HTTP/1.1 100 Continue\r\nContent-Length: 3\r\n\r\nabc" + OK + SMALL,
    "early hints with chunks": b"HTTP/1.1 103 Early Hints\r\n" + CHUNKED + OK + SMALL,
    "interim answer with a length of 0": b"HTTP/1.1 102 x\r\nContent-Length: 0\r\n\r\n" + OK + SMALL,
    "second interim answer with a body": EARLY + b"HTTP/1.1 150 x\r\n" + CHUNKED + OK + SMALL,
    "interim answers without end": EARLY * 20_000 + OK + SMALL,
    "headers without end": OK + b"X: y\r\n" * (ENDLESS // 6) + SMALL,
    "header without end": OK + b"X: " + b"y" * ENDLESS,
}  # fmt: skip


def ask(router: RouterProcess) -> RawAnswer:
    with RawClient(router.port) as client:
        client.send(POST)
        return client.answer()


@pytest.mark.parametrize("answer", GARBLED)
def test_ambiguous_answer_is_a_bad_gateway(
    shared_router: RouterProcess, replica: FakeEngine, answer: str
) -> None:
    replica.behaviour = keeps(GARBLED[answer])
    status, _, body = ask(shared_router)
    assert (status, json.loads(body)["error"]["code"]) == (502, "bad_gateway")


@pytest.mark.parametrize(
    "tail",
    [b"2;" + b"y" * ENDLESS, b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * (ENDLESS // 6)],
    ids=["extension", "trailers"],
)
def test_endless_answer_without_content_is_aborted(
    shared_router: RouterProcess, replica: FakeEngine, tail: bytes
) -> None:
    goes_on = keeps(OK + b"Transfer-Encoding: chunked\r\n\r\n" + tail)
    replica.behaviour = lambda received: (goes_on if len(replica.received) == 1 else answers)(received)
    # The replica is taken for lost; after a pause the request is sent again.
    assert ask(shared_router)[0] == 200
    assert len(replica.received) == 2


@pytest.mark.parametrize(
    "extra",
    [EVIL, EVIL * 100, EVIL[:30], b"garbage", b"\r\n" + EVIL, b"HTTP/1.1 100 Continue\r\n\r\n", b"H", b"\0"],
    ids=lambda extra: str(extra[:12]),
)
@pytest.mark.parametrize("when", ["at once", "later"])
@pytest.mark.parametrize("framing", [SMALL, b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"])
def test_surplus_bytes_after_an_answer_reach_no_client(
    shared_router: RouterProcess, replica: FakeEngine, extra: bytes, when: str, framing: bytes
) -> None:
    replica.behaviour = keeps(OK + framing + extra) if when == "at once" else keeps(OK + framing, extra)
    assert ask(shared_router)[::2] == (200, b"{}")
    if when == "later":
        # The surplus bytes have arrived by then, because the replica pauses after each piece.
        wait_until(lambda: replica.received[0].done.is_set(), "the rest is sent")


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
@pytest.mark.parametrize(
    "framing", [b"Content-Length: 4\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n4\r\n"]
)
def test_bodyless_answer_has_no_body_whatever_follows(
    shared_router: RouterProcess, replica: FakeEngine, status: bytes, framing: bytes
) -> None:
    replica.behaviour = keeps(b"HTTP/1.1 " + status + b"\r\n" + framing + b"EVIL\r\n0\r\n\r\n")
    got, headers, body = ask(shared_router)
    assert (got, body) == (int(status[:3]), b"")
    assert "transfer-encoding" not in headers


def test_body_after_an_answer_to_head_reaches_no_client(
    shared_router: RouterProcess, replica: FakeEngine
) -> None:
    replica.behaviour = keeps(OK + SMALL + EVIL)
    with RawClient(shared_router.port) as client:
        client.send(b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = client.answer(to_head=True)
        assert (answer.status, answer.headers["content-length"]) == (200, "2")
        replica.behaviour = answers
        client.send(POST)
        assert client.answer().status == 200


def test_a_body_behind_an_interim_answer_is_no_answer_to_the_next_request(
    shared_router: RouterProcess, replica: FakeEngine
) -> None:
    """The body exceeded the announced length, and its end would be parsed as another answer."""
    body, large = b"x" * len(EVIL), 5 << 20
    replica.behaviour = keeps(
        b"HTTP/1.1 199 x\r\nContent-Length: %d\r\n\r\n" % len(body)
        + (body + OK + b"Content-Length: %d\r\n\r\n" % large)
        + (b"y" * (large - len(EVIL)) + EVIL)
    )
    with RawClient(shared_router.port) as client:
        client.send(POST)
        assert client.answer()[0] == 502
        replica.behaviour = answers
        client.send(POST)
        status, headers, _ = client.answer()
        assert (status, "x-evil" in headers) == (200, False)


@pytest.mark.parametrize("count", [1, 5_000])
def test_interim_answers_are_not_forwarded(
    shared_router: RouterProcess, replica: FakeEngine, count: int
) -> None:
    replica.behaviour = keeps(EARLY * count + OK + SMALL)
    status, headers, body = ask(shared_router)
    assert (status, body) == (200, b"{}")
    assert "x-evil" not in headers


def test_connection_headers_of_a_replica_are_not_forwarded(
    shared_router: RouterProcess, replica: FakeEngine
) -> None:
    replica.behaviour = keeps(
        OK + b"Connection: X-Evil, keep-alive\r\nX-Evil: 1\r\nKeep-Alive: timeout=5\r\nUpgrade: h2c\r\n"
        b"Proxy-Authenticate: Basic\r\nProxy-Connection: close\r\nTE: x\r\nTrailer: X-Evil\r\nX-Fine: 1\r\n"
        + SMALL
    )
    status, headers, body = ask(shared_router)
    assert (status, body) == (200, b"{}")
    assert set(headers) == {"x-fine", "content-length", "x-request-id", "x-fd-replica"}
