"""Protocol between router and replicas for resuming a response on another replica.

If the router requests it (`X-FD-Marks: 1`), each event of a choice ends with a comment line, its mark:

    data: {...}
    : fd CHOICE ID ID ... [.]

The ids are the tokens of the choice since its last mark, including those whose text is still withheld. A dot
means that the choice has finished. The router therefore knows exactly where a response has been interrupted
(`Resumption`), and another replica can continue from there (`POST /internal/resume`). If several events stand
for the same tokens, only the last of them has the tokens in its mark, and the number of events tells which of
them were sent.

A response that is not streamed sends nothing before its end. Its marks are sent in interim responses, one per
second:

    HTTP/1.1 102 Processing
    X-FD-Draft: CREATED ID
    X-FD-Mark: CHOICE ID ID ...

The router imports this module, so it must not import Paddle.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

import msgspec

from .errors import RequestError

#: Path to which the router posts a `Resumption` as MessagePack.
RESUME_PATH = "/internal/resume"
#: Secret of the replica, from its registration; authenticates the router.
TOKEN_HEADER = "X-FD-Token"
#: "1": the router requests marks.
MARKS_HEADER = "X-FD-Marks"
#: Seconds without output after which the router expects a keep-alive.
PROGRESS_HEADER = "X-FD-Progress"
#: Headers of interim responses: creation time (Unix time, seconds) and id of the response; a mark per choice.
DRAFT_HEADER = "X-FD-Draft"
DRAFT_MARK_HEADER = "X-FD-Mark"
#: In a 503: the engine was lost while it processed the request. Any other 503 means it was not accepted.
LOST_HEADER = "X-FD-Engine-Lost"

_FINISHED = b"."
#: Index of a choice, or a token id.
Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
#: Unix time in seconds, within the range of `datetime`.
Moment = Annotated[int, msgspec.Meta(ge=0, lt=1 << 36)]


class Delivered(msgspec.Struct, frozen=True):
    """The tokens of one choice that its marks have covered so far."""

    tokens: list[Number]
    finished: bool = False


class Resumption(msgspec.Struct, frozen=True):
    """A request and the part of its response that was sent, or would have been sent if it were streamed."""

    #: Path of the client's request.
    path: str
    #: Body of the client's request, unchanged.
    body: bytes
    #: Id of the response so far.
    id: str
    created: Moment
    #: The choices that have begun.
    choices: dict[Number, Delivered]
    #: Number of events of the stream that were sent.
    events: Number = 0


def encode_resumption(resumption: Resumption) -> bytes:
    return _encoder.encode(resumption)


def decode_resumption(data: bytes) -> Resumption:
    """Decode the body of a POST to `RESUME_PATH`.

    Raises:
        RequestError: the data is not a valid resumption.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise RequestError(f"the body is not a valid resumption: {error}") from None


def mark(choice: int, token_ids: Iterable[int] = (), *, finished: bool = False) -> bytes:
    """Return the mark of an event, with its line end."""
    words = f": fd {choice} {' '.join(map(str, token_ids))}".rstrip()
    return f"{words} .\n".encode() if finished else f"{words}\n".encode()


def draft_lines(created: int, identity: str, tokens: Mapping[int, Iterable[int]]) -> bytes:
    """Return the header lines of an interim response.

    Args:
        tokens: for each choice, the tokens since its last mark.
    """
    lines = [f"{DRAFT_HEADER}: {created} {identity}\r\n"]
    for choice, token_ids in tokens.items():
        lines.append(f"{DRAFT_MARK_HEADER}: {choice} {' '.join(map(str, token_ids))}\r\n")
    return "".join(lines).encode()


def marks_of(lines: Iterable[bytes]) -> dict[int, Delivered]:
    """Combine marks by choice.

    Args:
        lines: the text after `: fd `, or the value of a mark's header, in order of arrival.

    Raises:
        ValueError: a line is not a mark.
    """
    tokens: dict[int, list[int]] = {}
    finished: set[int] = set()
    for line in lines:
        choice, *ids = line.split()
        index = int(choice)
        if ids and ids[-1] == _FINISHED:
            finished.add(index)
            ids.pop()
        tokens.setdefault(index, []).extend(map(int, ids))
    return {index: Delivered(ids, index in finished) for index, ids in tokens.items()}


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Resumption)
