"""How far an answer is, so that another replica can go on with it. Pure.

A replica that can be resumed ends each event of a stream with a line that says which tokens it stood for
(`engine/common/resumption.py`). Here these lines are taken out and kept; they are looked at only when the
replica fails. Only whole events are let through, so that a stream breaks off, if it does, between two of
them. Of an
answer that comes whole the replica tells now and then which tokens it has (`Draft`).
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
#: Marks are folded into token numbers when there are so many, or so many bytes: text is longer than numbers.
_FOLD_AT, _FOLD_AT_BYTES = 1024, 32 << 10
#: Digits of a Unix time.
_LONGEST_MOMENT = 10
#: Of one event, or of what comes instead of one.
_LONGEST_EVENT = 4 << 20
#: Tokens of all choices of one answer; a longer one cannot be resumed.
MOST_TOKENS = 1 << 18
_DONE_EVENT = b"data: [DONE]"
_DONE = _DONE_EVENT + b"\n\n"
_ERROR = b'data: {"error"'
_ERROR_EVENT = re.compile(rb'^data: (\{"error".*)', re.MULTILINE)
_SIGN_OF_LIFE = b":"


class _Head(msgspec.Struct):
    """What all events of a stream have in common."""

    id: str
    created: Moment


class _Choice:
    """One of the texts that an answer carries. An array: a list takes nine times the memory."""

    __slots__ = ("is_finished", "tokens")

    def __init__(self) -> None:
        self.tokens = array("I")
        self.is_finished = False


class Marks:
    """Of one answer."""

    __slots__ = ("_choices", "_lines", "_size", "is_whole")

    def __init__(self) -> None:
        #: All of them could be read, and there are not too many tokens.
        self.is_whole = True
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
        """What they say; None if that cannot be told."""
        self._fold()
        if not self.is_whole:
            return None
        return {
            number: Delivered(choice.tokens.tolist(), choice.is_finished)
            for number, choice in self._choices.items()
        }

    def _fold_if_due(self) -> None:
        if len(self._lines) >= _FOLD_AT or self._size >= _FOLD_AT_BYTES or not self.is_whole:
            self._fold()

    def _fold(self) -> None:
        lines, self._lines, self._size = self._lines, [], 0
        if not self.is_whole:
            return
        try:
            for number, delivered in marks_of(lines).items():
                msgspec.convert(number, Number)
                choice = self._choices.setdefault(number, _Choice())
                choice.tokens.extend(delivered.tokens)
                choice.is_finished |= delivered.finished
        except (ValueError, OverflowError):  # msgspec's are ValueErrors, too
            self.is_whole = False
        if sum(len(choice.tokens) + 1 for choice in self._choices.values()) > MOST_TOKENS:
            self.is_whole = False
        if not self.is_whole:
            self._choices = {}


class Draft:
    """Of an answer that comes whole: what its replica has told of it before."""

    __slots__ = ("_head", "_marks", "size")

    def __init__(self) -> None:
        #: Tokens of all choices so far.
        self.size = 0
        self._head = b""
        self._marks = Marks()

    def note(self, headers: RawHeaders) -> None:
        """Takes what an interim head says."""
        for name, value in headers:
            if name == _DRAFT:
                self._head = value
            elif name == _DRAFT_MARK:
                self._marks.add(value)
                self.size += value.count(b" ")

    def resumption(self, path: str, body: bytes) -> Resumption | None:
        """What another replica needs to go on; None if it has to begin anew."""
        choices = self._marks.choices()
        created, _, identity = self._head.partition(b" ")
        if not choices or not created.isdigit() or len(created) > _LONGEST_MOMENT:
            return None
        return Resumption(path, body, identity.decode("latin-1"), int(created), choices)


class Transcript:
    """Of one stream: what its client has got."""

    __slots__ = ("_first", "_has_marks", "_has_summary", "_marks", "_rest", "is_done", "problem")

    def __init__(self) -> None:
        #: Why the replica will not bring the stream to its end; empty if it may.
        self.problem = ""
        #: The last event has been passed on: what happens to the connection now does not matter.
        self.is_done = False
        #: Since its first event.
        self._has_marks = True
        self._has_summary = False
        self._first = b""
        self._marks = Marks()
        self._rest = b""

    def pass_on(self, data: bytes) -> bytes:
        """What of the stream so far can go to the client now: whole events, without marks.

        The result does not depend on how the stream was cut into pieces.
        """
        if self.problem:
            return b""
        *events, self._rest = (self._rest + data).split(b"\n\n")
        if len(self._rest) > _LONGEST_EVENT:
            self.problem = f"an event is longer than {_LONGEST_EVENT} bytes"
        passed: list[bytes] = []
        for event in events:
            if _ERROR in event and (found := _ERROR_EVENT.search(event)):
                # Its model has crashed, or the like: for the client no better than a lost connection.
                self.problem = f"it says {printable(found[1].decode('utf-8', 'replace'), 300)}"
                self._rest = b""
                break
            if event != _SIGN_OF_LIFE and (event := self._read(event)):
                passed += (event, b"\n\n")
        return b"".join(passed)

    def _read(self, event: bytes) -> bytes:
        """Return the event without its marks; nothing if it has only marks."""
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
        if event == _DONE_EVENT:
            self.is_done = True
        if not self._first:
            # An answer that cannot be resumed has no marks.
            self._first, self._has_marks = event, is_marked
        elif is_marked:
            self._has_summary = False
        elif event != _DONE_EVENT and event.startswith(b"data:"):
            # An event without a mark that is not the end comes right before it: the usage, or an error.
            self._has_summary = self._has_marks
        return event

    @property
    def is_steady(self) -> bool:
        """What it wants to know of further events is their marks."""
        is_over = self.is_done or self._has_summary or self.problem != ""
        return self._is_whole and self._first != b"" and self._rest == b"" and not is_over

    def note(self, marks: list[bytes]) -> None:
        """Those of events that went to the client another way."""
        self._marks.extend(marks)

    @property
    def missing_end(self) -> bytes:
        """What alone is missing of the stream, if that is all."""
        return _DONE if self._has_summary and not self.is_done else b""

    @property
    def is_open(self) -> bool:
        """It can be resumed, and its last event has not come."""
        return self._is_whole and not self.is_done

    def drop_partial(self) -> None:
        """Forgets a part of an event: the replica that was sending it is gone, another begins it anew."""
        self._rest = b""
        self.problem = ""

    @property
    def rest(self) -> bytes:
        """What has come since the last whole event."""
        return self._rest

    def resumption(self, path: str, body: bytes) -> Resumption | None:
        """What another replica needs to go on; None if this stream cannot be resumed."""
        choices = self._marks.choices()
        if choices is None or not self._has_marks or not self._first:
            return None
        try:
            head = msgspec.json.decode(self._first.removeprefix(b"data:").strip(), type=_Head)
        except msgspec.DecodeError:
            return None
        return Resumption(path, body, head.id, head.created, choices)

    @property
    def _is_whole(self) -> bool:
        """Every event so far could be accounted for."""
        return self._has_marks and self._marks.is_whole


class Lines:
    """A stream of a replica that knows nothing of this, so that it cannot go on elsewhere.

    Whole lines are let through: where it breaks off, the client has no half line to choke on.
    """

    __slots__ = ("_line", "_recent", "is_done")

    problem = ""
    missing_end = b""
    is_open = False

    def __init__(self) -> None:
        self.is_done = False
        self._line: list[bytes] = []
        #: The end of what has been passed on, in which the last event may have begun.
        self._recent = b"\n"

    def pass_on(self, data: bytes) -> bytes:
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        if not end:
            self._line.append(data)
            return b""
        whole = b"".join([*self._line, data[:end]])
        self._line = [data[end:]] if end < len(data) else []
        recent = self._recent + whole
        self.is_done = self.is_done or b"\n" + _DONE in recent
        self._recent = recent[-len(_DONE) :]
        return whole

    @property
    def rest(self) -> bytes:
        return b"".join(self._line)

    def drop_partial(self) -> None:
        self._line = []

    def resumption(self, path: str, body: bytes) -> None:
        return None
