"""What the client gets: one answer, begun once and ended once, whichever replicas it came from.

Nothing goes out before it has to. An answer that comes whole is held back until it is whole, and a stream
until its first event is, so that the replica may die as late as that and be replaced unseen. From then on
whole events are passed on as they come.
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

#: Of an answer that is held back until it is whole; a larger one is passed on as it comes.
_MOST_HELD = 4 << 20
_REDIRECTS = frozenset({201, *range(300, 400)})
_NOT_PASSED_ON = frozenset(
    {
        *(HOP_BY_HOP | CORS),
        *(b"content-length", b"x-fd-replica", b"x-fd-retries", b"x-fd-resumed"),
        LOST_HEADER.lower().encode(),
    }
)


class Delivery:
    """Of one request."""

    __slots__ = (
        *("_client", "_draft", "_furthest", "_head", "_held", "_held_size", "_identity", "_request"),
        *("_transcript", "has_begun", "is_events", "size", "status"),
    )

    def __init__(self, client: Client, request: ClientRequest, identity: str) -> None:
        #: Of the answer; 0 before there is one.
        self.status = 0
        #: Bytes of body that the client was sent.
        self.size = 0
        #: Something has gone to the client: there is no way back.
        self.has_begun = False
        self.is_events = False
        self._client = client
        self._request = request
        self._identity = identity
        self._head: tuple[bytes, bytes, int | None] = (b"", b"", None)
        self._held: list[bytes] = []
        self._held_size = 0
        self._transcript: Transcript | Lines | None = None
        self._draft: Draft | None = None
        #: Tokens that any replica has told of.
        self._furthest = 0

    def expect(
        self,
        connection: ReplicaConnection,
        retries: int,
        has_marks: bool,
        resumed_by: Sequence[ReplicaHandle],
    ) -> None:
        """The head of a replica's answer has come; it is what the client will get.

        Args:
            retries: how many replicas have been tried in vain before.
            resumed_by: the replicas that have gone on with it, this one included.
            has_marks: an event stream carries the marks of `resumption`.
        """
        self.status = connection.status
        # With a length announced, nothing can be added to a stream that breaks off.
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
        """A piece of it, as it came. The number of bytes that went on to the client; see `problem`, too."""
        if self._transcript is not None:
            return self._pass_on(self._transcript.pass_on(body))
        if self.has_begun:
            return self._pass_on(body)
        self._held.append(body)
        self._held_size += len(body)
        return self._pass_on(self._take_held()) if self._held_size > _MOST_HELD else 0

    def note_draft(self, headers: RawHeaders) -> int:
        """A replica has told how far an answer is that comes whole; returns by how many tokens it is further
        than it has ever been."""
        if self.has_begun:
            return 0
        if self._draft is None:
            self._draft = Draft()
        self._draft.note(headers)
        before, self._furthest = self._furthest, max(self._furthest, self._draft.size)
        return self._furthest - before

    def forget_draft(self) -> None:
        """The answer is begun anew."""
        self._draft = None

    @property
    def has_marks(self) -> bool:
        """Its events can go by the fast path, once it has begun."""
        return isinstance(self._transcript, Transcript)

    @property
    def fast_transport(self) -> asyncio.Transport | None:
        """The client's, if the next events can go by the fast path."""
        transcript = self._transcript
        if not self.has_begun or not isinstance(transcript, Transcript) or not transcript.is_steady:
            return None
        return self._client.fast_transport

    def add_passed(self, passed: Passed) -> None:
        """What has gone by the fast path."""
        assert isinstance(self._transcript, Transcript)
        self.size += passed.size
        self._transcript.note(passed.marks)
        if passed.unsent:
            self._client.send_chunks(passed.unsent)

    def finish(self, resumed_by: Sequence[ReplicaHandle] = ()) -> None:
        """The answer is whole. Which replicas have gone on with a stream stands in a trailer.

        A comment in the stream would be in the way of clients that take every line for data.
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
        self._client.give(status.strip(), lines, body, length if self._request.method == "HEAD" else None)

    def give(self, answer: Response) -> None:
        """An answer of the router's own, whole."""
        lines = header_lines([*answer.headers, ("X-Request-Id", self._identity)])
        self.status = answer.status
        self.size = len(answer.body)
        self._client.give(answer.status_line.encode(), lines, answer.body)

    def break_off(self, why: str) -> None:
        """What has begun cannot be finished: an event stream can say so, anything else is cut."""
        if self.is_events:
            self._client.send(sse_error(why))
            self._client.end()
        else:
            self._client.abort()

    def crash(self, answer: Response, why: str) -> None:
        """End the answer after an exception in the router: with `answer`, or cut off if it has begun."""
        try:
            if self.has_begun:
                self.break_off(why)
            else:
                self.give(answer)
        except Exception:
            # What has gone out is unknown, so it must not look whole.
            self._client.abort()
            raise

    def drop_partial(self) -> None:
        """The replica is gone: what of its answer has not been passed on will come from another."""
        self._take_held()
        if self._transcript is not None:
            self._transcript.drop_partial()
            if not self.has_begun:
                self._transcript = None
                self.is_events = False

    @property
    def is_done(self) -> bool:
        """The client has all of a stream that a replica could say: what happens to it does not matter."""
        transcript = self._transcript
        return (
            self.has_begun
            and transcript is not None
            and (transcript.is_done or transcript.missing_end != b"")
        )

    @property
    def problem(self) -> str:
        """Why the replica will not bring its stream to an end; empty if it may."""
        return self._transcript.problem if self._transcript is not None else ""

    @property
    def is_open(self) -> bool:
        """It is a stream that must not end yet."""
        return self._transcript is not None and self._transcript.is_open

    def complete(self) -> None:
        """Adds what is missing of a stream that `is_done`."""
        if self._transcript is not None:
            self._transcript.drop_partial()
            self._pass_on(self._transcript.missing_end)

    def resumption(self) -> Resumption | None:
        """What another replica needs to go on with the answer; None if none could."""
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
        dropped = _NOT_PASSED_ON | connection.dropped if connection.dropped else _NOT_PASSED_ON
        added = f"x-fd-replica: {connection.handle.name}\r\n"
        if not connection.has_request_id:
            added += f"x-request-id: {self._identity}\r\n"
        headers = connection.headers
        if connection.status in _REDIRECTS:
            headers = [_without_authority(header, connection.handle.authority) for header in headers]
        return lines_without(dropped, headers) + added.encode("latin-1")


def _without_authority(header: tuple[bytes, bytes], authority: str) -> tuple[bytes, bytes]:
    """Make a redirect that names the replica's address one that leads to the router again."""
    name, value = header
    if name != b"location":
        return header
    scheme, colon, rest = value.partition(b"://")
    named, _, path = rest.partition(b"/")
    is_own = colon and scheme.lower() in (b"http", b"https") and named.decode("latin-1") == authority
    # Two slashes would begin the name of another host.
    return (name, b"/" + path.lstrip(b"/")) if is_own else header


def _resumed(by: Sequence[ReplicaHandle]) -> bytes:
    return b"x-fd-resumed: %b\r\n" % ", ".join(handle.name for handle in by).encode()
