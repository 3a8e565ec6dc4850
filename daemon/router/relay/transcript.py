"""The progress of a response, from which another replica can resume it. Pure.

A replica that supports resumption ends each event of a stream with a mark: a line with the tokens that the
event stands for (`engine/common/resumption.py`). Marks are removed from the stream and kept; they are parsed
in batches, or when the replica fails. Only complete events are passed on, so that a stream never breaks off
inside one. For a response that is not a stream, the replica sends marks in interim heads (`Draft`).
"""

from __future__ import annotations

import re
from array import array

import msgspec

from ....common.foreign_text import printable
from ....common.resumption import (
    DRAFT_HEADER,
    DRAFT_MARK_HEADER,
    Delivered,
    Moment,
    Number,
    Resumption,
    marks_of,
)
from ..http.request import RawHeaders

_DRAFT, _DRAFT_MARK = DRAFT_HEADER.lower().encode(), DRAFT_MARK_HEADER.lower().encode()
_MARK = b"\n: fd "
_MARK_ALONE = b": fd "
#: Number and bytes of marks at which they are parsed to token ids, which take less memory than text.
_FOLD_AT, _FOLD_AT_BYTES = 1024, 32 << 10
#: Digits of a Unix time.
_MAX_CREATED_DIGITS = 10
#: Bytes of one event.
_MAX_EVENT = 4 << 20
#: Tokens in all choices of one response; a longer one cannot be resumed.
MAX_TOKENS = 1 << 18
_DONE_EVENT = b"data: [DONE]"
_DONE = _DONE_EVENT + b"\n\n"
_ERROR = b'data: {"error"'
_ERROR_EVENT = re.compile(rb'^data: (\{"error".*)', re.MULTILINE)
_KEEP_ALIVE = b":"


class _Response(msgspec.Struct):
    id: str
    created_at: Moment


class _Head(msgspec.Struct):
    """Id and time of the response in the first event: at the top, or in the object of /v1/responses."""

    id: str | None = None
    created: Moment | None = None
    response: _Response | None = None


class _Choice:
    """Token ids of one choice. An array, because a list takes nine times the memory."""

    __slots__ = ("is_finished", "tokens")

    def __init__(self) -> None:
        self.tokens = array("I")
        self.is_finished = False


class Marks:
    """The marks of one response."""

    __slots__ = ("_choices", "_lines", "_size", "is_usable")

    def __init__(self) -> None:
        #: All marks so far could be parsed, and there are not too many tokens.
        self.is_usable = True
        self._lines: list[bytes] = []
        self._size = 0
        self._choices: dict[int, _Choice] = {}

    def add(self, line: bytes) -> None:
        self._lines.append(line)
        self._size += len(line)
        self._fold_if_due()

    def extend(self, lines: list[bytes]) -> None:
        self._lines += lines
        self._size += sum(map(len, lines))
        self._fold_if_due()

    def choices(self) -> dict[int, Delivered] | None:
        """Return the progress of each choice by its number; None if a mark is invalid."""
        self._fold()
        if not self.is_usable:
            return None
        return {
            number: Delivered(choice.tokens.tolist(), choice.is_finished)
            for number, choice in self._choices.items()
        }

    def _fold_if_due(self) -> None:
        if len(self._lines) >= _FOLD_AT or self._size >= _FOLD_AT_BYTES or not self.is_usable:
            self._fold()

    def _fold(self) -> None:
        lines, self._lines, self._size = self._lines, [], 0
        if not self.is_usable:
            return
        try:
            for number, delivered in marks_of(lines).items():
                msgspec.convert(number, Number)
                choice = self._choices.setdefault(number, _Choice())
                choice.tokens.extend(delivered.tokens)
                choice.is_finished |= delivered.finished
        except (ValueError, OverflowError):  # msgspec.ValidationError is a ValueError
            self.is_usable = False
        if sum(len(choice.tokens) + 1 for choice in self._choices.values()) > MAX_TOKENS:
            self.is_usable = False
        if not self.is_usable:
            self._choices = {}


class Draft:
    """Tokens of a non-streamed response, known before it arrives."""

    __slots__ = ("_head", "_marks", "size")

    def __init__(self) -> None:
        #: Tokens of all choices so far.
        self.size = 0
        self._head = b""
        self._marks = Marks()

    def add(self, headers: RawHeaders) -> None:
        """Take the headers of an interim response."""
        for name, value in headers:
            if name == _DRAFT:
                self._head = value
            elif name == _DRAFT_MARK:
                self._marks.add(value)
                self.size += value.count(b" ")

    def resumption(self, path: str, body: bytes) -> Resumption | None:
        """Return what another replica needs to resume; None if it has to start over."""
        choices = self._marks.choices()
        created, _, identity = self._head.partition(b" ")
        if not choices or not created.isdigit() or len(created) > _MAX_CREATED_DIGITS:
            return None
        return Resumption(path, body, identity.decode("latin-1"), int(created), choices)


