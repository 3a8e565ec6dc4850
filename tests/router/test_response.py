"""The response reader: what is whole passes unchanged, what is not is an error, never a shorter answer."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.daemon.router.response import Cut, Garbled, Response, ResponseError, Unanswered


class Trickle(io.RawIOBase):
    """Bytes that arrive in pieces of the given sizes, as from a socket."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data = data
        self._sizes = sizes or [len(data) or 1]
        self._turn = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        size = min(self._sizes[self._turn % len(self._sizes)], len(buffer))
        self._turn += 1
        piece, self._data = self._data[:size], self._data[size:]
        buffer[: len(piece)] = piece
        return len(piece)


def read(data: bytes, sizes: list[int] | None = None, method: str = "POST") -> tuple[Response, bytes]:
    response = Response(io.BufferedReader(Trickle(data, sizes or [])), method)
    return response, b"".join(iter(response.read, b""))


def chunked(pieces: list[bytes], extension: bytes = b"") -> bytes:
    chunks = [b"%x%s\r\n%s\r\n" % (len(piece), extension, piece) for piece in pieces if piece]
    return b"".join([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n"])


pieces = st.lists(st.binary(max_size=40), max_size=6)
sizes = st.lists(st.integers(1, 7), max_size=5)


@given(pieces, sizes)
def test_a_chunked_body_comes_out_unchanged_however_it_arrives(parts, arrival):
    response, body = read(chunked(parts), arrival)
    assert body == b"".join(parts)
    assert response.ended
    assert response.reusable


@given(pieces, sizes, st.data())
def test_a_chunked_answer_cut_anywhere_is_an_error(parts, arrival, data):
    whole = chunked(parts)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises((Unanswered, Cut)):
        read(whole[:cut], arrival)


@given(st.binary(min_size=1, max_size=50), sizes, st.data())
def test_an_answer_with_a_length_cut_anywhere_is_an_error(body, arrival, data):
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    assert read(whole, arrival)[1] == body
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises((Unanswered, Cut)):
        read(whole[:cut], arrival)


@given(st.binary(max_size=200))
def test_noise_is_an_error_and_nothing_else(noise):
    with pytest.raises(ResponseError):
        read(noise)


@given(st.binary(max_size=60))
def test_noise_after_a_chunked_head_never_reads_as_a_whole_answer_by_accident(noise):
    try:
        response, _ = read(chunked([])[: -len(b"0\r\n\r\n")] + noise)
    except Cut:
        return
    assert response.ended
    assert b"0" in noise


def test_each_chunk_is_there_before_the_next_one():
    chunks = [b"data: one\n\n", b"data: two\n\n"]
    response = Response(io.BufferedReader(Trickle(chunked(chunks), [])), "POST")
    assert [response.read(), response.read(), response.read()] == [*chunks, b""]


def test_a_chunk_is_not_held_up_until_its_closing_line():
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    response = Response(io.BufferedReader(Trickle(head + b"5\r\nhello", [])), "POST")
    assert response.read() == b"hello"


def test_without_length_the_body_ends_with_the_connection():
    response, body = read(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nall of it")
    assert body == b"all of it"
    assert not response.reusable


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_answers_without_body_end_at_once(status):
    response, body = read(b"HTTP/1.1 " + status + b"\r\n\r\n")
    assert (body, response.ended) == (b"", True)


def test_the_answer_to_head_has_no_body():
    assert read(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n", method="HEAD")[1] == b""


def test_interim_answers_are_passed_over():
    response, body = read(
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 201 Made\r\nContent-Length: 2\r\n\r\nok"
    )
    assert (response.status, response.reason, body) == (201, "Made", b"ok")


def test_chunking_overrides_a_length_which_is_not_passed_on():
    response, body = read(
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    )
    assert body == b"hello"
    assert response.header("content-length") == ""


def test_connection_close_is_respected():
    response, _ = read(b"HTTP/1.1 200 OK\r\nConnection: keep-alive, Close\r\nContent-Length: 0\r\n\r\n")
    assert not response.reusable


@pytest.mark.parametrize(
    "head",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n folded\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: \x00\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 300 + b"\r\n",
        b"x" * 100_000,
    ],
)
def test_a_head_that_is_not_http_is_garbled(head):
    with pytest.raises(Garbled):
        read(head)
