"""The response of one request to its client: begun once and ended once, whichever replicas it comes from.

A response that is not a stream is held back until it is complete, and a stream until its first event is: if
the replica dies before that, another can replace it unnoticed. After that, complete events are passed on as
they arrive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ....common.resumption import LOST_HEADER, Resumption
from ..http.fast_path import Passed
from ..http.protocols import Client
from ..http.request import CORS, HOP_BY_HOP, ClientRequest, RawHeaders, lines_without
from ..http.responses import Response, header_lines, sse_error
from ..http.upstream import ReplicaConnection
from ..instance import ReplicaHandle
from .transcript import Draft, Lines, Transcript

#: Bytes of a response that are held back until it is complete; a larger one is passed on as it arrives.
_MAX_HELD = 4 << 20
_REDIRECTS = frozenset({201, *range(300, 400)})
_DROPPED = frozenset(
    {
        *(HOP_BY_HOP | CORS),
        *(b"content-length", b"x-fd-replica", b"x-fd-retries", b"x-fd-resumed"),
        LOST_HEADER.lower().encode(),
    }
)


class Delivery:
    """Assembles the response from what the attempts receive, and writes it to the client."""

    __slots__ = (
        *("_client", "_draft", "_head", "_held", "_held_size", "_identity", "_max_drafted", "_request"),
        *("_transcript", "has_begun", "is_events", "is_paused", "size", "status"),
    )

    def __init__(self, client: Client, request: ClientRequest, identity: str) -> None:
        #: HTTP status; 0 before there is a response.
        self.status = 0
        #: Bytes of body sent to the client.
        self.size = 0
        #: Part of the response has been sent: it can be resumed, but not started over.
        self.has_begun = False
        #: The client reads more slowly than the response arrives.
        self.is_paused = False
        self.is_events = False
        self._client = client
        self._request = request
        self._identity = identity
        self._head: tuple[bytes, bytes, int | None] = (b"", b"", None)
        self._held: list[bytes] = []
        self._held_size = 0
        self._transcript: Transcript | Lines | None = None
        self._draft: Draft | None = None
        #: Most tokens that a draft of any replica had.
        self._max_drafted = 0

    def expect(
        self,
        connection: ReplicaConnection,
        retries: int,
        has_marks: bool,
        resumed_by: Sequence[ReplicaHandle],
    ) -> None:
        """Take the head of a replica's response as the one for the client.

        Args:
            retries: number of failed attempts before this one.
            has_marks: an event stream carries the marks of engine/common/resumption.py.
            resumed_by: the replicas that have resumed the response, this one included.
        """
        self.status = connection.status
        # With a Content-Length, no error event could be appended to a stream that breaks off.
        self.is_events = (
            connection.length is None
            and connection.status not in (204, 304)
            and connection.content_type.startswith(b"text/event-stream")
        )
        self._transcript = (Transcript() if has_marks else Lines()) if self.is_events else None
        lines = self._lines(connection)
        if retries:
            lines += b"x-fd-retries: %d\r\n" % retries
        if resumed_by:
            lines += _resumed(resumed_by)
        self._head = (b"%d %b" % (connection.status, connection.reason), lines, connection.length)

    def receive(self, body: bytes) -> int:
        """Take a piece of the body and return how many bytes were sent on. Check `problem` afterwards."""
        if self._transcript is not None:
            return self._pass_on(self._transcript.feed(body))
        if self.has_begun:
            return self._pass_on(body)
        self._held.append(body)
        self._held_size += len(body)
        return self._pass_on(self._take_held()) if self._held_size > _MAX_HELD else 0

    def note_draft(self, headers: RawHeaders) -> int:
        """Take the marks of a response that is not a stream from an interim head.

        Returns:
            Number of tokens by which it exceeds all drafts so far.
        """
        if self.has_begun:
            return 0
        if self._draft is None:
            self._draft = Draft()
        self._draft.add(headers)
        before, self._max_drafted = self._max_drafted, max(self._max_drafted, self._draft.size)
        return self._max_drafted - before

    def forget_draft(self) -> None:
        """Forget the draft, because the response starts over."""
        self._draft = None

    @property
    def has_marks(self) -> bool:
        """True for a stream with marks, which the fast path can serve once it has begun."""
        return isinstance(self._transcript, Transcript)

    @property
    def fast_transport(self) -> asyncio.Transport | None:
        """The client's transport if the fast path can take the next events, else None."""
        transcript = self._transcript
        if not self.has_begun or not isinstance(transcript, Transcript) or not transcript.is_steady:
            return None
        return self._client.fast_transport

    def add_passed(self, passed: Passed) -> None:
        """Account for the events that the fast path has sent, and send what it could not."""
        assert isinstance(self._transcript, Transcript)
        self.size += passed.size
        self._transcript.add_marks(passed.marks)
        if passed.unsent:
            self._client.send_chunks(passed.unsent)

    def finish(self, resumed_by: Sequence[ReplicaHandle] = ()) -> None:
        """End a complete response. A trailer names the replicas that have resumed a stream.

        A comment in the stream would break clients that take every line for data.
        """
        if self._transcript is not None:
            self._pass_on(self._transcript.rest)
        if self.has_begun or self.is_events:
            self._begin()
            self._client.end(_resumed(resumed_by) if resumed_by and self.is_events else b"")
            return
        status, lines, length = self._head
        body = self._take_held()
        self.size = len(body)
        self._client.respond(status.strip(), lines, body, length if self.is_head else None)

    def respond(self, response: Response) -> None:
        """Send a response of the router's own."""
        lines = header_lines([*response.headers, ("X-Request-Id", self._identity)])
        self.status = response.status
        self.size = len(response.body)
        self._client.respond(response.status_line.encode(), lines, response.body)

    def break_off(self, why: str) -> None:
        """End a response that cannot be finished: a stream with an error event, anything else by a reset."""
        if self.is_events:
            self._client.send(sse_error(why))
            self._client.end()
        else:
            self._client.abort()

    def crash(self, response: Response, why: str) -> None:
        """End after an exception in the router: with `response`, or broken off if it has begun."""
        try:
            if self.has_begun:
                self.break_off(why)
            else:
                self.respond(response)
        except Exception:
            # What was sent is unknown, so it must not look complete.
            self._client.abort()
            raise

    def drop_partial(self) -> None:
        """Drop what was not passed on: the replica is lost, and another will send it again."""
        self._take_held()
        if self._transcript is not None:
            self._transcript.drop_partial()
            if not self.has_begun:
                self._transcript = None
                self.is_events = False

    @property
    def is_head(self) -> bool:
        return self._request.method == "HEAD"

    @property
    def is_done(self) -> bool:
        """True if the client has a complete stream, or all but an end that the router can add."""
        transcript = self._transcript
        return (
            self.has_begun
            and transcript is not None
            and (transcript.is_done or transcript.missing_end != b"")
        )

    @property
    def problem(self) -> str:
        """Why the stream of this replica is unusable; empty if it is not."""
        return self._transcript.problem if self._transcript is not None else ""

    @property
    def is_open(self) -> bool:
        """True for a resumable stream whose last event has not arrived."""
        return self._transcript is not None and self._transcript.is_open

    def complete(self) -> None:
        """Add the missing end of a stream that `is_done`."""
        if self._transcript is not None:
            self._transcript.drop_partial()
            self._pass_on(self._transcript.missing_end)

    def resumption(self) -> Resumption | None:
        """Return what another replica needs to resume the response; None if it cannot be resumed."""
        source = self._transcript if self.has_begun else self._draft
        if source is None:
            return None
        return source.resumption(self._request.path, self._request.body)

    def _pass_on(self, piece: bytes) -> int:
        if piece:
            self._begin()
            self.size += len(piece)
            self._client.send(piece)
        return len(piece)

    def _begin(self) -> None:
        if not self.has_begun:
            self.has_begun = True
            status, lines, length = self._head
            self._client.begin(status.strip(), lines, length)

    def _take_held(self) -> bytes:
        held = b"".join(self._held)
        self._held, self._held_size = [], 0
        return held

    def _lines(self, connection: ReplicaConnection) -> bytes:
        dropped = _DROPPED | connection.dropped if connection.dropped else _DROPPED
        added = f"x-fd-replica: {connection.handle.name}\r\n"
        if not connection.has_request_id:
            added += f"x-request-id: {self._identity}\r\n"
        headers = connection.headers
        if connection.status in _REDIRECTS:
            headers = [_without_authority(header, connection.handle.authority) for header in headers]
        return lines_without(dropped, headers) + added.encode("latin-1")


def _without_authority(header: tuple[bytes, bytes], authority: str) -> tuple[bytes, bytes]:
    """Make a redirect to the replica's own address relative, so that it leads to the router."""
    name, value = header
    if name != b"location":
        return header
    scheme, colon, rest = value.partition(b"://")
    named, _, path = rest.partition(b"/")
    is_own = colon and scheme.lower() in (b"http", b"https") and named.decode("latin-1") == authority
    # Two slashes would start the name of another host.
    return (name, b"/" + path.lstrip(b"/")) if is_own else header


def _resumed(by: Sequence[ReplicaHandle]) -> bytes:
    return b"x-fd-resumed: %b\r\n" % ", ".join(handle.name for handle in by).encode()