class Transcript:
    """Record of the events that the client has received of a resumable stream."""

    __slots__ = (
        *("_first", "_has_marks", "_has_summary", "_marks", "_num_events", "_rest", "is_done", "problem"),
    )

    def __init__(self) -> None:
        #: Why the stream of this replica is unusable; empty if it is not.
        self.problem = ""
        #: The last event has been passed on, so that a failure of the connection has no effect.
        self.is_done = False
        #: False if the first event had no mark: such a stream cannot be resumed.
        self._has_marks = True
        #: All choices have finished: the usage, or an error, has been passed on.
        self._has_summary = False
        #: First event: it has the id and the time of the response.
        self._first = b""
        self._marks = Marks()
        self._num_events = 0
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """Return what can be sent to the client now: complete events without their marks.

        The result does not depend on how the stream is cut into pieces.
        """
        if self.problem:
            return b""
        *events, self._rest = (self._rest + data).split(b"\n\n")
        if len(self._rest) > _MAX_EVENT:
            self.problem = f"an event is longer than {_MAX_EVENT} bytes"
        passed: list[bytes] = []
        for event in events:
            if _ERROR in event and (found := _ERROR_EVENT.search(event)):
                # The engine has failed, which is handled like a lost connection.
                self.problem = f"it reports {printable(found[1].decode('utf-8', 'replace'), 300)}"
                self._rest = b""
                break
            if event != _KEEP_ALIVE and (event := self._read(event)):
                passed += (event, b"\n\n")
        return b"".join(passed)

    def _read(self, event: bytes) -> bytes:
        """Return the event without its marks; b"" if it has only marks."""
        start = event.find(_MARK)
        is_marked = True
        if start > 0 and event.find(b"\n", start + 1) < 0:
            self._marks.add(event[start + len(_MARK) :])
            event = event[:start]
        elif start >= 0 or event.startswith(_MARK_ALONE):
            lines = event.split(b"\n")
            self._marks.extend([line[len(_MARK_ALONE) :] for line in lines if line.startswith(_MARK_ALONE)])
            event = b"\n".join(line for line in lines if not line.startswith(_MARK_ALONE))
            if not event:
                return event
        else:
            is_marked = False
        self._num_events += 1
        if event == _DONE_EVENT:
            self.is_done = True
        if not self._first:
            # A response that cannot be resumed has no marks.
            self._first, self._has_marks = event, is_marked
        elif is_marked:
            self._has_summary = False
        elif event != _DONE_EVENT and event.startswith(b"data:"):
            # The only event without a mark before the last one is the usage, or an error.
            self._has_summary = self._has_marks
        return event

    @property
    def is_steady(self) -> bool:
        """True if it needs nothing but the marks of the next events, so that the fast path can take them."""
        is_over = self.is_done or self._has_summary or self.problem != ""
        return self._is_resumable and self._first != b"" and self._rest == b"" and not is_over

    def add_marks(self, marks: list[bytes]) -> None:
        """Add the marks of events that the fast path has sent."""
        self._marks.extend(marks)
        self._num_events += len(marks)

    @property
    def missing_end(self) -> bytes:
        """The end of the stream, if only that is missing; else b""."""
        return _DONE if self._has_summary and not self.is_done else b""

    @property
    def is_open(self) -> bool:
        """True if it can be resumed and its last event has not arrived."""
        return self._is_resumable and not self.is_done

    def drop_partial(self) -> None:
        """Forget an incomplete event of a lost replica: another will send all of it."""
        self._rest = b""
        self.problem = ""

    @property
    def rest(self) -> bytes:
        """Bytes since the last complete event."""
        return self._rest

    def resumption(self, path: str, body: bytes) -> Resumption | None:
        """Return what another replica needs to resume; None if this stream cannot be resumed."""
        choices = self._marks.choices()
        if choices is None or not self._has_marks or not self._first:
            return None
        try:
            head = msgspec.json.decode(self._first.partition(b"data:")[2].strip(), type=_Head)
        except msgspec.DecodeError:
            return None
        identity, created = head.id, head.created
        if head.response is not None:
            identity, created = head.response.id, head.response.created_at
        if identity is None or created is None:
            return None
        return Resumption(path, body, identity, created, choices, self._num_events)

    @property
    def _is_resumable(self) -> bool:
        """True if the tokens of all events so far are known."""
        return self._has_marks and self._marks.is_usable


class Lines:
    """A stream of a replica that does not support resumption.

    Only complete lines are passed on, so that the client can parse what follows a break: an error event. A
    line that is longer than an event may be is passed on in pieces, so that it is not kept in memory.
    """

    __slots__ = ("_line", "_line_size", "_recent", "is_done")

    problem = ""
    missing_end = b""
    is_open = False

    def __init__(self) -> None:
        self.is_done = False
        self._line: list[bytes] = []
        self._line_size = 0
        #: Tail of what was passed on, in which the last event may have begun.
        self._recent = b"\n"

    def feed(self, data: bytes) -> bytes:
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        if not end and self._line_size + len(data) <= _MAX_EVENT:
            self._line.append(data)
            self._line_size += len(data)
            return b""
        end = end or len(data)
        whole = b"".join([*self._line, data[:end]])
        self._line = [data[end:]] if end < len(data) else []
        self._line_size = len(data) - end
        recent = self._recent + whole
        self.is_done = self.is_done or b"\n" + _DONE in recent
        self._recent = recent[-len(_DONE) :]
        return whole

    @property
    def rest(self) -> bytes:
        return b"".join(self._line)

    def drop_partial(self) -> None:
        self._line, self._line_size = [], 0

    def resumption(self, path: str, body: bytes) -> None:
        return None
