"""How an answer that one replica began goes on at another: what replicas and the router say to each other.

When a router asks for it (`X-FD-Marks: 1`), each event of a choice ends with a comment line, its mark:

    data: {...}
    : fd CHOICE ID ID ... [.]

The ids are the tokens of that choice that were taken since its last mark, whether their text is out already
or held back; a dot says that the choice has finished. Of all marks up to a point the router can say exactly
what a client has got (`Resumption`), and another replica can go on from there (`POST /internal/resume`).

Of an answer that comes whole nothing is out before its end. Its marks come in interim heads, a second apart:

    HTTP/1.1 102 Processing
    X-FD-Draft: CREATED ID
    X-FD-Mark: CHOICE ID ID ...

Free of Paddle and of everything else that the router must not load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

import msgspec

from .errors import RequestError

#: Where a router sends a `Resumption`, as MessagePack, and the header in which it shows the replica's token.
RESUME_PATH = "/internal/resume"
TOKEN_HEADER = "X-FD-Token"
MARKS_HEADER = "X-FD-Marks"
PROGRESS_HEADER = "X-FD-Progress"
#: Of interim heads: when the answer was begun (Unix time, seconds) and its id; and a mark for each choice.
DRAFT_HEADER = "X-FD-Draft"
DRAFT_MARK_HEADER = "X-FD-Mark"
#: Of a 503: the engine was lost while it had the request. With any other 503 the replica has not taken it.
LOST_HEADER = "X-FD-Engine-Lost"

_FINISHED = b"."
#: Of a choice, or of a token.
Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
#: Any that a calendar has.
Moment = Annotated[int, msgspec.Meta(ge=0, lt=1 << 36)]


class Delivered(msgspec.Struct, frozen=True):
    """What is behind the events of one choice so far."""

    tokens: list[Number]
    finished: bool = False


class Resumption(msgspec.Struct, frozen=True):
    """A request, and what its client has got already; or would have, if its answer did not come whole."""

    #: "/v1/chat/completions" or "/v1/completions".
    path: str
    #: The client's, unchanged.
    body: bytes
    #: As the answer so far has them.
    id: str
    created: Moment
    #: Those that have begun; all others start from nothing.
    choices: dict[Number, Delivered]


def encode_resumption(resumption: Resumption) -> bytes:
    return _encoder.encode(resumption)


def decode_resumption(data: bytes) -> Resumption:
    """
    Raises:
        RequestError: it is none; one line.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise RequestError(f"the body is no resumption: {error}") from None


def mark(choice: int, token_ids: Iterable[int] = (), *, finished: bool = False) -> bytes:
    """The line behind an event's data, with its end."""
    words = f": fd {choice} {' '.join(map(str, token_ids))}".rstrip()
    return f"{words} .\n".encode() if finished else f"{words}\n".encode()


def draft_lines(created: int, identity: str, tokens: Mapping[int, Iterable[int]]) -> bytes:
    """Header lines for an interim head.

    Args:
        tokens: of each choice those that were taken since its last mark.
    """
    lines = [f"{DRAFT_HEADER}: {created} {identity}\r\n"]
    for choice, token_ids in tokens.items():
        lines.append(f"{DRAFT_MARK_HEADER}: {choice} {' '.join(map(str, token_ids))}\r\n")
    return "".join(lines).encode()


def marks_of(lines: Iterable[bytes]) -> dict[int, Delivered]:
    """What marks say together, choice by choice.

    Args:
        lines: what stood behind `: fd `, or in a mark's header, in the order in which they came.

    Raises:
        ValueError: one of them is no mark.
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
