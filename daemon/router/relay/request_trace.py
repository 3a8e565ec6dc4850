"""The spans of one request in the router: the request, its waits in the queue, and its attempts at replicas.

They have no content of requests and responses. `Exchange` has none of this where traces are off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....common.trace_context import TRACEPARENT, TRACESTATE
from ....common.tracing import Attributes, Tracing, context_of
from ..http.request import ClientRequest
from ..http.upstream import Fault
from ..instance import ReplicaHandle

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_TRACEPARENT, _TRACESTATE = TRACEPARENT.encode(), TRACESTATE.encode()
_REPLACED = frozenset({_TRACEPARENT})
#: A tracestate without a valid traceparent means nothing.
_BOTH_REPLACED = frozenset({_TRACEPARENT, _TRACESTATE})
_CLIENT_GONE = 499
#: Paths that are no invention of a client, so that the names of spans are few.
_ROUTES = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models"})
_MAX_PATH = 200


class RequestTrace:
    """Belongs to one exchange."""

    __slots__ = ("_attempt", "_attempts", "_span", "_tracing", "_wait", "context", "replaced")

    def __init__(self, tracing: Tracing, request: ClientRequest, identity: str) -> None:
        parent = request.trace_context
        state = b",".join(value for name, value in request.headers if name == _TRACESTATE)
        method, path = request.method, request.path
        is_known = path in _ROUTES
        self._tracing = tracing
        self._span = tracing.serve(
            f"{method} {path}" if is_known else method,
            parent,
            state.decode("latin-1"),
            {
                "http.request.method": method,
                "url.path": path[:_MAX_PATH],
                **({"http.route": path} if is_known else {}),
                "fd.request.id": identity,
            },
        )
        self._wait: Span | None = None
        self._attempt: Span | None = None
        self._attempts = 0
        #: Names of the client's headers that are not forwarded.
        self.replaced = _BOTH_REPLACED if parent is None else _REPLACED
        #: The trace, with the span of the request.
        self.context = context_of(self._span)

    @property
    def lines(self) -> bytes:
        """Header lines with which the replica of the current attempt continues the trace."""
        context = self.context if self._attempt is None else context_of(self._attempt)
        return b"%b: %b\r\n" % (_TRACEPARENT, context.header.encode())

    def wait(self) -> None:
        """Begin a wait in the queue."""
        self._wait = self._child("queue")

    def attempt(self, handle: ReplicaHandle, *, is_resumption: bool) -> None:
        """End the wait, if there was one, and begin an attempt at a replica."""
        self._end_wait()
        self._attempt = self._child("resume" if is_resumption else "attempt", handle)
        self._attempts += 1

    def fail_attempt(self, reason: Fault | int) -> None:
        """Note why the current attempt fails: a fault, or the status with which the replica declines."""
        if self._attempt is None:
            return
        if isinstance(reason, Fault):
            self._tracing.mark_failed(self._attempt, reason.value)
        else:
            self._attempt.set_attribute("http.response.status_code", reason)
            self._tracing.mark_failed(self._attempt, str(reason))

    def end_attempt(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.end()

    def end(self, status: int, size: int, *, is_broken: bool) -> None:
        """End the request.

        Args:
            status: what the client got; 499 if it left before.
            is_broken: the response ended early.
        """
        self._end_wait()
        span = self._span
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("http.response.body.size", size)
        if status >= 500:
            self._tracing.mark_failed(span, str(status))
        elif status == _CLIENT_GONE:
            span.set_attribute("error.type", "client gone")
        elif is_broken:
            self._tracing.mark_failed(span, "incomplete response")
        span.end()

    def _end_wait(self) -> None:
        wait, self._wait = self._wait, None
        if wait is not None:
            wait.end()

    def _child(self, name: str, handle: ReplicaHandle | None = None) -> Span | None:
        if not self._span.is_recording():
            return None
        if handle is None:
            return self._tracing.child(self._span, name)
        attributes: Attributes = {
            "server.address": handle.instance.host,
            "server.port": handle.instance.port,
            "http.request.resend_count": self._attempts,
            "fd.replica": handle.name,
        }
        return self._tracing.child(self._span, name, attributes, is_call=True)
